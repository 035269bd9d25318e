// upsample_cross_entropy on CUDA: one launch forward (two with label smoothing), two backward. The
// sum or mean with its gradient: four launches forward, one backward.
//
// The limit is memory (labels, losses and statistic once, and the small logits) or the
// exponentials, one per pixel and class in both directions, or for both in one pass. As compiled
// for sm_90, each exponential comes with 6 other instructions in the forward, beside a loop over
// corners, and 7 in the backward of classes that are not the label of a pixel nearby.
#include "upsample_cross_entropy/cuda_backward.cuh"
#include "upsample_cross_entropy/cuda_forward.cuh"
#include "upsample_cross_entropy/cuda_gather.cuh"
#include "upsample_cross_entropy/cuda_one_pass.cuh"

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

int clamped(int64_t value, int64_t most) {
  return static_cast<int>(value < 1 ? 1 : value < most ? value : most);
}

// Divides the cells into tiles of the plan's walks, or of fewer and shorter ones where there would
// be too few blocks. Depends on the sizes alone, so that results do not differ between devices.
void divide_cells(const LogitMap& logits, const LabelMap& labels, int least_walks, TilePlan& plan) {
  const double cell = static_cast<double>(labels.height) / static_cast<double>(logits.height) *
                      static_cast<double>(labels.width) / static_cast<double>(logits.width);
  const double cells = cell > 1 ? kWalkPixels / cell : kWalkPixels;
  plan.cells =
      clamped(static_cast<int64_t>(cells), logits.height < kMaxCells ? logits.height : kMaxCells);
  const auto blocks = [&] {
    return logits.batch * ceil_div(logits.height, plan.cells) * ceil_div(logits.width, plan.walks) *
           plan.groups;
  };
  while (blocks() < kWantedBlocks && plan.walks > least_walks) plan.walks /= 2;
  while (blocks() < kWantedBlocks && plan.cells > 2) plan.cells /= 2;
  plan.tiles_y = static_cast<int>(ceil_div(logits.height, plan.cells));
  plan.tiles_x = static_cast<int>(ceil_div(logits.width, plan.walks));
}

TilePlan make_backward_plan(const LogitMap& logits, const LabelMap& labels) {
  const bool wide = logits.kind == FloatKind::kFloat64;
  TilePlan plan;
  plan.groups = static_cast<int>(ceil_div(logits.classes, kMostGroupClasses));
  plan.group_classes = static_cast<int>(ceil_div(logits.classes, plan.groups));
  plan.lanes = static_cast<int>(ceil_div(plan.group_classes, kThreadClasses));
  const int64_t most_walks = wide ? kMaxWalks / 2 : kMaxWalks;
  plan.walks = clamped((wide ? kMostThreads<double> : kMostThreads<float>) / plan.lanes,
                       logits.width < most_walks ? logits.width : most_walks);
  divide_cells(logits, labels, 4, plan);
  return plan;
}

template <typename T>
size_t shared_bytes(const TilePlan& plan) {
  return static_cast<size_t>(plan.walks) *
         (kStagePixels * sizeof(PixelState<T>) +
          static_cast<size_t>(2 * (plan.cells + 1) * kThreadClasses * plan.lanes) * sizeof(T));
}

template <typename Element>
cudaError_t gather(const TilePlan& plan, const void* sums, const void* factor,
                   const LogitMap& grad_logits, CudaStream stream) {
  using T = Compute<Element>;
  GatherInput<Element> input;
  input.sums = static_cast<const T*>(sums);
  input.factor = static_cast<const T*>(factor);
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
  if (status != cudaSuccess) return status;
  return gather<Element>(input.plan, scratch, nullptr, grad_logits, stream);
}

size_t sums_bytes(const LogitMap& logits, const TilePlan& plan) {
  const int64_t values = logits.batch * plan.tiles_y * (plan.cells + 1) * plan.tiles_x *
                         (plan.walks + 1) * logits.classes;
  return static_cast<size_t>(values) *
         (logits.kind == FloatKind::kFloat64 ? sizeof(double) : sizeof(float));
}

// ---- loss and gradient in one pass --------------------------------------------------------------

// Fewest threads first: a lane's classes, and the lanes of a walk.
struct OnePassShape {
  int classes, lanes;
};
constexpr OnePassShape kOnePassShapes[] = {{3, 8},  {4, 8},  {5, 8},  {3, 16}, {4, 16},
                                           {5, 16}, {3, 32}, {4, 32}, {5, 32}, {6, 32}};

// What the launches leave for each other, in the workspace.
struct OnePassWorkspace {
  Divisor* divisor;
  ValidTotal* totals;
  double* losses;
  int16_t* targets;
};

struct OnePassPlan {
  TilePlan tiles;
  int lane_classes = 0;  // 0: one pass cannot run
  int target_blocks;
  int64_t blocks, pixels;

  OnePassPlan(const LogitMap& logits, const LabelMap& labels) {
    if (labels.height <= logits.height || labels.width <= logits.width) return;
    for (const OnePassShape& shape : kOnePassShapes) {
      if (shape.classes * shape.lanes < logits.classes) continue;
      lane_classes = shape.classes;
      tiles.lanes = shape.lanes;
      break;
    }
    if (lane_classes == 0) return;
    tiles.groups = 1;
    tiles.group_classes = static_cast<int>(logits.classes);
    tiles.walks = kOnePassThreads / tiles.lanes;
    divide_cells(logits, labels, 32 / tiles.lanes, tiles);
    blocks = logits.batch * tiles.tiles_y * tiles.tiles_x;
    target_blocks = clamped(logits.batch * labels.height, kMostTargetBlocks);
    pixels = logits.batch * labels.height * labels.width;
  }

  size_t shared_bytes() const {
    const int sums = 2 * (tiles.cells + 1) * lane_classes * tiles.lanes;
    return static_cast<size_t>(tiles.walks) *
           (sizeof(WalkPixels) + static_cast<size_t>(sums) * sizeof(float));
  }
  size_t workspace_bytes() const {
    return sizeof(Divisor) + static_cast<size_t>(target_blocks) * sizeof(ValidTotal) +
           static_cast<size_t>(blocks) * sizeof(double) +
           static_cast<size_t>(pixels) * sizeof(int16_t);
  }
  OnePassWorkspace parts_of(void* workspace) const {
    OnePassWorkspace parts;
    parts.divisor = static_cast<Divisor*>(workspace);
    parts.totals = reinterpret_cast<ValidTotal*>(parts.divisor + 1);
    parts.losses = reinterpret_cast<double*>(parts.totals + target_blocks);
    parts.targets = reinterpret_cast<int16_t*>(parts.losses + blocks);
    return parts;
  }
};

template <int kClasses>
cudaError_t launch_one_pass(const OnePassInput& input, const OnePassPlan& plan, CudaStream stream) {
  const auto kernel = input.smoothing > 0 ? cross_entropy_one_pass_kernel<kClasses, true>
                                          : cross_entropy_one_pass_kernel<kClasses, false>;
  return launch_blocks(kernel, plan.blocks, plan.tiles.threads(), plan.shared_bytes(), stream,
                       input);
}

cudaError_t one_pass(const LogitMap& logits, const LabelMap& labels,
                     const CrossEntropyOptions& options, const OnePassPlan& plan, float* sums,
                     const OnePassWorkspace& workspace, CudaStream stream) {
  OnePassInput input;
  input.logits = logits.data;
  input.kind = logits.kind;
  input.strides = logits.strides;
  input.classes = static_cast<int>(logits.classes);
  input.y_axis = make_bilinear_axis<float>(logits.height, labels.height, options.align_corners);
  input.x_axis = make_bilinear_axis<float>(logits.width, labels.width, options.align_corners);
  input.targets = workspace.targets;
  input.divisor = workspace.divisor;
  input.weight = static_cast<const float*>(options.weight);
  input.smoothing = static_cast<float>(options.label_smoothing);
  input.plan = plan.tiles;
  input.sums = sums;
  input.losses = workspace.losses;
  switch (plan.lane_classes) {
    case 3:
      return launch_one_pass<3>(input, plan, stream);
    case 4:
      return launch_one_pass<4>(input, plan, stream);
    case 5:
      return launch_one_pass<5>(input, plan, stream);
    default:
      return launch_one_pass<kMostClassesOfLane>(input, plan, stream);
  }
}

cudaError_t reduced(const LogitMap& logits, const LabelMap& labels,
                    const CrossEntropyOptions& options, bool mean, const OnePassPlan& plan,
                    float* loss, float* sums, const OnePassWorkspace& workspace, LabelFlag flag,
                    CudaStream stream) {
  const auto* weight = static_cast<const float*>(options.weight);
  const TargetInput targets = {
      labels, flag, logits.batch * labels.height, weight, workspace.targets, workspace.totals};
  cudaError_t status = launch_blocks(cross_entropy_targets_kernel, plan.target_blocks,
                                     kTotalThreads, 0, stream, targets);
  if (status != cudaSuccess) return status;
  status =
      launch_blocks(cross_entropy_divisor_kernel, 1, kTotalThreads, 0, stream, workspace.totals,
                    plan.target_blocks, weight != nullptr, mean, workspace.divisor);
  if (status != cudaSuccess) return status;
  status = one_pass(logits, labels, options, plan, sums, workspace, stream);
  if (status != cudaSuccess) return status;
  return launch_blocks(cross_entropy_loss_kernel, 1, kTotalThreads, 0, stream, workspace.losses,
                       plan.blocks, workspace.divisor, loss);
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
  return sums_bytes(logits, make_backward_plan(logits, labels));
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

ReducedCudaBytes upsample_cross_entropy_reduced_cuda_bytes(const LogitMap& logits,
                                                           const LabelMap& labels) {
  const OnePassPlan plan(logits, labels);
  if (plan.lane_classes == 0 || logits.kind == FloatKind::kFloat64) return {0, 0};
  return {sums_bytes(logits, plan.tiles), plan.workspace_bytes()};
}

const char* upsample_cross_entropy_reduced_cuda(const LogitMap& logits, const LabelMap& labels,
                                                const CrossEntropyOptions& options, bool mean,
                                                void* loss, void* sums, LabelFlag flag,
                                                void* workspace, CudaStream stream) {
  const OnePassPlan plan(logits, labels);
  if (plan.lane_classes == 0 || logits.kind == FloatKind::kFloat64)
    return launch_message(cudaErrorInvalidValue);
  return launch_message(reduced(logits, labels, options, mean, plan, static_cast<float*>(loss),
                                static_cast<float*>(sums), plan.parts_of(workspace), flag, stream));
}

const char* upsample_cross_entropy_gather_cuda(const void* grad_loss, const void* sums,
                                               const LabelMap& labels, const LogitMap& grad_logits,
                                               CudaStream stream) {
  const OnePassPlan plan(grad_logits, labels);
  return launch_for(grad_logits.kind, [&](auto element) {
    return gather<decltype(element)>(plan.tiles, sums, grad_loss, grad_logits, stream);
  });
}

}  // namespace mcibi_fast
