// The losses of the pixels of one tile in each block, and what the backward needs to form their
// softmax again (common/upsample_tile.cuh).
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
  T *losses, *largest, *sum;

  __device__ T class_weight(int k) const { return weight == nullptr ? T(1) : weight[k]; }
};

// One thread's pixels: their largest logit so far and the sum of exponentials relative to it.
template <typename T, int kRows>
struct ThreadSums {
  T largest[kRows], sum[kRows];

  __device__ ThreadSums() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      largest[r] = kNothing<T>;
      sum[r] = T(0);
    }
  }
};

// Between the two rows, as PyTorch does it: a slope would make NaN of an infinite logit beside a
// finite one. The forward and the backward form a logit by the same roundings, so that a large
// logit less the pixel's largest is the same number in both.
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

// Called by all threads of a block: calls add(corners, first, count) for all classes, in shared
// memory as many at a time as a patch holds.
template <bool kPatch, typename Element, typename Pixels, typename Add>
__device__ __forceinline__ void over_classes(const UpsampleInput<Element>& map, const Tile& tile,
                                             const Pixels& pixels, const Add& add) {
  using T = Compute<Element>;
  if constexpr (kPatch) {
    MCIBI_SHARED(values, T[kPatchValues]);
    const Patch<T> patch(map, tile, values);
    const Corners<T> corners = patch.corners(pixels);
    for (int first = 0; first < map.classes; first += map.patch_classes) {
      const int count = min(map.patch_classes, map.classes - first);
      __syncthreads();  // the previous classes have been used
      patch.fill(map, opaque(tile.b), first, count, T(0));
      __syncthreads();  // these classes are loaded
      add(corners, first, count);
    }
  } else {
    add(corners_in_map(map, tile.b, pixels), 0, map.classes);
  }
}

// The pixel of one thread's row r, in the results.
template <typename Element, typename T, int kRows>
__device__ __forceinline__ int64_t result_at(const ForwardInput<Element>& input, int b,
                                             const ThreadPixels<T, kRows>& pixels, int r) {
  return (static_cast<int64_t>(b) * input.map.y_axis.out_size + pixels.y + r) *
             input.map.x_axis.out_size +
         pixels.x;
}

template <typename Element, typename T, int kRows>
__device__ __forceinline__ void write_losses(const ForwardInput<Element>& input, int b,
                                             const ThreadPixels<T, kRows>& pixels,
                                             const ThreadSums<T, kRows>& sums) {
  LabelReader labels(input.labels);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= pixels.rows) break;
    b = opaque(b);  // or its products would wait in registers
    const int label = labels.read(b, pixels.y + r, pixels.x);
    T loss = T(0), largest = T(0), sum = T(1);
    if (label >= 0) {
      T row0, row1;
      Corners<Element> corners = corners_in_map(input.map, b, pixels);
      corners.skip(label);
      corners.next(pixels.column, row0, row1);
      const T logit = between(row0, row1, pixels.far[r]);
      largest = sums.largest[r];
      sum = sums.sum[r];
      loss =
          (T(1) - input.smoothing) * input.class_weight(label) * (largest - logit + logarithm(sum));
    }
    const int64_t i = result_at(input, b, pixels, r);
    input.losses[i] = loss;
    input.largest[i] = largest;
    input.sum[i] = sum;
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
  over_classes<kPatch>(input.map, tile, pixels, [&](const auto& corners, int, int count) {
    add_classes(corners, count, pixels, sums);
  });
  write_losses(input, opaque(tile.b), pixels, sums);
}

// ---- label smoothing ----------------------------------------------------------------------------

// Adds s/K sum_k w_k (lse - l_k) to the losses. A launch of its own: sum_k w_k (largest - l_k)
// needs the largest logit first, and registers that the losses have not left. (A sum of w_k l_k
// would lose the digits of the differences where logits are large.)
template <typename Element, bool kPatch>
__global__ void __launch_bounds__(kTileThreads, sizeof(Compute<Element>) == 8 ? 1 : 3)
    smoothing_kernel(ForwardInput<Element> input) {
  using T = Compute<Element>;
  constexpr int kRows = kPatch ? kBandRows : 1;
  const Tile tile = tile_at(input.map, blockIdx.x);
  const auto pixels = pixels_of_thread<kRows>(input.map, tile);
  T largest[kRows], below[kRows], weights = T(0);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    below[r] = T(0);
    largest[r] =
        r < pixels.rows ? input.largest[result_at(input, opaque(tile.b), pixels, r)] : T(0);
  }
  over_classes<kPatch>(input.map, tile, pixels, [&](auto corners, int first, int count) {
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      T row0, row1;
      corners.next(pixels.column, row0, row1);
      const T weight = input.class_weight(first + k);
      weights += weight;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        below[r] =
            fused_multiply_add(weight, largest[r] - between(row0, row1, pixels.far[r]), below[r]);
    }
  });
  LabelReader labels(input.labels);  // the bad ones have been counted
  const T spread = input.smoothing / static_cast<T>(input.map.classes);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= pixels.rows) break;
    if (labels.read(opaque(tile.b), pixels.y + r, pixels.x) < 0) continue;
    const int64_t i = result_at(input, opaque(tile.b), pixels, r);
    input.losses[i] += spread * (below[r] + weights * logarithm(input.sum[i]));
  }
}

}  // namespace mcibi_fast
