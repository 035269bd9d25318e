// Bilinear interpolation (the operator U), one axis at a time and exactly as in torch's interpolate
// (aten's area_pixel_compute_source_index): the two inputs of each output, and for the adjoint the
// outputs that read an input.
//
// T is the type in which aten computes: double for float64, float for every other dtype.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace mcibi_fast {

// An output is weight0 * in[index0] + weight1 * in[index1]. The weights sum to one; at the border
// both indices are the same.
template <typename T>
struct BilinearTap {
  int index0;
  int index1;
  T weight0;
  T weight1;
};

// Half-open range of output positions.
struct AxisRange {
  int begin;
  int end;
};

template <typename T>
struct BilinearAxis {
  int in_size;   // low resolution: h or w
  int out_size;  // labels: H or W
  bool align_corners;
  T scale;
};

template <typename T>
MCIBI_HOST_DEVICE BilinearAxis<T> make_bilinear_axis(int64_t inputs, int64_t outputs,
                                                     bool align_corners) {
  const int in_size = static_cast<int>(inputs), out_size = static_cast<int>(outputs);
  T scale = T(0);
  if (!align_corners) {
    scale = static_cast<T>(in_size) / static_cast<T>(out_size);
  } else if (out_size > 1) {
    scale = static_cast<T>(in_size - 1) / static_cast<T>(out_size - 1);
  }
  return {in_size, out_size, align_corners, scale};
}

// Rounded once on every backend, so that all of them give the same bits. aten's CUDA and vectorised
// CPU kernels contract the same expression.
MCIBI_HOST_DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
MCIBI_HOST_DEVICE double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

// The input coordinate of output i; never negative, but possibly above in_size - 1.
template <typename T>
MCIBI_HOST_DEVICE T bilinear_source(const BilinearAxis<T>& axis, int i) {
  if (axis.align_corners) return axis.scale * static_cast<T>(i);
  const T source = fused_multiply_add(axis.scale, static_cast<T>(i) + T(0.5), T(-0.5));
  return source > T(0) ? source : T(0);
}

template <typename T>
MCIBI_HOST_DEVICE BilinearTap<T> bilinear_tap(const BilinearAxis<T>& axis, int i) {
  if (axis.in_size == axis.out_size) return {i, i, T(1), T(0)};  // as aten, which copies
  const T source = bilinear_source(axis, i);
  const int last = axis.in_size - 1;
  int index0 = static_cast<int>(source);  // source >= 0: truncation is floor
  if (index0 > last) index0 = last;
  T weight1 = source - static_cast<T>(index0);
  if (weight1 > T(1)) weight1 = T(1);
  return {index0, index0 < last ? index0 + 1 : last, T(1) - weight1, weight1};
}

// U[i, j] on this axis: the weight of input j in output i.
template <typename T>
MCIBI_HOST_DEVICE T bilinear_weight(const BilinearTap<T>& tap, int j) {
  return (tap.index0 == j ? tap.weight0 : T(0)) + (tap.index1 == j ? tap.weight1 : T(0));
}

// The first output whose index0 is at least j. The outputs from there to the one for j + 1 read the
// same two inputs.
template <typename T>
MCIBI_HOST_DEVICE int bilinear_first_output(const BilinearAxis<T>& axis, int j) {
  if (j <= 0) return 0;
  if (j >= axis.in_size) return axis.out_size;
  if (axis.in_size == axis.out_size) return j;
  if (!(axis.scale > T(0))) return axis.out_size;
  const T shift = axis.align_corners ? T(0) : T(0.5);
  const T guess = (static_cast<T>(j) + shift) / axis.scale - shift;
  int i = guess < static_cast<T>(axis.out_size) ? static_cast<int>(guess) : axis.out_size;
  while (i > 0 && bilinear_tap(axis, i - 1).index0 >= j) --i;
  while (i < axis.out_size && bilinear_tap(axis, i).index0 < j) ++i;
  return i;
}

// A range that contains every output i with U[i, j] != 0; at its ends the weight may be zero.
template <typename T>
MCIBI_HOST_DEVICE AxisRange bilinear_support(const BilinearAxis<T>& axis, int j) {
  if (axis.in_size == axis.out_size) return {j, j + 1};
  const double scale = static_cast<double>(axis.scale);
  if (scale <= 0.0) return {0, axis.out_size};
  // These are the outputs for which source(i) = scale * (i + shift) - shift is in (j - 1, j + 1).
  // One more at each end covers the rounding of source. Outputs clamped at a border read the first
  // or the last input.
  const double shift = axis.align_corners ? 0.0 : 0.5;
  const double first = (j - 1 + shift) / scale - shift;
  const double last = (j + 1 + shift) / scale - shift;
  int begin = j == 0 || first < 1.0 ? 0 : static_cast<int>(first) - 1;
  int end = j == axis.in_size - 1 ? axis.out_size : static_cast<int>(last) + 2;
  if (begin > axis.out_size) begin = axis.out_size;
  if (end > axis.out_size) end = axis.out_size;
  return {begin, end};
}

}  // namespace mcibi_fast
