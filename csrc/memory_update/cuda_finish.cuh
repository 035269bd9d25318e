// The sums of all slices, and for memory_update what they make of the memory (Eqs. 8, 9 and 6).
#pragma once

#include "memory_update/cuda_common.cuh"

namespace mcibi_fast {

struct MemoryRows {
  const void* old;  // (K, 2); null: only sums are wanted
  void* next;       // (K, 2) contiguous
  bool wide;        // float64
  int64_t stride_k, stride_column;
  double momentum;
  bool unbiased;
  int64_t* kept_rows;  // see MemoryUpdate

  __device__ double load(int k, int column) const {
    const int64_t i = k * stride_k + column * stride_column;
    return wide ? static_cast<const double*>(old)[i] : static_cast<const float*>(old)[i];
  }
  __device__ void store(int k, int column, double value) const {
    if (wide)
      static_cast<double*>(next)[2 * k + column] = value;
    else
      static_cast<float*>(next)[2 * k + column] = static_cast<float>(value);
  }
  // Whether the value is finite once it is stored.
  __device__ bool holds(double value) const {
    return fabs(wide ? value : static_cast<double>(static_cast<float>(value))) < INFINITY;
  }
  // Eq. 6.
  __device__ double moved(int k, int column, double statistic) const {
    return (1.0 - momentum) * load(k, column) + momentum * statistic;
  }
};

// The block's sum, in every thread.
__device__ inline double block_sum(double value) {
  MCIBI_SHARED(warp_sums, double[kWarps]);
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  __syncthreads();  // the previous sum has been read
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[warp];
  return total;
}

// The slices in which a class has weight, in order, and its pixels in all of them.
struct ClassSlices {
  int slices[kMaxSlices];
  int touched;
  int64_t count;
};

template <typename T>
__device__ void find_slices(const PartialSums<T>& partial, int k, int classes, ClassSlices& found) {
  const int lane = static_cast<int>(threadIdx.x);  // of the first warp
  int64_t count = 0;
  int touched = 0;
  for (int first = 0; first < partial.slices; first += 32) {
    const int slice = first + lane;
    const int64_t here =
        slice < partial.slices ? partial.counts[static_cast<int64_t>(slice) * classes + k] : -1;
    const unsigned lanes = __ballot_sync(kFullWarp, here >= 0);
    if (here >= 0) {
      found.slices[touched + __popc(lanes & ((1u << lane) - 1))] = slice;
      count += here;
    }
    touched += __popc(lanes);
  }
  for (int offset = 16; offset > 0; offset /= 2) count += __shfl_xor_sync(kFullWarp, count, offset);
  if (lane == 0) {
    found.touched = touched;
    found.count = count;
  }
}

// Grid: one block for each class.
template <typename T>
__global__ void __launch_bounds__(kUpdateThreads)
    finish_kernel(PartialSums<T> partial, int channels, T* sums, int64_t* counts,
                  MemoryRows memory) {
  MCIBI_SHARED(found, ClassSlices);
  const int k = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int classes = static_cast<int>(gridDim.x);
  if (thread < 32) find_slices(partial, k, classes, found);
  __syncthreads();
  double channel_sum = 0.0;
  for (int z = thread; z < channels; z += kUpdateThreads) {
    T total = T(0);
#pragma unroll 8
    for (int i = 0; i < found.touched; ++i) {
      const int64_t row = static_cast<int64_t>(found.slices[i]) * classes + k;
      total += partial.sums[row * channels + z];
    }
    sums[static_cast<int64_t>(k) * channels + z] = total;
    channel_sum += static_cast<double>(total);
  }
  if (counts != nullptr && thread == 0) counts[k] = found.count;
  if (memory.old == nullptr) return;
  if (found.count == 0) {
    if (thread < 2) memory.store(k, thread, memory.load(k, thread));
    return;
  }
  const double scale = 1.0 / static_cast<double>(found.count);    // Eq. 8
  const double mean = block_sum(channel_sum) * scale / channels;  // Eq. 9
  double squares = 0.0;
  for (int z = thread; z < channels; z += kUpdateThreads) {
    const double x = static_cast<double>(sums[static_cast<int64_t>(k) * channels + z]) * scale;
    squares += (x - mean) * (x - mean);
  }
  const double deviation = sqrt(block_sum(squares) / (channels - (memory.unbiased ? 1 : 0)));
  if (thread >= 2) return;
  const double row[2] = {memory.moved(k, 0, mean), memory.moved(k, 1, deviation)};
  // An overflow in one step must not stay in the memory.
  const bool finite = memory.holds(row[0]) && memory.holds(row[1]);
  memory.store(k, thread, finite ? row[thread] : memory.load(k, thread));
  if (!finite && thread == 0 && memory.kept_rows != nullptr)
    atomicAdd(reinterpret_cast<unsigned long long*>(memory.kept_rows), 1ULL);
}

}  // namespace mcibi_fast
