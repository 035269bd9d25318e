// The losses of the pixels of one tile in each block, and what the backward needs to form their
// softmax again (common/upsample_tile.cuh).
//
// Exponentials are taken relative to a bound of the pixel's logits. With patches, the bound is the
// largest logit of the four corners between which a thread's pixels lie. It is found first, so that
// the rows between which the pixels are interpolated can be scaled by log2(e) once for all of them,
// and a pixel takes two operations, one exponential and one addition for each class. If the bound
// is too far above the pixels' logits (or not finite, or huge), the thread begins again, with each
// pixel's own largest logit. Without patches, or in float64, classes are taken four at a time; if
// their largest logit exceeds the pixel's largest so far, the sum is rescaled. The label's logit is
// interpolated again at the end, which costs less than a comparison for every class.
#pragma once

#include <limits>
#include <type_traits>

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

// ---- relative to a bound ------------------------------------------------------------------------

// Whether rows are scaled where scales_rows. The only class has the loss 0 without any rounding.
template <typename Element>
__host__ __device__ __forceinline__ bool may_scale(const UpsampleInput<Element>& map) {
  return std::is_same_v<Compute<Element>, float> && map.patch_classes > 0 && map.classes > 1;
}

// Whether the exponents of a pixel are formed from scaled rows. The rounding of bound * log2(e) is
// then in all of them, and cancels from the probabilities; that of a huge bound would overflow.
template <typename T>
__device__ __forceinline__ bool scales_rows(T bound) {
  return bound < T(1 << 20) && bound > T(-(1 << 20));
}

// Finite rows stay finite, as pixels may give them the weight 0; a change this far from a bound
// that scales_rows changes no exponential.
inline constexpr float kLargestRow = 2e38f;

template <typename T>
__device__ __forceinline__ T scaled_row(T row, T scaled_bound) {
  const T most = T(kLargestRow), kept = row > most ? most : row < -most ? -most : row;
  const bool infinite = row - row != T(0);  // or NaN
  return fused_multiply_add(infinite ? row : kept, kLog2E<T>, -scaled_bound);
}

// logit - bound, in the same way in the forward and the backward: of a pixel's label, which may
// have nearly all of its probability, both must have the same bits. scaled_rows: see may_scale.
template <typename T>
__device__ __forceinline__ T relative_logit(bool scaled_rows, T row0, T row1, T far, T bound) {
  const T most = T(kLargestRow);
  if (scaled_rows && scales_rows(bound) && row0 > -most && row0 < most && row1 > -most &&
      row1 < most) {
    const T scaled = bound * kLog2E<T>;
    return between(scaled_row(row0, scaled), scaled_row(row1, scaled), far) * kLn2<T>;
  }
  return between(row0, row1, far) - bound;
}

// exp(logit - bound), likewise.
__device__ __forceinline__ float relative_exponential(bool scaled_rows, float row0, float row1,
                                                      float far, float bound) {
  if (scaled_rows && scales_rows(bound)) {
    const float scaled = bound * kLog2E<float>;
    return exp2_fast(between(scaled_row(row0, scaled), scaled_row(row1, scaled), far));
  }
  return exponential(between(row0, row1, far) - bound);
}
__device__ __forceinline__ double relative_exponential(bool, double row0, double row1, double far,
                                                       double bound) {
  return exponential(between(row0, row1, far) - bound);
}

// One thread's pixels, all relative to the largest logit of their corners.
template <int kRows>
struct BoundedSums {
  float bound = kNothing<float>, sum[kRows] = {};

  // A sum this small may lack terms that were too small for float32.
  __device__ bool serve(int rows) const {
    bool serve = scales_rows(bound);
#pragma unroll
    for (int r = 0; r < kRows; ++r) serve = serve && (r >= rows || sum[r] > 1e-12f);
    return serve;
  }
};

template <int kClasses, int kRows>
__device__ __forceinline__ void add_bounded_unit(Corners<float>& corners, float scaled_bound,
                                                 const ThreadPixels<float, kRows>& pixels,
                                                 BoundedSums<kRows>& sums) {
  float row0[kClasses], row1[kClasses];
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    corners.next(pixels.column, row0[i], row1[i]);
    // Unlike scaled_row: no row is above the bound, and one that becomes -inf gives 0, or NaN to
    // the pixels with which the thread then begins again.
    row0[i] = fused_multiply_add(row0[i], kLog2E<float>, -scaled_bound);
    row1[i] = fused_multiply_add(row1[i], kLog2E<float>, -scaled_bound);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= pixels.rows) break;
#pragma unroll
    for (int i = 0; i < kClasses; ++i)
      sums.sum[r] += exp2_fast(between(row0[i], row1[i], pixels.far[r]));
  }
}

// Adds the next `count` classes.
template <int kRows>
__device__ __forceinline__ void add_bounded(const Corners<float>& corners, int count,
                                            const ThreadPixels<float, kRows>& pixels,
                                            BoundedSums<kRows>& sums) {
  float bound = sums.bound;
  Corners<float> at = corners;
#pragma unroll 4
  for (int k = 0; k < count; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) bound = maximum(bound, *at.corner[i]);
    at.skip(1);
  }
  const float scaled = bound * kLog2E<float>;
  if (bound > sums.bound) {
    const float factor = exp2_fast(sums.bound * kLog2E<float> - scaled);
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums.sum[r] *= factor;
    sums.bound = bound;
  }
  at = corners;
  int k = 0;
#pragma unroll 1
  for (; k + kUnit <= count; k += kUnit) add_bounded_unit<kUnit>(at, scaled, pixels, sums);
#pragma unroll 1
  for (; k < count; ++k) add_bounded_unit<1>(at, scaled, pixels, sums);
}

// The same with each pixel's own largest logit, in two passes over all classes in global memory.
template <typename Element, int kRows>
__device__ ThreadSums<float, kRows> sums_of_pixels(const UpsampleInput<Element>& map, int b,
                                                   const ThreadPixels<float, kRows>& pixels) {
  ThreadSums<float, kRows> sums;
  float row0, row1;
  Corners<Element> corners = corners_in_map(map, b, pixels);
#pragma unroll 1
  for (int k = 0; k < map.classes; ++k) {
    corners.next(pixels.column, row0, row1);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      sums.largest[r] = maximum(sums.largest[r], between(row0, row1, pixels.far[r]));
  }
  corners = corners_in_map(map, b, pixels);
#pragma unroll 1
  for (int k = 0; k < map.classes; ++k) {
    corners.next(pixels.column, row0, row1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Where no logit is above -inf the sum stays 0, or NaN.
      const float bound = sums.largest[r] == kNothing<float> ? 0.0f : sums.largest[r];
      sums.sum[r] += relative_exponential(may_scale(map), row0, row1, pixels.far[r], bound);
    }
  }
  return sums;
}

// ---- relative to the largest logit so far -------------------------------------------------------

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
      largest = sums.largest[r];
      sum = sums.sum[r];
      loss = (T(1) - input.smoothing) * input.class_weight(label) *
             (logarithm(sum) -
              relative_logit(may_scale(input.map), row0, row1, pixels.far[r], largest));
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
  if constexpr (kPatch && std::is_same_v<T, float>) {
    BoundedSums<kRows> bounded;
    if (may_scale(input.map))
      over_classes<kPatch>(input.map, tile, pixels, [&](const auto& corners, int, int count) {
        add_bounded(corners, count, pixels, bounded);
      });
    if (bounded.serve(pixels.rows)) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums.largest[r] = bounded.bound;
        sums.sum[r] = bounded.sum[r];
      }
    } else {
      sums = sums_of_pixels(input.map, opaque(tile.b), pixels);
    }
  } else {
    over_classes<kPatch>(input.map, tile, pixels, [&](const auto& corners, int, int count) {
      add_classes(corners, count, pixels, sums);
    });
  }
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
