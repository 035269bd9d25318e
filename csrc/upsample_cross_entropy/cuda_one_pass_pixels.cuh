// What the lanes of a walk share in the one-pass kernel (cuda_one_pass.cuh): its input, the pixels
// that they work on, and sums over the lanes.
#pragma once

#include "upsample_cross_entropy/cuda_totals.cuh"
#include "upsample_cross_entropy/cuda_walk.cuh"

namespace mcibi_fast {

inline constexpr int kSide = 8;  // pixels of a walk at a time, in both directions
inline constexpr int kHalf = kSide / 2;

struct OnePassInput {
  const void* logits;
  FloatKind kind;
  MapStrides strides;
  int classes;
  BilinearAxis<float> y_axis, x_axis;
  const int16_t* targets;  // (B, H, W): the class, or -1
  const Divisor* divisor;
  const float* weight;  // (K,) or null
  float smoothing;
  TilePlan plan;   // with one group and at least kSide lanes
  float* sums;     // see write_tile_sums
  double* losses;  // of the blocks

  __device__ float class_weight(int k) const { return weight == nullptr ? 1.0f : weight[k]; }
};

// d l_k = scale (e_k - share [k = y] - spread w_k) of the pixels of one column.
struct ColumnScales {
  float scale[kSide], far_scale[kSide], share[kSide], spread[kSide];
};

// At most kSide rows and columns of a walk's pixels, from (y, x) on.
struct PixelBlock {
  int y, x, rows, columns;
};

// What the lanes of a walk share of kSide x kSide pixels, [column][row], or of one column of them.
struct alignas(16) WalkPixels {
  int label[kSide * kSide];     // -1: the pixel does not count
  float hard[kSide * kSide];    // (1 - s) w_y
  float sum[kSide * kSide];     // of exponentials
  float chosen[kSide * kSide];  // the label's logit less the pixel's bound, times log2(e)
  float below[kSide * kSide];   // sum_k w_k (bound - l_k), with smoothing
  float far[kSide];             // weights of the lower row
  float right[kSide];           // weights of the right column
  // Of the pixels of one column, and of the one before it, which some lanes may still be reading.
  ColumnScales columns[2];

  // Called by all lanes, for `columns` columns, of which this walk may have fewer.
  __device__ __forceinline__ void fill(const OnePassInput& input, int lane, int b,
                                       const PixelBlock& block, int columns) {
    const int width = input.x_axis.out_size;
    const int64_t first = (static_cast<int64_t>(b) * input.y_axis.out_size + block.y) * width;
    const int16_t* targets = input.targets + first + block.x;
    for (int i = lane; i < columns * kSide; i += input.plan.lanes) {
      const int row = i % kSide, column = i / kSide;
      int target = -1;
      float weight = 0.0f;
      if (row < block.rows && column < block.columns) {
        target = targets[static_cast<int64_t>(row) * width + column];
        if (target >= 0) weight = (1.0f - input.smoothing) * input.class_weight(target);
      }
      label[i] = target;
      hard[i] = weight;
    }
    if (lane >= kSide) return;
    // Rows and columns that are not there repeat the last one.
    far[lane] = far_weight(input.y_axis, block.y + min(lane, block.rows - 1));
    const int last = min(block.x + block.columns, width) - 1;
    right[lane] = far_weight(input.x_axis, max(min(block.x + lane, last), 0));
  }

  // Of pixel i, with spread = s/K and weights = sum_k w_k.
  template <bool kSmooth>
  __device__ __forceinline__ float loss(int i, float spread, float weights) const {
    if (label[i] < 0) return 0.0f;
    const float log_sum = logf(sum[i]);
    float loss = hard[i] * (log_sum - chosen[i] * kLn2<float>);
    if constexpr (kSmooth) loss += spread * (weights * log_sum + below[i]);
    return loss;
  }
};

// The sums of a column's rows over the lanes of a walk; returns that of row lane % kSide.
__device__ __forceinline__ float sum_over_lanes(float (&values)[kSide], int lane, int lanes) {
#pragma unroll
  for (int half = kHalf; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const float sent = upper ? values[r] : values[r + half];
      const float kept = upper ? values[r + half] : values[r];
      values[r] = kept + __shfl_xor_sync(kFullWarp, sent, half);
    }
  }
  float value = values[0];
#pragma unroll
  for (int mask = kSide; mask < 32; mask *= 2)
    if (mask < lanes) value += __shfl_xor_sync(kFullWarp, value, mask);
  return value;
}

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Maximum {
  __device__ __forceinline__ float operator()(float a, float b) const { return maximum(a, b); }
};

// The same of one value, with the same bits.
template <typename Fold>
__device__ __forceinline__ float over_lanes(float value, int lanes, const Fold& fold) {
  for (int mask = kHalf; mask > 0; mask /= 2)
    value = fold(value, __shfl_xor_sync(kFullWarp, value, mask));
  for (int mask = kSide; mask < lanes; mask *= 2)
    value = fold(value, __shfl_xor_sync(kFullWarp, value, mask));
  return value;
}

}  // namespace mcibi_fast
