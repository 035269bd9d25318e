// grad_logits = p (g C_dl^T - sum_k p_k (g C_dl^T)_k), p = exp(logits - lse), without tensor cores:
// float32 and float64.
//
// Bytes: B N (Z + 2 K) elements moved once (second reads hit the cache). Operations: 2 K Z per
// pixel, the limit in float32 from about K = 30 on. A block of 16 x 16 threads computes g C_dl^T of
// 128 pixels from slices of g and of the table in shared memory. The values of one pixel are in the
// registers of 16 neighbouring threads.
#pragma once

#include "gaussian_aggregate/cuda_simt_forward.cuh"

namespace mcibi_fast {

inline constexpr int kAdjointPixels = 128;                 // in a block's tile
inline constexpr int kAdjointItems = kAdjointPixels / 16;  // neighbouring pixels of a thread
inline constexpr int kSliceChannels = 32;
inline constexpr int kSliceStride = kAdjointPixels + 4;  // of a row of g; spreads over the banks

struct BackwardSimtPlan {
  bool resident;  // the whole table is staged once, not again with every slice of g
  bool vector;    // logits and grad_logits contiguous, rows of pixels aligned to 16 bytes
};

// The offsets of a tile's pixels in the logits and in g.
struct TileOffsets {
  int64_t logits[kAdjointPixels], grad[kAdjointPixels];
};

// Stages channels z .. z + kSliceChannels - 1 of g for the tile's pixels, zero outside the map.
// Neighbouring threads are neighbouring pixels, or channels if channels_last.
template <typename Scalar>
__device__ void stage_grad(Scalar* to, const Scalar* grad, const TileOffsets& offsets,
                           int64_t stride, int z, int channels, int pixels, bool channels_last) {
  constexpr int kCount = kSliceChannels * kAdjointPixels;
#pragma unroll 4
  for (int item = threadIdx.x; item < kCount; item += kSimtThreads) {
    const int c = channels_last ? item % kSliceChannels : item / kAdjointPixels;
    const int pixel = channels_last ? item / kSliceChannels : item % kAdjointPixels;
    to[c * kSliceStride + pixel] = z + c < channels && pixel < pixels
                                       ? grad[offsets.grad[pixel] + (z + c) * stride]
                                       : Scalar(0);
  }
}

// Stages the table's classes k .. k + classes - 1 and `count` channels from z on, a row per
// channel.
template <bool kMany, typename Scalar>
__device__ __forceinline__ void stage_columns(Scalar* to, const GaussianTableCudaInput& input,
                                              int k, int classes, int z, int count) {
  const auto quad = [=](int item) { return Quad{k + item % classes, z + 4 * (item / classes)}; };
  const auto place = [=](int item, const Scalar(&c)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[(4 * (item / classes) + i) * classes + item % classes] = c[i];
  };
  GaussianTable(input).for_each<kMany, Scalar>(classes * (count / 4), quad, place);
}

// The adjoint of the softmax for a thread's pixels (8 row ..) and classes (k + lane + 16 j).
template <typename Scalar, int kClasses>
class SimtAdjoint {
 public:
  __device__ SimtAdjoint(const GaussianAggregateCudaInput& input, const BackwardSimtPlan& plan,
                         const Scalar* lse, Scalar* out, int batch, int first)
      : plan_(plan), out_(out), logits_(static_cast<const Scalar*>(input.logits)) {
    classes_ = int(input.table.classes);
    pixels_ = int(input.height * input.width);
    stride_ = input.logits_strides.channel;
    out_class_ = input.channels_last ? 1 : pixels_;
    out_pixel_ = input.channels_last ? classes_ : 1;
    first_ = first + kAdjointItems * int(threadIdx.x / 16);
    out_ += int64_t(batch) * classes_ * pixels_ + first_ * out_pixel_;
#pragma unroll
    for (int i = 0; i < kAdjointItems; ++i) {
      lse_[i] = first_ + i < pixels_ ? lse[int64_t(batch) * pixels_ + first_ + i] : Scalar(0);
      sum_[i] = dot_[i] = 0;
    }
  }

  // sum += p and dot += p grad_p, or with `write` grad_logits = p / sum (grad_p - dot / sum). The
  // sum differs from 1 only by the rounding of lse, which grows with the logits.
  __device__ __forceinline__ void apply(const Scalar (&acc)[kAdjointItems][kClasses], int k,
                                        const TileOffsets& offsets, bool write) {
    const int64_t* pixel = offsets.logits + kAdjointItems * (threadIdx.x / 16);
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      const int c = k + threadIdx.x % 16 + 16 * j;
      if (c >= classes_) continue;
      Scalar values[kAdjointItems];
      if (plan_.vector && first_ < pixels_) load_row(logits_ + pixel[0] + c * stride_, values);
#pragma unroll
      for (int i = 0; i < kAdjointItems; ++i) {
        if (first_ + i >= pixels_) continue;
        if (!plan_.vector) values[i] = logits_[pixel[i] + c * stride_];
        const Scalar p = exp(values[i] - lse_[i]);
        if (!write) {
          sum_[i] += p;
          dot_[i] += p * acc[i][j];
        }
        values[i] = p * sum_[i] * (acc[i][j] - dot_[i]);
      }
      if (write) store(values, c);
    }
  }

  // Sums over the 16 threads that share pixels; leaves 1 / sum and dot / sum.
  __device__ __forceinline__ void agree() {
#pragma unroll
    for (int i = 0; i < kAdjointItems; ++i) {
#pragma unroll
      for (int d = 1; d < 16; d *= 2) {
        sum_[i] += __shfl_xor_sync(kFullWarp, sum_[i], d);
        dot_[i] += __shfl_xor_sync(kFullWarp, dot_[i], d);
      }
      sum_[i] = 1 / sum_[i];
      dot_[i] *= sum_[i];
    }
  }

 private:
  __device__ __forceinline__ void store(const Scalar (&values)[kAdjointItems], int c) {
    constexpr int kVector = Vector<Scalar>::kSize;
#pragma unroll
    for (int i = 0; i < kAdjointItems; ++i) {
      if (first_ + i >= pixels_) continue;
      Scalar* to = out_ + c * out_class_ + i * out_pixel_;
      if (!plan_.vector) {
        *to = values[i];
      } else if (i % kVector == 0) {
        Vector<Scalar> v;
#pragma unroll
        for (int n = 0; n < kVector; ++n) v.values[n] = values[i + n];
        *reinterpret_cast<Vector<Scalar>*>(to) = v;
      }
    }
  }

  const BackwardSimtPlan& plan_;
  Scalar* out_;
  const Scalar* logits_;
  int classes_, pixels_, first_;
  int64_t stride_, out_class_, out_pixel_;
  Scalar lse_[kAdjointItems], sum_[kAdjointItems], dot_[kAdjointItems];
};

// A block takes the tiles blockIdx.x + gridDim.x i. Its registers hold 16 kClasses classes. If
// there are more, one sweep over chunks finds the sums and a second one the results.
template <typename Scalar, int kClasses>
__global__ void __launch_bounds__(kSimtThreads, kClasses <= 2 ? 2 : 1)
    backward_simt_kernel(const __grid_constant__ GaussianAggregateCudaInput input,
                         const __grid_constant__ MapAddress logits_map,
                         const __grid_constant__ MapAddress grad_map,
                         const __grid_constant__ BackwardSimtPlan plan, const Scalar* lse,
                         const Scalar* grad, Scalar* grad_logits) {
  MCIBI_DYNAMIC_SHARED(shared);
  TileOffsets& offsets = *reinterpret_cast<TileOffsets*>(shared);
  Scalar* const g = reinterpret_cast<Scalar*>(shared + sizeof(TileOffsets));
  Scalar* const table = g + kSliceChannels * kSliceStride;
  const int lane = threadIdx.x % 16, row = threadIdx.x / 16;
  const int classes = int(input.table.classes), channels = int(input.table.channels);
  const int pixels = int(input.height * input.width), per_image = ceil_div(pixels, kAdjointPixels);
  const int chunks = ceil_div(classes, 16 * kClasses);
  const int slices = ceil_div(channels, kSliceChannels);
  if (plan.resident)
    stage_columns<true>(table, input.table, 0, classes, 0, kSliceChannels * slices);

  for (int tile = blockIdx.x; tile < input.batch * per_image; tile += gridDim.x) {
    const int batch = tile / per_image, first = tile % per_image * kAdjointPixels;
    const int count = min(pixels - first, kAdjointPixels);
    __syncthreads();
    if (int(threadIdx.x) < count) {
      offsets.logits[threadIdx.x] = logits_map.pixel(batch, first + threadIdx.x);
      offsets.grad[threadIdx.x] = grad_map.pixel(batch, first + threadIdx.x);
    }
    SimtAdjoint<Scalar, kClasses> adjoint(input, plan, lse, grad_logits, batch, first);
    for (int visit = 0; visit < (chunks > 1 ? 2 : 1) * chunks; ++visit) {
      const int k = 16 * kClasses * (visit % chunks), chunk = min(classes - k, 16 * kClasses);
      Scalar acc[kAdjointItems][kClasses] = {};
      for (int slice = 0; slice < slices; ++slice) {
        const int z = kSliceChannels * slice;
        __syncthreads();
        stage_grad(g, grad, offsets, grad_map.strides.channel, z, channels, count,
                   grad_map.strides.channel == 1);
        if (!plan.resident) stage_columns<true>(table, input.table, k, chunk, z, kSliceChannels);
        __syncthreads();
        const Scalar* t = table + (plan.resident ? z * classes : 0);
#pragma unroll 2
        for (int c = 0; c < kSliceChannels; ++c) {
          Scalar a[kAdjointItems];
          load_row(g + c * kSliceStride + kAdjointItems * row, a);
#pragma unroll
          for (int j = 0; j < kClasses; ++j) {
            // Threads without a class repeat the last one; the result is not used.
            const Scalar b = t[c * chunk + min(lane + 16 * j, chunk - 1)];
#pragma unroll
            for (int i = 0; i < kAdjointItems; ++i) acc[i][j] += a[i] * b;
          }
        }
      }
      if (visit < chunks) adjoint.apply(acc, k, offsets, false);
      if (visit == chunks - 1) adjoint.agree();
      if (chunks == 1 || visit >= chunks) adjoint.apply(acc, k, offsets, true);
    }
  }
}

}  // namespace mcibi_fast
