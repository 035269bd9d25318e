// upsample_cross_entropy on CUDA: one launch forward (two with label smoothing), two backward.
//
// The limit is memory (labels, losses and statistic once, and the small logits) or the
// exponentials, one per pixel and class in both directions. As compiled for sm_90, each exponential
// comes with 6 other instructions in the forward, beside a loop over corners, and 7 in the backward
// of classes that are not the label of a pixel nearby.
#include "upsample_cross_entropy/cuda_backward.cuh"
#include "upsample_cross_entropy/cuda_forward.cuh"
#include "upsample_cross_entropy/cuda_gather.cuh"

namespace mcibi_fast {
namespace {

template <typename Element>
cudaError_t forward(const LogitMap& logits, const LabelMap& labels,
                    const CrossEntropyOptions& options, void* losses, void* statistic,
                    LabelFlag flag, CudaStream stream) {
  using T = Compute<Element>;
  ForwardInput<Element> input;
  input.map =
      make_upsample_input<Element>(logits, labels.height, labels.width, options.align_corners);
  input.labels = labels;
  input.flag = flag;
  input.weight = static_cast<const T*>(options.weight);
  input.smoothing = static_cast<T>(options.label_smoothing);
  input.losses = static_cast<T*>(losses);
  input.largest = static_cast<T*>(statistic);
  input.sum = input.largest + logits.batch * labels.height * labels.width;
  const bool patch = input.map.patch_classes > 0;
  const auto launch = [&](auto kernel) {
    return launch_blocks(kernel, tiles_of(input.map, logits.batch), kTileThreads, 0, stream, input);
  };
  const cudaError_t status =
      launch(patch ? cross_entropy_kernel<Element, true> : cross_entropy_kernel<Element, false>);
  if (status != cudaSuccess || !(options.label_smoothing > 0)) return status;
  return launch(patch ? smoothing_kernel<Element, true> : smoothing_kernel<Element, false>);
}

// ---- backward -----------------------------------------------------------------------------------

constexpr int kMostGroupClasses = 256;
constexpr int64_t kWantedBlocks = 512;  // about four on each of 132 SMs
constexpr double kWalkPixels = 512;

// Depends on the sizes alone, so that results do not differ between devices.
BackwardPlan make_backward_plan(const LogitMap& logits, const LabelMap& labels) {
  const bool wide = logits.kind == FloatKind::kFloat64;
  const auto clamped = [](int64_t value, int64_t most) {
    return static_cast<int>(value < 1 ? 1 : value < most ? value : most);
  };
  BackwardPlan plan;
  plan.groups = static_cast<int>(ceil_div(logits.classes, kMostGroupClasses));
  plan.group_classes = static_cast<int>(ceil_div(logits.classes, plan.groups));
  plan.lanes = static_cast<int>(ceil_div(plan.group_classes, kThreadClasses));
  const int64_t most_walks = wide ? kMaxWalks / 2 : kMaxWalks;
  plan.walks = clamped((wide ? kMostThreads<double> : kMostThreads<float>) / plan.lanes,
                       logits.width < most_walks ? logits.width : most_walks);
  const double cell = static_cast<double>(labels.height) / static_cast<double>(logits.height) *
                      static_cast<double>(labels.width) / static_cast<double>(logits.width);
  const double cells = cell > 1 ? kWalkPixels / cell : kWalkPixels;
  plan.cells =
      clamped(static_cast<int64_t>(cells), logits.height < kMaxCells ? logits.height : kMaxCells);
  const auto blocks = [&] {
    return logits.batch * ceil_div(logits.height, plan.cells) * ceil_div(logits.width, plan.walks) *
           plan.groups;
  };
  while (blocks() < kWantedBlocks && plan.walks > 4) plan.walks /= 2;
  while (blocks() < kWantedBlocks && plan.cells > 2) plan.cells /= 2;
  plan.tiles_y = static_cast<int>(ceil_div(logits.height, plan.cells));
  plan.tiles_x = static_cast<int>(ceil_div(logits.width, plan.walks));
  return plan;
}

template <typename T>
size_t shared_bytes(const BackwardPlan& plan) {
  return static_cast<size_t>(plan.walks) *
         (kStagePixels * sizeof(PixelState<T>) +
          static_cast<size_t>(2 * (plan.cells + 1) * kThreadClasses * plan.lanes) * sizeof(T));
}

template <typename Element>
cudaError_t gather(const BackwardPlan& plan, const void* sums, const LogitMap& grad_logits,
                   CudaStream stream) {
  using T = Compute<Element>;
  GatherInput<Element> input;
  input.sums = static_cast<const T*>(sums);
  input.plan = plan;
  input.grad = const_cast<Element*>(static_cast<const Element*>(grad_logits.data));
  input.strides = grad_logits.strides;
  input.classes = static_cast<int>(grad_logits.classes);
  input.height = static_cast<int>(grad_logits.height);
  input.width = static_cast<int>(grad_logits.width);
  input.tiles_k = static_cast<int>(ceil_div(grad_logits.classes, kGatherSide));
  input.tiles_x = static_cast<int>(ceil_div(grad_logits.width, kGatherSide));
  const int64_t blocks = grad_logits.batch * grad_logits.height * input.tiles_x * input.tiles_k;
  return launch_blocks(cross_entropy_gather_kernel<Element>, blocks, kGatherThreads, 0, stream,
                       input);
}

template <typename Element>
cudaError_t backward(const CrossEntropyCotangent& cotangent, const LogitMap& logits,
                     const LabelMap& labels, const CrossEntropyOptions& options,
                     const LogitMap& grad_logits, LabelFlag flag, void* scratch,
                     CudaStream stream) {
  using T = Compute<Element>;
  BackwardInput<Element> input;
  input.logits = static_cast<const Element*>(logits.data);
  input.strides = logits.strides;
  input.classes = static_cast<int>(logits.classes);
  input.y_axis = make_bilinear_axis<T>(logits.height, labels.height, options.align_corners);
  input.x_axis = make_bilinear_axis<T>(logits.width, labels.width, options.align_corners);
  input.labels = labels;
  input.flag = flag;
  input.grad_losses = static_cast<const T*>(cotangent.grad_losses);
  input.grad_stride_b = cotangent.stride_b;
  input.grad_stride_y = cotangent.stride_y;
  input.grad_stride_x = cotangent.stride_x;
  input.largest = static_cast<const T*>(cotangent.statistic);
  input.sum = input.largest + logits.batch * labels.height * labels.width;
  input.weight = static_cast<const T*>(options.weight);
  input.smoothing = static_cast<T>(options.label_smoothing);
  const auto map =
      make_upsample_input<Element>(logits, labels.height, labels.width, options.align_corners);
  input.scaled = may_scale(map);
  input.plan = make_backward_plan(logits, labels);
  input.sums = static_cast<T*>(scratch);
  const int64_t tiles = logits.batch * input.plan.tiles_y * input.plan.tiles_x;
  const auto kernel = options.label_smoothing > 0 ? cross_entropy_backward_kernel<Element, true>
                                                  : cross_entropy_backward_kernel<Element, false>;
  const cudaError_t status = launch_blocks(kernel, tiles * input.plan.groups, input.plan.threads(),
                                           shared_bytes<T>(input.plan), stream, input);
  return status == cudaSuccess ? gather<Element>(input.plan, scratch, grad_logits, stream) : status;
}

}  // namespace

const char* upsample_cross_entropy_cuda(const LogitMap& logits, const LabelMap& labels,
                                        const CrossEntropyOptions& options, void* losses,
                                        void* statistic, LabelFlag flag, CudaStream stream) {
  return launch_for(logits.kind, [&](auto element) {
    return forward<decltype(element)>(logits, labels, options, losses, statistic, flag, stream);
  });
}

size_t upsample_cross_entropy_backward_cuda_scratch(const LogitMap& logits,
                                                    const LabelMap& labels) {
  const BackwardPlan plan = make_backward_plan(logits, labels);
  const int64_t values = logits.batch * plan.tiles_y * (plan.cells + 1) * plan.tiles_x *
                         (plan.walks + 1) * logits.classes;
  return static_cast<size_t>(values) *
         (logits.kind == FloatKind::kFloat64 ? sizeof(double) : sizeof(float));
}

const char* upsample_cross_entropy_backward_cuda(const CrossEntropyCotangent& cotangent,
                                                 const LogitMap& logits, const LabelMap& labels,
                                                 const CrossEntropyOptions& options,
                                                 const LogitMap& grad_logits, LabelFlag flag,
                                                 void* scratch, CudaStream stream) {
  return launch_for(logits.kind, [&](auto element) {
    return backward<decltype(element)>(cotangent, logits, labels, options, grad_logits, flag,
                                       scratch, stream);
  });
}

}  // namespace mcibi_fast
