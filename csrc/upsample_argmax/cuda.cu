// upsample_argmax and upsample_confusion on CUDA, one launch each.
//
// At the least the kernels move the small logits once, and the argmax writes 8 B H W bytes or the
// confusion matrix reads the labels. In addition they need about 20 instructions for each class and
// column of up to 8 pixels, and 7 more for each pixel at which the class may win.
//
// Counts are integers, so their sum does not depend on the order of the additions.
#include "upsample_argmax/cuda_predict.cuh"

namespace mcibi_fast {
namespace {

// Grid: one block for each tile.
template <typename Element, bool kPatch>
__global__ void __launch_bounds__(kTileThreads, sizeof(Element) == 8 ? 1 : 3)
    argmax_kernel(UpsampleInput<Element> input, int64_t* out) {
  using T = Compute<Element>;
  constexpr int kRows = kPatch ? kBandRows : 1;
  MCIBI_SHARED(values, T[kPatch ? kPatchValues : 1]);
  const Tile tile = tile_at(input, blockIdx.x);
  const auto pixels = pixels_of_thread<kRows>(input, tile);
  const auto prediction = predict<kPatch>(input, tile, pixels, values);
  const int64_t first =
      (static_cast<int64_t>(tile.b) * input.y_axis.out_size + pixels.y) * input.x_axis.out_size +
      pixels.x;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (r < pixels.rows)
      out[first + static_cast<int64_t>(r) * input.x_axis.out_size] = prediction.label[r];
}

// Counts pairs of label and prediction in the block's shared memory or, if that is too small, in
// global memory. Pixels below each other often are the same pair, which is then added once.
class PairCounts {
 public:
  __device__ PairCounts(unsigned* block, unsigned long long* all) : block_(block), all_(all) {}

  __device__ __forceinline__ void add(int64_t pair) {
    if (pair != pair_) flush();
    pair_ = pair;
    ++count_;
  }
  __device__ __forceinline__ void flush() {
    if (count_ > 0 && block_ != nullptr) atomicAdd(&block_[pair_], count_);
    if (count_ > 0 && block_ == nullptr)
      atomicAdd(&all_[pair_], static_cast<unsigned long long>(count_));
    count_ = 0;
  }

 private:
  unsigned* block_;
  unsigned long long* all_;
  int64_t pair_ = -1;
  unsigned count_ = 0;
};

template <typename Element>
struct ConfusionInput {
  UpsampleInput<Element> map;
  LabelMap labels;
  LabelFlag flag;
  unsigned long long* counts;  // (K, K)
  int64_t tiles;
  int block_counts;  // K * K in shared memory, or 0
};

// A grid of any size: blocks take turns at the tiles.
template <typename Element, bool kPatch>
__global__ void __launch_bounds__(kTileThreads, sizeof(Element) == 8 ? 1 : 3)
    confusion_kernel(ConfusionInput<Element> input) {
  using T = Compute<Element>;
  constexpr int kRows = kPatch ? kBandRows : 1;
  MCIBI_SHARED(values, T[kPatch ? kPatchValues : 1]);
  unsigned* block = nullptr;
  if (input.block_counts > 0) {
    MCIBI_DYNAMIC_SHARED(bytes);
    block = reinterpret_cast<unsigned*>(bytes);
    for (int i = static_cast<int>(threadIdx.x); i < input.block_counts; i += kTileThreads)
      block[i] = 0;
    __syncthreads();  // the counts are zero
  }
  for (int64_t number = blockIdx.x; number < input.tiles; number += gridDim.x) {
    const Tile tile = tile_at(input.map, number);
    const auto pixels = pixels_of_thread<kRows>(input.map, tile);
    const auto prediction = predict<kPatch>(input.map, tile, pixels, values);
    PairCounts counts(block, input.counts);
    LabelReader labels(input.labels);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= pixels.rows) break;
      const int label = labels.read(tile.b, pixels.y + r, pixels.x);
      if (label >= 0)
        counts.add(static_cast<int64_t>(label) * input.map.classes + prediction.label[r]);
    }
    counts.flush();
    labels.report(input.flag);
  }
  if (block == nullptr) return;
  __syncthreads();  // the tiles are counted
  for (int i = static_cast<int>(threadIdx.x); i < input.block_counts; i += kTileThreads)
    if (block[i] > 0) atomicAdd(&input.counts[i], static_cast<unsigned long long>(block[i]));
}

// ---- launches -----------------------------------------------------------------------------------

template <typename Element>
cudaError_t argmax(const LogitMap& logits, int64_t height, int64_t width, bool align_corners,
                   int64_t* prediction, CudaStream stream) {
  const auto input = make_upsample_input<Element>(logits, height, width, align_corners);
  const auto kernel =
      input.patch_classes > 0 ? argmax_kernel<Element, true> : argmax_kernel<Element, false>;
  return launch_blocks(kernel, tiles_of(input, logits.batch), kTileThreads, 0, stream, input,
                       prediction);
}

// Where a block keeps its counts, and how many blocks share the tiles.
struct ConfusionPlan {
  size_t shared_bytes;
  int64_t blocks;
};

ConfusionPlan make_confusion_plan(int64_t classes, int64_t tiles, size_t patch_bytes) {
  const auto attribute = [](cudaDeviceAttr which) {
    return static_cast<size_t>(device_attribute(which));
  };
  const size_t bytes = static_cast<size_t>(classes) * static_cast<size_t>(classes) * sizeof(int);
  const bool fits = classes < kTileThreads &&
                    bytes + patch_bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (!fits) return {0, tiles};
  constexpr size_t kReserved = 1024;  // by the system, in every block
  const size_t per_multiprocessor =
      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (bytes + patch_bytes + kReserved);
  const size_t most = per_multiprocessor < 3 ? per_multiprocessor : 3;
  const auto resident =
      static_cast<int64_t>((most > 0 ? most : 1) * attribute(cudaDevAttrMultiProcessorCount));
  return {bytes, ceil_div(tiles, ceil_div(tiles, resident))};
}

template <typename Element>
cudaError_t confusion(const LogitMap& logits, const LabelMap& labels, bool align_corners,
                      int64_t* counts, LabelFlag flag, CudaStream stream) {
  using T = Compute<Element>;
  ConfusionInput<Element> input;
  input.map = make_upsample_input<Element>(logits, labels.height, labels.width, align_corners);
  input.labels = labels;
  input.flag = flag;
  input.counts = reinterpret_cast<unsigned long long*>(counts);
  input.tiles = tiles_of(input.map, logits.batch);
  const bool patch = input.map.patch_classes > 0;
  const auto plan =
      make_confusion_plan(logits.classes, input.tiles, sizeof(T) * (patch ? kPatchValues : 1));
  input.block_counts = static_cast<int>(plan.shared_bytes / sizeof(unsigned));
  const size_t bytes = static_cast<size_t>(logits.classes * logits.classes) * sizeof(int64_t);
  const cudaError_t status = cudaMemsetAsync(counts, 0, bytes, stream);
  if (status != cudaSuccess) return status;
  const auto kernel = patch ? confusion_kernel<Element, true> : confusion_kernel<Element, false>;
  return launch_blocks(kernel, plan.blocks, kTileThreads, plan.shared_bytes, stream, input);
}

}  // namespace

const char* upsample_argmax_cuda(const LogitMap& logits, int64_t height, int64_t width,
                                 bool align_corners, int64_t* prediction, CudaStream stream) {
  return launch_for(logits.kind, [&](auto element) {
    return argmax<decltype(element)>(logits, height, width, align_corners, prediction, stream);
  });
}

const char* upsample_confusion_cuda(const LogitMap& logits, const LabelMap& labels,
                                    bool align_corners, int64_t* confusion_counts, LabelFlag flag,
                                    CudaStream stream) {
  return launch_for(logits.kind, [&](auto element) {
    return confusion<decltype(element)>(logits, labels, align_corners, confusion_counts, flag,
                                        stream);
  });
}

}  // namespace mcibi_fast
