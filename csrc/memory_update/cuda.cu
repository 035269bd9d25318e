// Memory update (Eqs. 6-9) on CUDA, in three launches, the first two once for each group of tiles
// (one group up to 32 MiB of A: 54000 low-resolution pixels at K=150):
//
//   class_weights_kernel  A = U^T onehot(GT), by tiles of 16 x 4 low-resolution pixels
//   class_sums_kernel     A^T R for slices of the tiles, reading R once
//   finish_kernel         the sum of the slices; for memory_update also Eqs. 8, 9 and 6
//
// Bytes moved, for N = B h w low-resolution pixels with elements of b bytes: R once (N Z b); the
// labels once from DRAM (a third more from L2, because a tile also reads the cells of the row above
// and of the column before); A only for the classes in a tile (2.7 of 11 on CamVid, at 45x60 and at
// 64x64), 4 bytes per pixel and class, written once and read from L2 by each chunk of 64 channels;
// and partial sums of the classes in each slice, of which there are at most 384 * 64 / Z. The least
// possible time at B=8, Z=512, 64x64, labels of 512x512 and 4.8 TB/s (H200): bfloat16, 33.6 MB and
// 2.1 MB (uint8) to 16.8 MB (int64) of labels, 7.4 to 10.5 us; float32, 14.4 to 17.5 us.
//
// Operations: one FMA for each element of R and class in the tile around it, 90 MFLOP in the
// example, which is a seventh of what the FMA units do in that time. With random labels every class
// is in every tile, and the limit is K FMAs per element instead.
//
// Every sum has a fixed order, which depends on the sizes alone; atomics are on integers only.
#include <initializer_list>

#include "memory_update/cuda_class_sums.cuh"
#include "memory_update/cuda_class_weights.cuh"
#include "memory_update/cuda_finish.cuh"

namespace mcibi_fast {
namespace {

constexpr size_t kListBytes = 52 * 1024;     // for the cells' lists: 30 classes in float32
constexpr size_t kSharedTarget = 98 * 1024;  // available to a block on every GPU since sm_80

template <typename T>
WeightsShared weights_shared(int cells, int listed, int classes) {
  WeightsShared s;
  int used = 0;
  const auto take = [&used](size_t bytes) {
    const int begin = used;
    used += static_cast<int>(ceil_div(bytes, 16) * 16);
    return begin;
  };
  s.ranges = take(sizeof(CellRange) * cells);
  s.distinct = take(sizeof(int) * cells);
  s.labels = take(sizeof(int) * cells * listed);
  s.corners = take(sizeof(T) * 4 * cells * listed);
  s.present = take(sizeof(unsigned) * ceil_div(classes, 32));
  s.histogram = take(sizeof(int) * classes);
  s.slot_labels = take(sizeof(int) * classes);
  s.bytes = used;
  return s;
}

template <typename Label, typename T>
cudaError_t launch_class_weights(const WeightsInput<T>& input, int tiles, CudaStream stream) {
  return launch(class_weights_kernel<Label, T>, dim3(tiles), dim3(kUpdateThreads),
                static_cast<size_t>(input.shared.bytes), stream, input);
}

template <typename T>
cudaError_t class_weights(const FeatureMap& features, const LabelMap& labels, bool align_corners,
                          const TilePlan& plan, int tiles, const ClassWeights<T>& a, LabelFlag flag,
                          CudaStream stream) {
  WeightsInput<T> input;
  input.labels = labels.data;
  input.stride_b = labels.stride_b;
  input.stride_y = labels.stride_y;
  input.stride_x = labels.stride_x;
  input.ignore_index = labels.ignore_index;
  input.y_axis = make_bilinear_axis<T>(features.height, labels.height, align_corners);
  input.x_axis = make_bilinear_axis<T>(features.width, labels.width, align_corners);
  input.grid = plan.grid;
  input.cells = cells_of_tile(plan.grid);
  const size_t entry = sizeof(int) + 4 * sizeof(T);
  const int room = static_cast<int>(kListBytes / entry) / input.cells;
  input.listed = room < a.classes ? room : a.classes;
  input.group = labels.width > 16 * features.width ? 32 : 8;
  input.shared = weights_shared<T>(input.cells, input.listed, a.classes);
  input.out = a;
  input.flag = flag;
  switch (labels.kind) {
    case LabelKind::kUInt8:
      return launch_class_weights<uint8_t>(input, tiles, stream);
    case LabelKind::kInt8:
      return launch_class_weights<int8_t>(input, tiles, stream);
    case LabelKind::kInt16:
      return launch_class_weights<int16_t>(input, tiles, stream);
    case LabelKind::kInt32:
      return launch_class_weights<int32_t>(input, tiles, stream);
    case LabelKind::kInt64:
      return launch_class_weights<int64_t>(input, tiles, stream);
  }
  return cudaErrorInvalidValue;
}

// The number of classes whose sums a block holds beside the stages: all of them if they fit in
// kSharedTarget, else as many as fit in the device's shared memory.
template <typename Shared>
int choose_class_chunk(int classes) {
  if (Shared::bytes(classes) <= kSharedTarget) return classes;
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const size_t room = static_cast<size_t>(limit) - Shared::bytes(0);
  const size_t fitting = room / (Shared::bytes(1) - Shared::bytes(0));
  return fitting < static_cast<size_t>(classes) ? static_cast<int>(fitting) : classes;
}

template <typename Element, typename T, Fill kFill>
cudaError_t launch_class_sums(SumsInput<Element, T> input, const TilePlan& plan,
                              CudaStream stream) {
  using Shared = SumsShared<Element, T, kFill>;
  input.class_chunk = choose_class_chunk<Shared>(input.a.classes);
  const dim3 grid(plan.slices, plan.channel_chunks,
                  static_cast<unsigned>(ceil_div(input.a.classes, input.class_chunk)));
  return launch(class_sums_kernel<Element, T, kFill>, grid, dim3(kUpdateThreads),
                Shared::bytes(input.class_chunk), stream, input);
}

template <typename Element>
Fill choose_fill(const FeatureMap& f) {
  constexpr int64_t kVector = 16 / sizeof(Element);
  // Whether the strides from one row, channel or image to the next are whole vectors.
  const auto whole = [&f](int64_t vector, std::initializer_list<int64_t> values) {
    if ((f.batch > 1 && f.stride_b % vector != 0) || (f.height > 1 && f.stride_y % vector != 0))
      return false;
    for (const int64_t value : values)
      if (value % vector != 0) return false;
    return true;
  };
  if (!aligned(f.data)) return Fill::kElements;
  if (f.stride_x == 1 && whole(kVector, {f.stride_z, f.width})) return Fill::kPixelVectors;
  if (f.stride_z == 1 && whole(kVector, {f.stride_x, f.channels})) return Fill::kChannelVectors;
  if (f.stride_x == 1 && whole(kVector / 2, {f.stride_z, f.width})) return Fill::kPixelHalves;
  return Fill::kElements;
}

template <typename Element, typename T>
cudaError_t class_sums(const FeatureMap& f, const TilePlan& plan, int tiles,
                       const ClassWeights<T>& a, const PartialSums<T>& partial, CudaStream stream) {
  SumsInput<Element, T> input;
  input.features = {
      static_cast<const Element*>(f.data), f.stride_b, f.stride_z, f.stride_y, f.stride_x,
      static_cast<int>(f.channels)};
  input.a = a;
  input.out = partial;
  input.tiles = tiles;
  input.grid = plan.grid;
  switch (choose_fill<Element>(f)) {
    case Fill::kPixelVectors:
      return launch_class_sums<Element, T, Fill::kPixelVectors>(input, plan, stream);
    case Fill::kPixelHalves:
      return launch_class_sums<Element, T, Fill::kPixelHalves>(input, plan, stream);
    case Fill::kChannelVectors:
      return launch_class_sums<Element, T, Fill::kChannelVectors>(input, plan, stream);
    case Fill::kElements:
      return launch_class_sums<Element, T, Fill::kElements>(input, plan, stream);
  }
  return cudaErrorInvalidValue;
}

// Scratch memory of one call.
template <typename T>
struct Scratch {
  ClassWeights<T> a;
  PartialSums<T> partial;
  T* sums;  // for memory_update, which does not return them
  size_t bytes;

  Scratch(void* base, const TilePlan& plan, int64_t classes, int64_t channels) {
    Arena arena(base);
    a = take_class_weights<T>(arena, plan, classes);
    partial = take_partial_sums<T>(arena, plan, classes, channels);
    sums = arena.take<T>(classes * channels);
    bytes = arena.used();
  }
};

template <typename T>
TilePlan plan_of(const FeatureMap& f, int64_t classes) {
  return make_tile_plan(f.batch, f.channels, f.height, f.width, classes, sizeof(T));
}

// Calls run(tiles, a) for each group of tiles; stops at an error.
template <typename T, typename Run>
cudaError_t over_groups(const TilePlan& plan, ClassWeights<T> a, const Run& run) {
  cudaError_t status = cudaSuccess;
  for (; a.first_tile < plan.tiles && status == cudaSuccess; a.first_tile += plan.group_tiles) {
    const int left = plan.tiles - a.first_tile;
    status = run(left < plan.group_tiles ? left : plan.group_tiles, a);
  }
  return status;
}

template <typename Element>
cudaError_t forward(const FeatureMap& features, const LabelMap& labels, bool align_corners,
                    void* sums, int64_t* counts, const MemoryRows& memory, LabelFlag flag,
                    void* scratch_bytes, CudaStream stream) {
  using T = Compute<Element>;
  const TilePlan plan = plan_of<T>(features, labels.num_classes);
  const Scratch<T> scratch(scratch_bytes, plan, labels.num_classes, features.channels);
  const cudaError_t status = over_groups(plan, scratch.a, [&](int tiles, const auto& a) {
    const cudaError_t weights =
        class_weights<T>(features, labels, align_corners, plan, tiles, a, flag, stream);
    if (weights != cudaSuccess) return weights;
    return class_sums<Element, T>(features, plan, tiles, a, scratch.partial, stream);
  });
  if (status != cudaSuccess) return status;
  return launch(finish_kernel<T>, dim3(static_cast<unsigned>(labels.num_classes)),
                dim3(kUpdateThreads), 0, stream, scratch.partial,
                static_cast<int>(features.channels),
                sums != nullptr ? static_cast<T*>(sums) : scratch.sums, counts, memory);
}

const char* forward(const FeatureMap& features, const LabelMap& labels, bool align_corners,
                    void* sums, int64_t* counts, const MemoryRows& memory, LabelFlag flag,
                    void* scratch, CudaStream stream) {
  return launch_for(features.kind, [&](auto element) {
    return forward<decltype(element)>(features, labels, align_corners, sums, counts, memory, flag,
                                      scratch, stream);
  });
}

template <typename T>
size_t scratch_bytes(const FeatureMap& features, int64_t classes) {
  return Scratch<T>(nullptr, plan_of<T>(features, classes), classes, features.channels).bytes;
}

size_t scratch_bytes(const FeatureMap& features, const LabelMap& labels) {
  return features.kind == FloatKind::kFloat64 ? scratch_bytes<double>(features, labels.num_classes)
                                              : scratch_bytes<float>(features, labels.num_classes);
}

// ---- backward: grad_R[j, z] = sum_c A[j, c] grad_sums[c, z] -------------------------------------

// Grid: (tiles, channel chunks). A thread has one pixel and every fourth channel of the chunk.
template <typename Element, typename T>
__global__ void __launch_bounds__(kUpdateThreads)
    spread_kernel(ClassWeights<T> a, const T* grad_sums, Element* grad_features, int channels,
                  TileGrid grid) {
  constexpr int kStep = kUpdateThreads / kTile, kChannels = kChannelChunk / kStep;
  const int tile = static_cast<int>(blockIdx.x), pixel = static_cast<int>(threadIdx.x) % kTile;
  const PixelTile pixels = grid.tile(a.first_tile + tile);
  const int z0 =
      static_cast<int>(blockIdx.y) * kChannelChunk + static_cast<int>(threadIdx.x) / kTile;
  T grad[kChannels] = {};
  for (int i = 0; i < a.slot_counts[tile]; ++i) {
    const T weight = a.weight_row(tile, i)[pixel];
    if (weight == T(0)) continue;  // an infinite gradient reaches only its own pixels
    const T* row = grad_sums + static_cast<int64_t>(a.slot(tile, i)->label) * channels;
#pragma unroll
    for (int j = 0; j < kChannels; ++j)
      if (z0 + j * kStep < channels) grad[j] += weight * row[z0 + j * kStep];
  }
  if (!pixels.has(pixel)) return;
  const int64_t plane = static_cast<int64_t>(grid.height) * grid.width;
  const int64_t in_plane = static_cast<int64_t>(pixels.y(pixel)) * grid.width + pixels.x(pixel);
#pragma unroll
  for (int j = 0; j < kChannels; ++j) {
    const int z = z0 + j * kStep;
    if (z < channels)
      grad_features[(static_cast<int64_t>(pixels.image) * channels + z) * plane + in_plane] =
          narrow<Element>(grad[j]);
  }
}

template <typename Element>
cudaError_t backward(const void* grad_sums, const LabelMap& labels, bool align_corners,
                     const FeatureMap& grad_features, LabelFlag flag, void* scratch,
                     CudaStream stream) {
  using T = Compute<Element>;
  const TilePlan plan = plan_of<T>(grad_features, labels.num_classes);
  Arena arena(scratch);
  const auto all = take_class_weights<T>(arena, plan, labels.num_classes);
  return over_groups(plan, all, [&](int tiles, const auto& a) {
    const cudaError_t status =
        class_weights<T>(grad_features, labels, align_corners, plan, tiles, a, flag, stream);
    if (status != cudaSuccess) return status;
    return launch(spread_kernel<Element, T>, dim3(tiles, plan.channel_chunks), dim3(kUpdateThreads),
                  0, stream, a, static_cast<const T*>(grad_sums),
                  static_cast<Element*>(const_cast<void*>(grad_features.data)),
                  static_cast<int>(grad_features.channels), plan.grid);
  });
}

template <typename T>
size_t backward_scratch_bytes(const FeatureMap& grad_features, int64_t classes) {
  Arena arena(nullptr);
  take_class_weights<T>(arena, plan_of<T>(grad_features, classes), classes);
  return arena.used();
}

}  // namespace

size_t class_feature_sums_cuda_scratch(const FeatureMap& features, const LabelMap& labels) {
  return scratch_bytes(features, labels);
}
size_t memory_update_cuda_scratch(const FeatureMap& features, const LabelMap& labels) {
  return scratch_bytes(features, labels);
}
size_t class_feature_sums_backward_cuda_scratch(const FeatureMap& grad_features,
                                                const LabelMap& labels) {
  return grad_features.kind == FloatKind::kFloat64
             ? backward_scratch_bytes<double>(grad_features, labels.num_classes)
             : backward_scratch_bytes<float>(grad_features, labels.num_classes);
}

const char* class_feature_sums_cuda(const FeatureMap& features, const LabelMap& labels,
                                    bool align_corners, void* sums, int64_t* counts, LabelFlag flag,
                                    void* scratch, CudaStream stream) {
  return forward(features, labels, align_corners, sums, counts, MemoryRows{}, flag, scratch,
                 stream);
}

const char* memory_update_cuda(const FeatureMap& features, const LabelMap& labels,
                               bool align_corners, const MemoryUpdate& update, LabelFlag flag,
                               void* scratch, CudaStream stream) {
  const MemoryRows memory = {
      update.memory,   update.next,          update.kind == FloatKind::kFloat64,
      update.stride_k, update.stride_column, update.momentum,
      update.unbiased, update.kept_rows};
  return forward(features, labels, align_corners, nullptr, nullptr, memory, flag, scratch, stream);
}

const char* class_feature_sums_backward_cuda(const void* grad_sums, const LabelMap& labels,
                                             bool align_corners, const FeatureMap& grad_features,
                                             LabelFlag flag, void* scratch, CudaStream stream) {
  return launch_for(grad_features.kind, [&](auto element) {
    return backward<decltype(element)>(grad_sums, labels, align_corners, grad_features, flag,
                                       scratch, stream);
  });
}

}  // namespace mcibi_fast
