// grad_logits = p (g C_dl^T - sum_k p_k (g C_dl^T)_k), p = exp(logits - lse), on tensor cores:
// bfloat16 and float16.
//
// Bytes: B N (Z + 2 K) elements of 2 bytes, each moved once (the second read of the logits hits the
// cache). Operations: 2 K Z per pixel. The table is in shared memory in fragment order, the words
// of g go from memory to the mma without rearrangement, and g C_dl^T of a warp's 32 pixels stays in
// the accumulators until the adjoint of the softmax is done.
#pragma once

#include "gaussian_aggregate/cuda_mma.cuh"

namespace mcibi_fast {

struct BackwardMmaPlan {
  int steps;       // ceil(K / 16)
  int z_steps;     // ceil(Z / 16)
  int part;        // z steps staged at a time; all if the table is resident
  int run_grad;    // longest_run of g
  int run_logits;  // longest_run of the logits
  int run_out;     // longest_run of grad_logits
  bool vector;     // contiguous: logits and grad_logits are moved 16 bytes at a time
  bool resident;   // the whole table is staged once
};

// Writes the table's fragments: for each step of 16 classes and z step of 16 channels 256 elements,
// four words for each lane, each of two neighbouring channels. The word of row r and column h has
//   class 16 step + 4 (lane / 8) + 2 r + lane / 4 % 2,
//   channel 16 z_step + 4 (lane % 4) + 2 h and the next;
// It is word 2 h + r where the table is the mma's A (contiguous), word 2 r + h where it is B.
// Grid: (steps, z steps); each thread has four channels of a class.
inline constexpr int kBackwardFragmentThreads = 64;
template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kBackwardFragmentThreads)
    backward_fragments_kernel(const __grid_constant__ GaussianTableCudaInput input,
                              uint32_t* fragments) {
  const int k = threadIdx.x % 16, r = k / 2 % 2, quad = threadIdx.x / 16;
  float c[4];
  GaussianTable(input).entries(Quad{int(16 * blockIdx.x) + k, int(16 * blockIdx.y) + 4 * quad}, c);
  uint32_t* to = fragments + 128 * (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) +
                 4 * (4 * (2 * (k / 4) + k % 2) + quad);
#pragma unroll
  for (int h = 0; h < 2; ++h)
    to[kChannelsLast ? 2 * r + h : 2 * h + r] = Pair<T>::pack(c[2 * h], c[2 * h + 1]);
}

// acc (16 classes x 32 pixels each) += the table's classes times 16 channels of g.
template <typename T, bool kChannelsLast, int kSteps>
__device__ __forceinline__ void multiply(float (&acc)[kSteps][4][4], const uint32_t (&g)[4][2],
                                         const T* fragments, int stride, int steps) {
  const uint4* from = reinterpret_cast<const uint4*>(fragments) + threadIdx.x % 32;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (s >= steps) break;
    const uint4 c = from[s * stride * 32];
    if constexpr (kChannelsLast) {  // rows: pixels; columns: classes
      const uint32_t low[2] = {c.x, c.y}, high[2] = {c.z, c.w};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t a[4] = {g[2 * i][0], g[2 * i + 1][0], g[2 * i][1], g[2 * i + 1][1]};
        mma_m16n8k16<T>(acc[s][2 * i], a, low);
        mma_m16n8k16<T>(acc[s][2 * i + 1], a, high);
      }
    } else {  // rows: classes; columns: the pixels of one slot
      const uint32_t a[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
      for (int slot = 0; slot < 4; ++slot) mma_m16n8k16<T>(acc[s][slot], a, g[slot]);
    }
  }
}

// The adjoint of the softmax on a warp's accumulators, 16 classes at a time. Of these a thread has
//   contiguous     classes 4 (group / 2) + 2 r + group % 2 (r = 0, 1), pixels 8 pair .. 8 pair + 7
//   channels_last  classes 4 pair .. 4 pair + 3, the pixels of its slots
// as eight words of two neighbours, in memory order.
template <typename T, bool kChannelsLast>
class Adjoint {
 public:
  __device__ __forceinline__ Adjoint(const QuadReader<T, kChannelsLast>& logits,
                                     const WarpTile<kChannelsLast>& tile,
                                     const BackwardMmaPlan& plan, const float* lse, T* out,
                                     int classes, T* stage)
      : logits_(logits), tile_(tile), plan_(plan), out_(out), classes_(classes), stage_(stage) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int pixel = kChannelsLast ? tile.pixel(i) : tile.first + 8 * tile.pair + i;
      lse_[i] = tile.holds(pixel) ? lse[int64_t(tile.batch) * tile.pixels + pixel] : 0.0f;
      dot_[i] = 0;
    }
  }

  // dot += p grad_p, or with `write` grad_logits = p (grad_p - dot), for `steps` steps from `step`
  // on.
  template <int kSteps>
  __device__ __forceinline__ void apply(const float (&acc)[kSteps][4][4], int step, int steps,
                                        bool write) {
    uint32_t next[4][2];
    fetch(step, next);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s >= steps) break;
      uint32_t words[4][2];
      memcpy(words, next, sizeof(words));
      if (s + 1 < steps) fetch(step + s + 1, next);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 logit = Pair<T>::unpack(words[j / 2][j % 2]);
        const float x = update(logit.x, acc[s], j, 0, write);
        const float y = update(logit.y, acc[s], j, 1, write);
        words[j / 2][j % 2] = Pair<T>::pack(x, y);
      }
      if (write) store(step + s, words);
    }
  }

  // Sums the dot products over the lanes that share pixels.
  __device__ __forceinline__ void agree() {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
#pragma unroll
      for (int distance = kChannelsLast ? 1 : 4; distance < (kChannelsLast ? 4 : 32); distance *= 2)
        dot_[i] += __shfl_xor_sync(kFullWarp, dot_[i], distance);
    }
  }

 private:
  static constexpr int kPixels = kChannelsLast ? 4 : 8;

  __device__ __forceinline__ float update(float logit, const float (&acc)[4][4], int j, int i,
                                          bool write) {
    const int pixel = kChannelsLast ? j / 2 : 2 * (j % 4) + i;
    const float grad_p = kChannelsLast ? acc[2 * (pixel / 2) + j % 2][2 * (pixel % 2) + i]
                                       : acc[pixel % 4][2 * (j / 4) + pixel / 4];
    const float p = exp2_fast((logit - lse_[pixel]) * kLog2E<float>);
    if (!write) dot_[pixel] += p * grad_p;
    return p * (grad_p - dot_[pixel]);
  }
  __device__ __forceinline__ int row_class(int row) const {  // row 8 r + group of 16
    return 4 * (row % 8 / 2) + row / 8 * 2 + row % 2;
  }

  __device__ __forceinline__ void fetch(int step, uint32_t (&words)[4][2]) const {
    if constexpr (kChannelsLast) {
      logits_.template fetch<2>(16 * step, Pair<T>::kMinusInfinity, words);
      return;
    }
    if (!plan_.vector) {
      logits_.template fill_stage<2>(16 * step, Pair<T>::kMinusInfinity);
      __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int k = row_class(8 * r + tile_.group);
      const T* from = stage_ + k * kPlaneStride + 8 * tile_.pair;
      uint4 v = make_uint4(Pair<T>::kMinusInfinity, Pair<T>::kMinusInfinity,
                           Pair<T>::kMinusInfinity, Pair<T>::kMinusInfinity);
      bool inside = true;
      if (plan_.vector) {
        inside = 16 * step + k < classes_ && tile_.holds(tile_.first + 8 * tile_.pair);
        from = logits_.plane(16 * step + k) + 8 * tile_.pair;
      }
      if (inside) v = *reinterpret_cast<const uint4*>(from);
      memcpy(words[2 * r], &v, sizeof(v));
    }
    if (!plan_.vector) __syncwarp();
  }

  __device__ __forceinline__ void store(int step, const uint32_t (&words)[4][2]) const {
    if constexpr (kChannelsLast)
      store_pixels(step, words);
    else
      store_planes(step, words);
  }
  __device__ __forceinline__ void store_pixels(int step, const uint32_t (&words)[4][2]) const {
    const int k = 16 * step + 4 * tile_.pair;
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      const int pixel = tile_.pixel(slot);
      if (!tile_.holds(pixel)) continue;
      T* to = out_ + (int64_t(tile_.batch) * tile_.pixels + pixel) * classes_ + k;
      if (plan_.run_out == 4) {
        if (k < classes_)
          *reinterpret_cast<uint2*>(to) = make_uint2(words[slot][0], words[slot][1]);
        continue;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        T pair[2];
        memcpy(pair, &words[slot][h], sizeof(pair));
        if (plan_.run_out == 2 && k + 2 * h < classes_) {
          *reinterpret_cast<uint32_t*>(to + 2 * h) = words[slot][h];
        } else {
          if (k + 2 * h < classes_) to[2 * h] = pair[0];
          if (k + 2 * h + 1 < classes_) to[2 * h + 1] = pair[1];
        }
      }
    }
  }
  __device__ __forceinline__ void store_planes(int step, const uint32_t (&words)[4][2]) const {
    const int lane = threadIdx.x % 32;
    T* const planes =
        out_ + (int64_t(tile_.batch) * classes_ + 16 * step) * tile_.pixels + tile_.first;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int k = row_class(8 * r + tile_.group);
      T* to = stage_ + k * kPlaneStride + 8 * tile_.pair;
      bool inside = true;
      if (plan_.vector) {
        inside = 16 * step + k < classes_ && tile_.holds(tile_.first + 8 * tile_.pair);
        to = planes + int64_t(k) * tile_.pixels + 8 * tile_.pair;
      }
      const uint4 v =
          make_uint4(words[2 * r][0], words[2 * r][1], words[2 * r + 1][0], words[2 * r + 1][1]);
      if (inside) *reinterpret_cast<uint4*>(to) = v;
    }
    if (plan_.vector) return;
    __syncwarp();
    for (int k = 0; k < 16; ++k)
      if (16 * step + k < classes_ && tile_.holds(tile_.first + lane))
        planes[int64_t(k) * tile_.pixels + lane] = stage_[k * kPlaneStride + lane];
    __syncwarp();
  }

  const QuadReader<T, kChannelsLast>& logits_;
  const WarpTile<kChannelsLast>& tile_;
  const BackwardMmaPlan& plan_;
  T* const out_;
  const int classes_;
  T* const stage_;
  float lse_[kPixels], dot_[kPixels];
};

// A block takes the tiles blockIdx.x + gridDim.x i. If the accumulators hold all classes, one sweep
// is enough; otherwise there is one over chunks of classes for the sums and a second for the
// results.
template <typename T, bool kChannelsLast, int kSteps>
__global__ void __launch_bounds__(32 * kMmaWarps, kSteps <= kFewSteps ? 2 : 1)
    backward_mma_kernel(const __grid_constant__ GaussianAggregateCudaInput input,
                        const __grid_constant__ MapAddress logits_map,
                        const __grid_constant__ MapAddress grad_map,
                        const __grid_constant__ BackwardMmaPlan plan, const float* lse,
                        const T* grad, T* grad_logits) {
  constexpr int kAhead = kSteps <= kFewSteps ? 3 : 2;  // steps of g in flight
  constexpr int kInFlight = kChannelsLast ? 4 : 8;     // elements, if they are loaded one by one
  MCIBI_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32;
  T* const stage = reinterpret_cast<T*>(shared) + warp * kStageElements;
  T* const fragments = reinterpret_cast<T*>(shared) + kMmaWarps * kStageElements;
  const int classes = int(input.table.classes), channels = int(input.table.channels);
  const int batches = int(input.batch), pixels = int(input.height * input.width);
  const int chunks = kSteps <= kFewSteps ? 1 : ceil_div(plan.steps, kSteps);
  const T* const table = static_cast<const T*>(input.scratch);
  if (plan.resident) {
    begin_copy(fragments, table, 256 * plan.steps * plan.z_steps);
    finish_copy();
  }

  const int tiles = batches * ceil_div(pixels, kTilePixels);
  for (int round = blockIdx.x; round < tiles; round += gridDim.x * kMmaWarps) {
    const WarpTile<kChannelsLast> tile(round + gridDim.x * warp, batches, pixels);
    if (plan.resident && tile.empty()) break;  // otherwise the barriers need this warp
    const QuadReader<T, kChannelsLast> logits(input.logits, logits_map, classes, plan.run_logits,
                                              tile, stage);
    const QuadReader<T, kChannelsLast> g(grad, grad_map, channels, plan.run_grad, tile, stage);
    Adjoint<T, kChannelsLast> adjoint(logits, tile, plan, lse, grad_logits, classes, stage);
    for (int visit = 0; visit < (chunks > 1 ? 2 : 1) * chunks; ++visit) {
      const int step = kSteps * (visit % chunks), steps = min(plan.steps - step, kSteps);
      float acc[kSteps][4][4] = {};
      for (int first = 0; first < plan.z_steps; first += plan.part) {
        const int count = min(plan.part, plan.z_steps - first);
        if (!plan.resident) {
          __syncthreads();  // the previous piece has been used
          for (int s = 0; s < steps; ++s)
            begin_copy(fragments + 256 * s * count,
                       table + int64_t(256) * ((step + s) * plan.z_steps + first), 256 * count);
          finish_copy();
        }
        const T* part = fragments + (plan.resident ? 256 * step * plan.z_steps : 0);
        uint32_t words[kAhead][4][2];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) g.template fetch<kInFlight>(16 * (first + i), 0, words[i]);
        for (int z = 0; z < count; z += kAhead) {
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            if (z + i >= count) break;
            g.arrange(words[i]);
            multiply<T, kChannelsLast, kSteps>(acc, words[i], part + 256 * (z + i), count, steps);
            if (z + i + kAhead < count)
              g.template fetch<kInFlight>(16 * (first + z + i + kAhead), 0, words[i]);
          }
        }
      }
      // Sums first, then results: both in this visit if there is one chunk, else in two sweeps.
      const int last = chunks == 1 || visit >= chunks;
#pragma unroll 1
      for (int write = visit >= chunks; write <= last; ++write) {
        adjoint.apply(acc, opaque(step), steps, write);
        if (!write && visit == chunks - 1) adjoint.agree();
      }
    }
  }
}

}  // namespace mcibi_fast
