// out = W C_dl (Eq. 12) on tensor cores: bfloat16 and float16.
//
// Bytes: B N (K + Z) elements of 2 bytes, each moved once. Operations: 2 K Z per pixel. A block
// keeps its slice of the table in shared memory in fragment order (one 16-byte load per lane gives
// 16 classes x 16 channels). Each warp keeps the weights of its 32 pixels in registers: after
// loads, shuffles within quads and exp, the words of the logits are operands of the mma. The
// results are divided by the softmax's denominator at the end.
#pragma once

#include <climits>

#include "gaussian_aggregate/cuda_mma.cuh"

namespace mcibi_fast {

struct ForwardMmaPlan {
  int steps;      // ceil(K / 16)
  int groups;     // groups of 32 channels in a block's slice of Z
  int run;        // longest_run of the logits
  bool vector;    // results are stored 16 bytes at a time
  bool resident;  // the slice of the table is staged once, not piece by piece for each tile
  bool hard;
};

// Writes the table's fragments: for each group of 32 channels and step of 16 classes two halves of
// 256 elements, four words for each lane, each of two neighbouring classes. The word of row r and
// column h has
//   channel 32 group + 8 (lane / 8) + 4 half + 2 r + lane / 4 % 2,
//   class 16 step + 4 (lane % 4) + 2 h and the next;
// It is word 2 h + r where the table is the mma's A (contiguous), word 2 r + h where it is B.
// Grid: (steps, groups); each thread has four channels of a class.
inline constexpr int kForwardFragmentThreads = 128;
template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kForwardFragmentThreads)
    forward_fragments_kernel(const __grid_constant__ GaussianTableCudaInput input, T* fragments) {
  const int k = threadIdx.x % 16, h = k / 2 % 2, quad = threadIdx.x / 16;
  float c[4];
  GaussianTable(input).entries(Quad{int(16 * blockIdx.x) + k, int(32 * blockIdx.y) + 4 * quad}, c);
  T* to = fragments + 512 * (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) + 256 * (quad % 2) +
          64 * (quad / 2) + 8 * (k / 4) + k % 2;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    to[32 * (i % 2) + 2 * (kChannelsLast ? 2 * (i / 2) + h : 2 * h + i / 2)] = T(c[i]);
}

// The weights W of a thread's four slots, not yet normalised, 16 kSteps classes at a time.
template <typename T, bool kChannelsLast, int kSteps>
struct Weights {
  uint32_t words[kSteps][4][2];
  float largest[4];  // the largest logit of the thread's classes, or NaN; of all after agree()
  int first[4];      // hard: the first class that has it, so far
  float sum[4];      // of the thread's weights; of all weights after normalise()

  __device__ __forceinline__ Weights() {
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      largest[slot] = -INFINITY;
      first[slot] = INT_MAX;
      sum[slot] = 0;
    }
  }

  __device__ __forceinline__ void fetch(const QuadReader<T, kChannelsLast>& logits, int k) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) logits.fetch(k + 16 * s, Pair<T>::kMinusInfinity, words[s]);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) logits.arrange(words[s]);
  }

  // Calls f(slot, class within the chunk, logit) for the thread's values of `steps` steps.
  template <typename F>
  __device__ __forceinline__ void for_each(int steps, F f) const {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s >= steps) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 v = Pair<T>::unpack(words[s][i / 2][i % 2]);
        const int k = 16 * s + 4 * (threadIdx.x % 4) + 2 * (i % 2);
        f(i / 2, k, v.x);
        f(i / 2, k + 1, v.y);
      }
    }
  }
  // The same, storing what f returns.
  template <typename F>
  __device__ __forceinline__ void update(int steps, F f) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s >= steps) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 v = Pair<T>::unpack(words[s][i / 2][i % 2]);
        const int k = 16 * s + 4 * (threadIdx.x % 4) + 2 * (i % 2);
        const float low = f(i / 2, k, v.x), high = f(i / 2, k + 1, v.y);
        words[s][i / 2][i % 2] = Pair<T>::pack(low, high);
      }
    }
  }

  __device__ __forceinline__ void find_largest(int steps) {
    for_each(steps, [&](int slot, int, float logit) {
      largest[slot] = maximum_or_nan(largest[slot], logit);
    });
  }

  // The largest logit over the four lanes that share the slots.
  __device__ __forceinline__ void agree() {
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2)
        largest[slot] =
            maximum_or_nan(largest[slot], __shfl_xor_sync(kFullWarp, largest[slot], distance));
    }
  }

  // 1 for the first of the largest logits, else 0; NaN is larger than any number. Chunks come in
  // the order of the classes.
  __device__ __forceinline__ void form_hard(int k, int steps) {
    for_each(steps, [&](int slot, int i, float logit) {
      if (logit == largest[slot] || logit != logit) first[slot] = min(first[slot], k + i);
    });
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      sum[slot] = 0.25f;  // in each of four lanes
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2)
        first[slot] = min(first[slot], __shfl_xor_sync(kFullWarp, first[slot], distance));
    }
    update(steps, [&](int slot, int i, float) { return k + i == first[slot] ? 1.0f : 0.0f; });
  }

  __device__ __forceinline__ void form(int steps) {
    float shift[4];  // 0 if all logits are -inf: then the result is 0 / 0, as in torch
#pragma unroll
    for (int slot = 0; slot < 4; ++slot)
      shift[slot] = largest[slot] == -INFINITY ? 0.0f : largest[slot];
    update(steps, [&](int slot, int, float logit) {
      const float weight = exp2_fast((logit - shift[slot]) * kLog2E<float>);
      sum[slot] += weight;
      return weight;
    });
  }

  // Sums over the four lanes; returns the log-sum-exp of slot `pair` (hard: the largest logit).
  __device__ __forceinline__ float normalise() {
    float statistic = 0;
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2)
        sum[slot] += __shfl_xor_sync(kFullWarp, sum[slot], distance);
      if (slot == int(threadIdx.x % 4)) statistic = largest[slot] + logf(sum[slot]);
    }
    return statistic;
  }
};

// acc += the weights' product with 32 channels of the table.
template <typename T, bool kChannelsLast, int kSteps>
__device__ __forceinline__ void multiply(float (&acc)[8][4],
                                         const Weights<T, kChannelsLast, kSteps>& weights,
                                         const T* fragments, int steps) {
  const uint4* from = reinterpret_cast<const uint4*>(fragments) + threadIdx.x % 32;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (s >= steps) break;
    const auto& w = weights.words[s];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 c = from[(2 * s + half) * 32];
      if constexpr (kChannelsLast) {  // rows: pixels; columns: channels
        const uint32_t low[2] = {c.x, c.y}, high[2] = {c.z, c.w};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t a[4] = {w[2 * i][0], w[2 * i + 1][0], w[2 * i][1], w[2 * i + 1][1]};
          mma_m16n8k16<T>(acc[4 * i + 2 * half], a, low);
          mma_m16n8k16<T>(acc[4 * i + 2 * half + 1], a, high);
        }
      } else {  // rows: channels; columns: the pixels of one slot
        const uint32_t a[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
        for (int slot = 0; slot < 4; ++slot) mma_m16n8k16<T>(acc[4 * half + slot], a, w[slot]);
      }
    }
  }
}

// Contiguous: writes 32 channels of 32 pixels. A thread has the eight pixels from 8 pair on of four
// channels. If these are not aligned to 16 bytes, they go through `stage` and are written as rows
// of neighbouring elements.
template <typename T>
__device__ __forceinline__ void store_planes(T* out, const float (&acc)[8][4],
                                             const float (&factor)[8], int z, int channels,
                                             const WarpTile<false>& tile, bool vector, T* stage) {
  const int lane = threadIdx.x % 32, pixel = tile.first + 8 * tile.pair;
  T* const image = out + int64_t(tile.batch) * channels * tile.pixels;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = acc[4 * half + i % 4][2 * r + i / 4] * factor[i];
      const int channel = z + 8 * (tile.group / 2) + 4 * half + 2 * r + tile.group % 2;
      T* to = stage + (8 * r + tile.group) * kPlaneStride + 8 * tile.pair;
      if (vector) to = image + int64_t(channel) * tile.pixels + pixel;
      if (!vector || (channel < channels && tile.holds(pixel)))
        *reinterpret_cast<uint4*>(to) = pack8<T>(v);
    }
    if (vector) continue;
    __syncwarp();
    for (int row = 0; row < 16; ++row) {
      const int channel = z + 8 * (row % 8 / 2) + 4 * half + row / 8 * 2 + row % 2;
      if (channel < channels && tile.holds(tile.first + lane))
        image[int64_t(channel) * tile.pixels + tile.first + lane] =
            stage[row * kPlaneStride + lane];
    }
    __syncwarp();
  }
}

// channels_last: a thread has the eight channels from z + 8 pair on of each slot's pixel.
template <typename T>
__device__ __forceinline__ void store_pixels(T* out, const float (&acc)[8][4],
                                             const float (&factor)[4], int z, int channels,
                                             const WarpTile<true>& tile, bool vector) {
  const int channel = z + 8 * tile.pair;
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      v[i] = acc[4 * (slot / 2) + i / 2][2 * (slot % 2) + i % 2] * factor[slot];
    if (!tile.holds(tile.pixel(slot)) || channel >= channels) continue;
    T* to = out + (int64_t(tile.batch) * tile.pixels + tile.pixel(slot)) * channels + channel;
    if (vector) {
      *reinterpret_cast<uint4*>(to) = pack8<T>(v);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (channel + i < channels) to[i] = T(v[i]);
    }
  }
}

// A block's warps take the tiles blockIdx.x + gridDim.x i and slice blockIdx.y of the channels. If
// registers hold all classes, the weights are computed once per tile; otherwise chunk by chunk, and
// again for every 32 channels.
template <typename T, bool kChannelsLast, int kSteps>
__global__ void __launch_bounds__(32 * kMmaWarps, kSteps <= kFewSteps ? 2 : 1)
    forward_mma_kernel(const __grid_constant__ GaussianAggregateCudaInput input,
                       const __grid_constant__ MapAddress map,
                       const __grid_constant__ ForwardMmaPlan plan, T* out, float* lse) {
  MCIBI_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32;
  T* const stage = reinterpret_cast<T*>(shared) + warp * kStageElements;
  T* const fragments = reinterpret_cast<T*>(shared) + kMmaWarps * kStageElements;
  const int channels = int(input.table.channels), batches = int(input.batch);
  const int pixels = int(input.height * input.width);
  const int first_z = 32 * plan.groups * blockIdx.y;
  const int groups = min(plan.groups, ceil_div(channels - first_z, 32));
  constexpr bool kFew = kSteps <= kFewSteps;  // one chunk, and a table that fits
  const int chunks = kFew ? 1 : ceil_div(plan.steps, kSteps);
  const T* const table =
      static_cast<const T*>(input.scratch) + int64_t(512) * plan.steps * (first_z / 32);
  if (plan.resident) {
    begin_copy(fragments, table, 512 * plan.steps * groups);
    finish_copy();
  }

  const int tiles = batches * ceil_div(pixels, kTilePixels);
  for (int round = blockIdx.x; round < tiles; round += gridDim.x * kMmaWarps) {
    const WarpTile<kChannelsLast> tile(round + gridDim.x * warp, batches, pixels);
    if (plan.resident && tile.empty()) break;  // otherwise the barriers need this warp
    const QuadReader<T, kChannelsLast> logits(input.logits, map, int(input.table.classes), plan.run,
                                              tile, stage);
    Weights<T, kChannelsLast, kSteps> weights;
    float factor[kChannelsLast ? 4 : 8];
    for (int group = -1; group < groups; ++group) {  // -1 only finds the largest logits
      const int z = first_z + 32 * max(group, 0);
      float acc[8][4] = {};
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const int step = kSteps * chunk, steps = min(plan.steps - step, kSteps);
        if (!kFew && !plan.resident && group >= 0) {
          __syncthreads();  // the previous piece has been used
          begin_copy(fragments, table + int64_t(512) * (group * plan.steps + step), 512 * steps);
          finish_copy();
        }
        if (group < 0 || chunks > 1) weights.fetch(logits, 16 * step);
        if (group < 0) {
          weights.find_largest(steps);
          continue;
        }
        if (group == 0 || chunks > 1) {
          if (plan.hard)
            weights.form_hard(16 * step, steps);
          else
            weights.form(steps);
        }
        const int block = plan.resident ? group * plan.steps + step : 0;
        multiply(acc, weights, fragments + 512 * block, steps);
      }
      if (group < 0) {
        weights.agree();
        continue;
      }
      if (group == 0 || chunks > 1) {
        const float statistic = weights.normalise();
        const int pixel = tile.pixel(tile.pair);
        if (z == 0 && tile.holds(pixel)) lse[int64_t(tile.batch) * pixels + pixel] = statistic;
#pragma unroll
        for (int i = 0; i < (kChannelsLast ? 4 : 8); ++i) {
          factor[i] = 1.0f / weights.sum[i % 4];
          if constexpr (!kChannelsLast)
            factor[i] = __shfl_sync(kFullWarp, factor[i], 4 * (2 * tile.pair + i / 4));
        }
        weights.sum[0] = weights.sum[1] = weights.sum[2] = weights.sum[3] = 0;
      }
      if constexpr (kChannelsLast)
        store_pixels<T>(out, acc, factor, z, channels, tile, plan.vector);
      else
        store_planes<T>(out, acc, factor, z, channels, tile, plan.vector, stage);
    }
  }
}

}  // namespace mcibi_fast
