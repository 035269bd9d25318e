// Gaussian sampling and aggregation on CUDA (Eqs. 11-12, Algorithm 1).
//
// Per pixel the forward moves K + Z elements and the backward 2 K + Z, each once; both do 2 K Z
// operations. On an H200 (4.8 TB/s, 0.99 PFLOP/s in bfloat16, 33 T FMA/s in float32) the least time
// of the forward per pixel with Z = 512 is
//             bfloat16: memory, tensor cores     float32: memory, FMA units
//   K = 19    0.22 ns, 0.03 ns (K padded to 32)  0.44 ns, 0.29 ns
//   K = 150   0.28 ns, 0.17 ns (160)             0.55 ns, 2.3 ns
// so memory is the limit, except for many classes in float32. In bfloat16 and float16 one launch
// writes the table, which each block then copies, once for all of its tiles if it fits in shared
// memory; otherwise each block computes it from the memory and the noise. The logits and their
// gradient are the only K x N arrays in device memory.
//
// cuda_mma_*.cuh are for bfloat16 and float16, cuda_simt_*.cuh for float32 and float64.
#include <algorithm>
#include <cmath>

#include "gaussian_aggregate/cuda_mma_backward.cuh"
#include "gaussian_aggregate/cuda_mma_forward.cuh"
#include "gaussian_aggregate/cuda_simt_backward.cuh"
#include "gaussian_aggregate/cuda_simt_forward.cuh"

namespace mcibi_fast {
namespace {

// The figures of the current device on which plans depend.
struct Device {
  int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  int block_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  int processor_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);

  // The number of blocks of this size that run at the same time, at most `limit` per processor.
  int blocks(int bytes, int limit) const {
    const int fitting = processor_bytes / (bytes + 1024);
    return processors * std::max(1, std::min(fitting, limit));
  }
};

// The strides of a map of the input's size, as one row of pixels if its rows are contiguous.
MapAddress address_of(const GaussianAggregateCudaInput& input, MapStrides s) {
  const int pixels = static_cast<int>(input.height * input.width);
  if (input.batch == 1) s.batch = 0;
  if (input.height == 1 || s.row == input.width * s.column)
    return {{s.batch, s.channel, 0, s.column}, pixels};
  if (input.width == 1) return {{s.batch, s.channel, 0, s.row}, pixels};
  return {s, static_cast<int>(input.width)};
}

// ---- table --------------------------------------------------------------------------------------

template <typename Scalar>
__global__ void table_kernel(const __grid_constant__ GaussianTableCudaInput input, Scalar* out) {
  const int channels = int(input.channels), quads = ceil_div(channels, 4);
  const int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= input.classes * quads) return;
  const int k = int(item / quads), z = 4 * int(item % quads);
  Scalar c[4];
  GaussianTable(input).entries(Quad{k, z}, c);
  for (int i = 0; i < 4 && z + i < channels; ++i) out[k * int64_t(channels) + z + i] = c[i];
}

template <typename Scalar>
cudaError_t launch_table(const GaussianTableCudaInput& input, void* out, CudaStream stream) {
  const int64_t items = input.classes * ceil_div(input.channels, 4);
  return launch(table_kernel<Scalar>, dim3(static_cast<unsigned>(ceil_div(items, 256))), dim3(256),
                0, stream, input, static_cast<Scalar*>(out));
}

// ---- forward ------------------------------------------------------------------------------------

template <typename T, bool kChannelsLast, int kSteps>
cudaError_t launch_forward_mma(const GaussianAggregateCudaInput& input, bool hard, void* out,
                               void* lse, CudaStream stream) {
  const Device device;
  const int classes = static_cast<int>(input.table.classes);
  const int channels = static_cast<int>(input.table.channels);
  const int pixels = static_cast<int>(input.height * input.width);
  const MapAddress map = address_of(input, input.logits_strides);
  const int tiles = static_cast<int>(input.batch) * ceil_div(pixels, kTilePixels);

  ForwardMmaPlan plan;
  plan.steps = ceil_div(classes, 16);
  plan.run = longest_run<kChannelsLast>(input.logits, map, classes, pixels);
  plan.vector = (kChannelsLast ? channels : pixels) % 8 == 0 && aligned(out);
  plan.hard = hard;
  const int fixed = kMmaWarps * kStageElements * static_cast<int>(sizeof(T));
  const int fitting = (device.block_bytes - fixed) / (1024 * plan.steps);
  plan.resident = fitting > 0;
  // Copying a block's table costs about as much as the weights of channels / 100 tiles (an
  // estimate, not measured), so the best number s of slices of the channels is given by s^2 =
  // channels / (100 tiles per processor).
  const int groups = ceil_div(channels, 32);
  const double best = std::sqrt(0.01 * channels * device.processors / tiles);
  const int slices = std::max(plan.resident ? ceil_div(groups, fitting) : 1,
                              static_cast<int>(std::ceil(std::min(best, 1e6))));
  plan.groups = ceil_div(groups, std::min(slices, groups));
  const int blocks_y = ceil_div(groups, plan.groups);
  const int bytes =
      fixed + 1024 * (plan.resident ? plan.groups * plan.steps : std::min(plan.steps, kSteps));
  const int blocks_x =
      std::min(tiles, std::max(1, device.blocks(bytes, kSteps <= kFewSteps ? 2 : 1) / blocks_y));
  const cudaError_t status =
      launch(forward_fragments_kernel<T, kChannelsLast>, dim3(plan.steps, groups),
             dim3(kForwardFragmentThreads), 0, stream, input.table, static_cast<T*>(input.scratch));
  if (status != cudaSuccess) return status;
  return launch(forward_mma_kernel<T, kChannelsLast, kSteps>, dim3(blocks_x, blocks_y),
                dim3(32 * kMmaWarps), static_cast<size_t>(bytes), stream, input, map, plan,
                static_cast<T*>(out), static_cast<float*>(lse));
}

template <typename T, bool kChannelsLast>
cudaError_t forward_mma(const GaussianAggregateCudaInput& input, bool hard, void* out, void* lse,
                        CudaStream stream) {
  return input.table.classes <= 16 * kFewSteps
             ? launch_forward_mma<T, kChannelsLast, kFewSteps>(input, hard, out, lse, stream)
             : launch_forward_mma<T, kChannelsLast, kForwardSteps>(input, hard, out, lse, stream);
}

template <typename Scalar, bool kChannelsLast>
cudaError_t forward_simt(const GaussianAggregateCudaInput& input, bool hard, void* out, void* lse,
                         CudaStream stream) {
  using Tile = SimtTile<Scalar>;
  const Device device;
  const int classes = static_cast<int>(input.table.classes);
  const int pixels = static_cast<int>(input.height * input.width);
  const int tiles = static_cast<int>(input.batch) * ceil_div(pixels, Tile::kSize);
  const int all = ceil_div(static_cast<int>(input.table.channels), Tile::kSize);

  ForwardSimtPlan plan;
  plan.hard = hard;
  constexpr int kRow = Tile::kSize * static_cast<int>(sizeof(Scalar));
  const int fixed = static_cast<int>(sizeof(Tile));
  const int fitting = (device.block_bytes - fixed) / (kRow * classes);
  plan.resident = fitting > 0;
  // One chunk of weights serves all tiles of channels; several chunks are computed for each tile.
  const int slices = classes > kChunkClasses || !plan.resident
                         ? all
                         : std::max(ceil_div(all, fitting), ceil_div(2 * device.processors, tiles));
  plan.channel_tiles = ceil_div(all, std::min(slices, all));
  const int blocks_y = ceil_div(all, plan.channel_tiles);
  const int rows = plan.resident ? plan.channel_tiles * classes : std::min(classes, kChunkClasses);
  const int bytes = fixed + kRow * rows;
  const int blocks_x = std::min(tiles, std::max(1, device.blocks(bytes, 2) / blocks_y));
  return launch(forward_simt_kernel<Scalar, kChannelsLast>, dim3(blocks_x, blocks_y),
                dim3(kSimtThreads), static_cast<size_t>(bytes), stream, input,
                address_of(input, input.logits_strides), plan, static_cast<Scalar*>(out),
                static_cast<Scalar*>(lse));
}

// ---- backward -----------------------------------------------------------------------------------

struct BackwardArguments {
  const void* lse;
  const void* grad;
  MapStrides grad_strides;
  void* grad_logits;
};

template <typename T, bool kChannelsLast, int kSteps>
cudaError_t launch_backward_mma(const GaussianAggregateCudaInput& input,
                                const BackwardArguments& arguments, CudaStream stream) {
  const Device device;
  const int classes = static_cast<int>(input.table.classes);
  const int channels = static_cast<int>(input.table.channels);
  const int pixels = static_cast<int>(input.height * input.width);
  const MapAddress logits_map = address_of(input, input.logits_strides);
  const MapAddress grad_map = address_of(input, arguments.grad_strides);
  const int tiles = static_cast<int>(input.batch) * ceil_div(pixels, kTilePixels);

  BackwardMmaPlan plan;
  plan.steps = ceil_div(classes, 16);
  plan.z_steps = ceil_div(channels, 16);
  plan.run_logits = longest_run<kChannelsLast>(input.logits, logits_map, classes, pixels);
  plan.run_grad = longest_run<kChannelsLast>(arguments.grad, grad_map, channels, pixels);
  plan.run_out = classes % 4 == 0 ? 4 : classes % 2 == 0 ? 2 : 1;
  plan.vector = plan.run_logits == 4 && pixels % 8 == 0 && logits_map.strides.batch % 8 == 0 &&
                logits_map.strides.channel % 8 == 0 && aligned(input.logits) &&
                aligned(arguments.grad_logits);
  const int fixed = kMmaWarps * kStageElements * static_cast<int>(sizeof(T));
  const int room = device.block_bytes - fixed;
  plan.resident = int64_t(512) * plan.steps * plan.z_steps <= room;
  const int staged_steps = plan.resident ? plan.steps : std::min(plan.steps, kSteps);
  plan.part = plan.resident ? plan.z_steps : std::min(plan.z_steps, room / (512 * staged_steps));
  const int bytes = fixed + 512 * staged_steps * plan.part;
  const int blocks = std::min(tiles, device.blocks(bytes, kSteps <= kFewSteps ? 2 : 1));
  const cudaError_t status = launch(backward_fragments_kernel<T, kChannelsLast>,
                                    dim3(plan.steps, plan.z_steps), dim3(kBackwardFragmentThreads),
                                    0, stream, input.table, static_cast<uint32_t*>(input.scratch));
  if (status != cudaSuccess) return status;
  return launch(backward_mma_kernel<T, kChannelsLast, kSteps>, dim3(blocks), dim3(32 * kMmaWarps),
                static_cast<size_t>(bytes), stream, input, logits_map, grad_map, plan,
                static_cast<const float*>(arguments.lse), static_cast<const T*>(arguments.grad),
                static_cast<T*>(arguments.grad_logits));
}

template <typename T>
cudaError_t backward_mma(const GaussianAggregateCudaInput& input,
                         const BackwardArguments& arguments, CudaStream stream) {
  const auto run = [&](auto few, auto many) {
    return (input.table.classes <= 16 * kFewSteps ? few : many)(input, arguments, stream);
  };
  return input.channels_last ? run(launch_backward_mma<T, true, kFewSteps>,
                                   launch_backward_mma<T, true, kBackwardSteps>)
                             : run(launch_backward_mma<T, false, kFewSteps>,
                                   launch_backward_mma<T, false, kBackwardSteps>);
}

template <typename Scalar, int kClasses>
cudaError_t launch_backward_simt(const GaussianAggregateCudaInput& input,
                                 const BackwardArguments& arguments, CudaStream stream) {
  const Device device;
  const int classes = static_cast<int>(input.table.classes);
  const int pixels = static_cast<int>(input.height * input.width);
  const MapAddress logits_map = address_of(input, input.logits_strides);
  const int tiles = static_cast<int>(input.batch) * ceil_div(pixels, kAdjointPixels);

  constexpr int kSize = static_cast<int>(sizeof(Scalar)), kVector = Vector<Scalar>::kSize;
  BackwardSimtPlan plan;
  const MapStrides& s = logits_map.strides;
  plan.vector = !input.channels_last && logits_map.width == pixels && s.column == 1 &&
                pixels % kAdjointItems == 0 && s.batch % kVector == 0 && s.channel % kVector == 0 &&
                aligned(input.logits) && aligned(arguments.grad_logits);
  const int fixed = static_cast<int>(sizeof(TileOffsets)) + kSize * kSliceChannels * kSliceStride;
  const int slices = ceil_div(static_cast<int>(input.table.channels), kSliceChannels);
  const int64_t whole = int64_t(kSize) * kSliceChannels * slices * classes;
  plan.resident = classes <= 16 * kClasses && fixed + whole <= device.block_bytes;
  const int part = kSize * kSliceChannels * std::min(classes, 16 * kClasses);
  const int bytes = fixed + (plan.resident ? static_cast<int>(whole) : part);
  const int blocks = std::min(tiles, device.blocks(bytes, kClasses <= 2 ? 2 : 1));
  return launch(
      backward_simt_kernel<Scalar, kClasses>, dim3(blocks), dim3(kSimtThreads),
      static_cast<size_t>(bytes), stream, input, logits_map,
      address_of(input, arguments.grad_strides), plan, static_cast<const Scalar*>(arguments.lse),
      static_cast<const Scalar*>(arguments.grad), static_cast<Scalar*>(arguments.grad_logits));
}

template <typename Element>
cudaError_t backward(const GaussianAggregateCudaInput& input, const BackwardArguments& arguments,
                     CudaStream stream) {
  const int64_t classes = input.table.classes;
  if constexpr (sizeof(Element) == 2)
    return backward_mma<Element>(input, arguments, stream);
  else if constexpr (sizeof(Element) == 8)
    return launch_backward_simt<Element, 4>(input, arguments, stream);
  else if (classes <= 32)
    return launch_backward_simt<Element, 2>(input, arguments, stream);
  else if (classes <= 64)
    return launch_backward_simt<Element, 4>(input, arguments, stream);
  else
    return launch_backward_simt<Element, 10>(input, arguments, stream);
}

}  // namespace

const char* gaussian_table_cuda(const GaussianTableCudaInput& input, void* table,
                                CudaStream stream) {
  return launch_message(input.kind == FloatKind::kFloat64
                            ? launch_table<double>(input, table, stream)
                            : launch_table<float>(input, table, stream));
}

size_t gaussian_aggregate_cuda_scratch(const GaussianAggregateCudaInput& input) {
  if (input.kind != FloatKind::kBFloat16 && input.kind != FloatKind::kFloat16) return 0;
  constexpr size_t kBytes = 2;
  return kBytes * 16 * static_cast<size_t>(ceil_div(input.table.classes, 16)) * 32 *
         static_cast<size_t>(ceil_div(input.table.channels, 32));
}

const char* gaussian_aggregate_cuda(const GaussianAggregateCudaInput& input, bool hard, void* out,
                                    void* lse, CudaStream stream) {
  return launch_for(input.kind, [&](auto element) {
    using Element = decltype(element);
    const auto run = [&](auto contiguous, auto channels_last) {
      return (input.channels_last ? channels_last : contiguous)(input, hard, out, lse, stream);
    };
    if constexpr (sizeof(Element) == 2)
      return run(forward_mma<Element, false>, forward_mma<Element, true>);
    else
      return run(forward_simt<Element, false>, forward_simt<Element, true>);
  });
}

const char* gaussian_aggregate_backward_cuda(const GaussianAggregateCudaInput& input,
                                             const void* lse, const void* grad,
                                             const MapStrides& grad_strides, void* grad_logits,
                                             CudaStream stream) {
  const BackwardArguments arguments = {lse, grad, grad_strides, grad_logits};
  return launch_for(input.kind, [&](auto element) {
    return backward<decltype(element)>(input, arguments, stream);
  });
}

}  // namespace mcibi_fast
