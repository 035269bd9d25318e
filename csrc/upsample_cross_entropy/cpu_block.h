// What the forward and the backward share. Both work on a few pixels of one output row at a time,
// whose logits, [pixel][class], they interpolate into the first-level cache.
#pragma once

#include <cmath>
#include <limits>

#include "common/class_rows.h"
#include "common/label_rows.h"
#include "common/simd.h"
#include "upsample_cross_entropy/api.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

// exp(x) for x <= 0; its error is that of rounding x.
MCIBI_SIMD VectorF exp_of(VectorF x) { return exponential2(x * kLog2E<float>); }
MCIBI_SIMD VectorD exp_of(VectorD x) { return exponential(x); }

// log(x) for x >= 1 or NaN, within 2 ulp (the polynomial of Cephes).
MCIBI_SIMD VectorF log_of(VectorF x) {
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)).
  const VectorU32 bits = bit_cast<VectorU32>(x) + (0x3F800000u - 0x3F3504F3u);
  const VectorU32 exponent = (bits >> 23) - 127u;
  const VectorF n = __builtin_convertvector(bit_cast<Vector<int32_t>>(exponent), VectorF);
  const VectorF r = bit_cast<VectorF>((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  VectorF p = VectorF{} + 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const VectorF square = r * r;
  const VectorF small = p * r * square - 2.12194440e-4f * n - 0.5f * square;
  return x == x ? r + small + 0.693359375f * n : x;
}
MCIBI_SIMD VectorD log_of(VectorD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

// The class weights of one call, and what the formula takes from them.
template <typename C>
struct ClassWeights {
  std::vector<C> of_class;  // K rounded up to whole vectors; zero after the K weights
  C sum;                    // over the classes
  C smoothing, smoothing_per_class;

  ClassWeights(const CrossEntropyOptions& options, int64_t classes)
      : of_class(class_stride<C>(classes)),
        sum(0),
        smoothing(static_cast<C>(options.label_smoothing)),
        smoothing_per_class(static_cast<C>(options.label_smoothing / classes)) {
    double total = 0;
    for (int64_t k = 0; k < classes; ++k) {
      of_class[k] = options.weight ? static_cast<const C*>(options.weight)[k] : C(1);
      total += of_class[k];
    }
    sum = static_cast<C>(total);
  }
  C hard(int32_t label) const { return (C(1) - smoothing) * of_class[label]; }
  C soft() const { return smoothing_per_class * sum; }
};

// Room for the logits of a few pixels of one row, [kPixels][stride].
template <typename C>
struct PixelBlock {
  static constexpr int64_t kPixels = kLanes<C>;

  explicit PixelBlock(int64_t classes)
      : classes(classes),
        stride(class_stride<C>(classes)),
        data(kPixels * stride * static_cast<int64_t>(sizeof(C))) {
    for (int64_t i = 0; i < kPixels; ++i) real[i] = stride - kPixels + i < classes ? C(1) : C(0);
  }
  C* pixel(int64_t p) const { return data.template as<C>() + p * stride; }

  int64_t classes, stride;
  Scratch data;
  C real[kPixels];  // for the last vector of classes: 1 for a class, 0 after the K classes
};

// The sum, lane by lane, of f(k), which returns the vector of the classes from k on.
template <typename C, typename F>
MCIBI_SIMD Vector<C> sum_of_vectors(const PixelBlock<C>& block, const F& f) {
  const int64_t last = block.stride - kLanes<C>;
  Vector<C> sum = load(block.real) != C(0) ? f(last) : Vector<C>{};
  for (int64_t k = 0; k < last; k += kLanes<C>) sum += f(k);
  return sum;
}

// Interpolates one pixel between two pixels of a row and stores what f returns for each vector of
// logits. After the K classes the logits are -inf.
template <typename C, typename F>
MCIBI_SIMD void interpolate(const PixelBlock<C>& block, const C* row, const BilinearTap<C>& tap,
                            C* out, const F& f) {
  const C* left = row + tap.index0 * block.stride;
  const C* right = row + tap.index1 * block.stride;
  const C weight0 = tap.weight0, weight1 = tap.weight1;
  const int64_t last = block.stride - kLanes<C>;
  for (int64_t k = 0; k < last; k += kLanes<C>) {
    store(out + k, f(interpolated(weight0, load(left + k), weight1, load(right + k))));
  }
  const Vector<C> logits = interpolated(weight0, load(left + last), weight1, load(right + last));
  const Vector<C> nothing = Vector<C>{} - std::numeric_limits<C>::infinity();
  store(out + last, f(load(block.real) != C(0) ? logits : nothing));
}

template <typename C>
struct Taps {
  std::vector<BilinearTap<C>> y, x;

  Taps(const LogitMap& logits, const LabelMap& labels, bool align_corners)
      : y(bilinear_taps<C>(logits.height, labels.height, align_corners)),
        x(bilinear_taps<C>(logits.width, labels.width, align_corners)) {}
};

// The next pixels of a row that are not ignored, at most one block.
template <typename C>
struct NextPixels {
  static constexpr int64_t kPixels = PixelBlock<C>::kPixels;
  int64_t count = 0;
  int64_t x[kPixels];

  // Zeros for the pixels that are missing from an incomplete block.
  void clear_unused(Vector<C>* rows) const {
    for (int64_t p = count; p < kPixels; ++p) rows[p] = Vector<C>{};
  }

  int64_t fill(int64_t from, const int32_t* labels, int64_t width) {
    for (count = 0; from < width && count < kPixels; ++from) {
      if (labels[from] != kIgnored) x[count++] = from;
    }
    return from;
  }
};

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
