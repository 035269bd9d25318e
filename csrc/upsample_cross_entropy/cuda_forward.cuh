// The losses and lse of the pixels of one tile in each block (common/upsample_tile.cuh).
//
// Classes are taken four at a time. If their largest logit exceeds the pixel's largest so far, the
// sum is rescaled; then one exponential per class is added. The label's logit is interpolated again
// at the end, which costs less than a comparison for every class.
#pragma once

#include <limits>

#include "common/upsample_tile.cuh"
#include "upsample_cross_entropy/api.h"

namespace mcibi_fast {

inline constexpr int kUnit = 4;  // classes at a time

// What classes after the last have, and the largest logit of none.
template <typename T>
inline constexpr T kNothing = -std::numeric_limits<T>::infinity();

__device__ __forceinline__ float exponential(float x) { return exp2_fast(x * kLog2E<float>); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

template <typename Element>
struct ForwardInput {
  using T = Compute<Element>;
  UpsampleInput<Element> map;
  LabelMap labels;
  LabelFlag flag;
  const T* weight;  // (K,) or null
  T smoothing;
  T *losses, *lse;

  __device__ T class_weight(int k) const { return weight == nullptr ? T(1) : weight[k]; }
};

// One thread's pixels: their largest logit so far and the sum of exponentials relative to it, and
// sum_k w_k l_k on the two rows of the logits.
template <typename T, int kRows>
struct ThreadSums {
  T largest[kRows], sum[kRows];
  T weighted0 = T(0), weighted1 = T(0), weights = T(0);

  __device__ ThreadSums() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      largest[r] = kNothing<T>;
      sum[r] = T(0);
    }
  }
};

// Between the two rows, as PyTorch does it: a slope would make NaN of an infinite logit beside a
// finite one.
template <typename T>
__device__ __forceinline__ T between(T row0, T row1, T far) {
  return fused_multiply_add(far, row1, (T(1) - far) * row0);
}

// Adds the next kUnit classes, or with kPart the first `count` of them.
template <bool kPart, typename Value, typename T, int kRows>
__device__ __forceinline__ void add_unit(Corners<Value>& corners, int count,
                                         const ThreadPixels<T, kRows>& pixels,
                                         ThreadSums<T, kRows>& sums) {
  T row0[kUnit], row1[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    row0[i] = row1[i] = T(0);
    if (!kPart || i < count) corners.next(pixels.column, row0[i], row1[i]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= pixels.rows) break;
    T logit[kUnit], largest = sums.largest[r];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      logit[i] = between(row0[i], row1[i], pixels.far[r]);
      if (kPart && i >= count) logit[i] = kNothing<T>;
      largest = maximum(largest, logit[i]);
    }
    if (largest > sums.largest[r]) {
      sums.sum[r] *= exponential(sums.largest[r] - largest);
      sums.largest[r] = largest;
    }
    // Before the first logit above -inf the sum stays 0, or NaN.
    const T shift = largest == kNothing<T> ? T(0) : largest;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) sums.sum[r] += exponential(logit[i] - shift);
  }
}

// Adds the next `count` classes.
template <typename Value, typename T, int kRows>
__device__ __forceinline__ void add_classes(Corners<Value> corners, int count,
                                            const ThreadPixels<T, kRows>& pixels,
                                            ThreadSums<T, kRows>& sums) {
  int k = 0;
#pragma unroll 1
  for (; k + kUnit <= count; k += kUnit) add_unit<false>(corners, kUnit, pixels, sums);
  if (k < count) add_unit<true>(corners, count - k, pixels, sums);
}

// For label smoothing: adds w_k l_k for the next `count` classes, from class `first` on.
template <typename Element, typename Value, typename T, int kRows>
__device__ __forceinline__ void add_weighted(const ForwardInput<Element>& input,
                                             Corners<Value> corners, int first, int count,
                                             const ThreadPixels<T, kRows>& pixels,
                                             ThreadSums<T, kRows>& sums) {
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    T row0, row1;
    corners.next(pixels.column, row0, row1);
    const T weight = input.class_weight(first + k);
    sums.weighted0 += weight * row0;
    sums.weighted1 += weight * row1;
    sums.weights += weight;
  }
}

template <typename Element, typename T, int kRows>
__device__ __forceinline__ void write_losses(const ForwardInput<Element>& input, int b,
                                             const ThreadPixels<T, kRows>& pixels,
                                             const ThreadSums<T, kRows>& sums) {
  LabelReader labels(input.labels);
  const T spread = input.smoothing / static_cast<T>(input.map.classes);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= pixels.rows) break;
    const int label = labels.read(b, pixels.y + r, pixels.x);
    T loss = T(0), lse = T(0);
    if (label >= 0) {
      T row0, row1;
      Corners<Element> corners = corners_in_map(input.map, b, pixels);
      corners.skip(label);
      corners.next(pixels.column, row0, row1);
      const T logit = between(row0, row1, pixels.far[r]);
      const T log_sum = logarithm(sums.sum[r]);
      lse = sums.largest[r] + log_sum;
      loss = (T(1) - input.smoothing) * input.class_weight(label) *
             (sums.largest[r] - logit + log_sum);
      if (input.smoothing > T(0)) {
        const T weighted = between(sums.weighted0, sums.weighted1, pixels.far[r]);
        loss += spread * (sums.largest[r] * sums.weights - weighted + sums.weights * log_sum);
      }
    }
    const int64_t i = (static_cast<int64_t>(b) * input.map.y_axis.out_size + pixels.y + r) *
                          input.map.x_axis.out_size +
                      pixels.x;
    input.losses[i] = loss;
    input.lse[i] = lse;
  }
  labels.report(input.flag);
}

// Grid: one block for each tile.
template <typename Element, bool kPatch>
__global__ void __launch_bounds__(kTileThreads, sizeof(Compute<Element>) == 8 ? 1 : 3)
    cross_entropy_kernel(ForwardInput<Element> input) {
  using T = Compute<Element>;
  constexpr int kRows = kPatch ? kBandRows : 1;
  const Tile tile = tile_at(input.map, blockIdx.x);
  const auto pixels = pixels_of_thread<kRows>(input.map, tile);
  ThreadSums<T, kRows> sums;
  if constexpr (kPatch) {
    MCIBI_SHARED(values, T[kPatchValues]);
    const Patch<T> patch(input.map, tile, values);
    const Corners<T> corners = patch.corners(pixels);
    for (int first = 0; first < input.map.classes; first += input.map.patch_classes) {
      const int count = min(input.map.patch_classes, input.map.classes - first);
      __syncthreads();  // the previous classes have been used
      patch.fill(input.map, opaque(tile.b), first, count, T(0));
      __syncthreads();  // these classes are loaded
      add_classes(corners, count, pixels, sums);
      if (input.smoothing > T(0)) add_weighted(input, corners, first, count, pixels, sums);
    }
  } else {
    const Corners<Element> corners = corners_in_map(input.map, tile.b, pixels);
    add_classes(corners, input.map.classes, pixels, sums);
    if (input.smoothing > T(0)) add_weighted(input, corners, 0, input.map.classes, pixels, sums);
  }
  write_losses(input, opaque(tile.b), pixels, sums);
}

}  // namespace mcibi_fast
