// The gradient's product with a table of few classes: dot[k][n] = sum_z table[k][z] grad[z][n].
//
// The register-blocked product (block_product.h) reads the gradient from a tile of its own and pads
// the classes to whole blocks. With few classes that costs more than the product: here the gradient
// is read where it is, and as many classes are computed as there are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/pixel_tiles.h"
#include "common/simd.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

constexpr int64_t kFewClasses = 24;  // measured with AVX-512
constexpr int64_t kTilesInRun = 4;   // tiles whose channels are read in one run
#if defined(__AVX512F__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Calls f(size, k) for blocks of kMost classes, then of half as many, and so on to one.
template <int kMost, typename F>
MCIBI_SIMD void for_class_blocks(int64_t k, int64_t classes, const F& f) {
  for (; k + kMost <= classes; k += kMost) f(std::integral_constant<int, kMost>(), k);
  if constexpr (kMost > 1) for_class_blocks<kMost / 2>(k, classes, f);
}

// ---- a gradient whose pixels are neighbours in memory
// --------------------------------------------

// Adds the products of kDepth channels with kClasses classes. grad: the first of `count` pixels of
// the first of these channels; dot: of the first of these classes, [tile][K][kTile].
template <int kClasses, int kDepth, typename S>
void add_channels(const Compute<S>* table, int64_t channels, const S* grad, int64_t channel_stride,
                  int64_t count, int64_t classes, Compute<S>* dot) {
  using C = Compute<S>;
  Vector<C> factors[kClasses][kDepth];
  for (int c = 0; c < kClasses; ++c) {
    for (int d = 0; d < kDepth; ++d) factors[c][d] = Vector<C>{} + table[c * channels + d];
  }
  for (int64_t n = 0; n < count; n += kLanes<C>) {
    const bool whole = count - n >= kLanes<C>;
    Vector<C> g[kDepth];
    for (int d = 0; d < kDepth; ++d) {
      const S* from = grad + d * channel_stride + n;
      g[d] = whole ? load(from) : load_first(from, count - n);
    }
    C* to = dot + n / kTile * classes * kTile + n % kTile;
    for (int c = 0; c < kClasses; ++c) {
      Vector<C> sum = factors[c][0] * g[0];
      for (int d = 1; d < kDepth; ++d) sum += factors[c][d] * g[d];
      store(to + c * kTile, load(to + c * kTile) + sum);
    }
  }
}

// dot, [tile][K][kTile], of `count` pixels.
template <typename S>
void product_of_planes(const Compute<S>* table, int64_t classes, int64_t channels, const S* grad,
                       int64_t channel_stride, int64_t count, Compute<S>* dot) {
  constexpr int kDepth = kRegisters == 32 ? 8 : 4;
  std::fill(dot, dot + ceil_div(count, kTile) * classes * kTile, Compute<S>(0));
  for (int64_t z = 0; z < channels; z += channels - z < kDepth ? 1 : kDepth) {
    for_class_blocks<2>(0, classes, [&](auto block, int64_t k) {
      constexpr int kClasses = decltype(block)::value;
      auto* add = channels - z < kDepth ? &add_channels<kClasses, 1, S>
                                        : &add_channels<kClasses, kDepth, S>;
      add(table + k * channels + z, channels, grad + z * channel_stride, channel_stride, count,
          classes, dot + k * kTile);
    });
  }
}

// ---- a gradient whose channels are neighbours in memory
// ------------------------------------------

// The dots of two pixels with kClasses classes, to lanes `at` and `at + step` of each class.
template <int kClasses, typename S>
void dots_of_pixels(const Compute<S>* table, int64_t channels, const S* first, const S* second,
                    int64_t step, Compute<S>* dot) {
  using C = Compute<S>;
  Vector<C> sums[kClasses][2] = {};
  for (int64_t z = 0; z < channels; z += kLanes<C>) {
    const int64_t left = channels - z;
    const bool whole = left >= kLanes<C>;
    const Vector<C> g0 = whole ? load(first + z) : load_first(first + z, left);
    const Vector<C> g1 = whole ? load(second + z) : load_first(second + z, left);
    for (int c = 0; c < kClasses; ++c) {
      const C* row = table + c * channels + z;
      const Vector<C> t = whole ? load(row) : load_first(row, left);
      sums[c][0] += t * g0;
      sums[c][1] += t * g1;
    }
  }
  constexpr int kCount = 2 * kClasses;
  for (int i = 0; i < kCount; i += kLanes<C>) {
    Vector<C> rows[kLanes<C>] = {};
    for (int j = 0; j < kLanes<C> && i + j < kCount; ++j) rows[j] = sums[(i + j) / 2][(i + j) % 2];
    const Vector<C> totals = reduce_rows<C>(rows, [](auto a, auto b) { return a + b; });
    for (int j = 0; j < kLanes<C> && i + j < kCount; ++j) {
      dot[(i + j) / 2 * kTile + (i + j) % 2 * step] = totals[j];
    }
  }
}

// dot, [K][kTile], of a tile of `count` pixels, pixel n at grad + offsets[n].
template <typename S>
void product_of_rows(const Compute<S>* table, int64_t classes, int64_t channels, const S* grad,
                     const int64_t* offsets, int64_t count, Compute<S>* dot) {
  constexpr int kMost = kRegisters == 32 ? 8 : 4;
  std::fill(dot, dot + classes * kTile, Compute<S>(0));
  for (int64_t n = 0; n < count; n += 2) {
    const int64_t step = n + 1 < count ? 1 : 0;
    for_class_blocks<kMost>(0, classes, [&](auto block, int64_t k) {
      dots_of_pixels<decltype(block)::value>(table + k * channels, channels, grad + offsets[n],
                                             grad + offsets[n + step], step, dot + k * kTile + n);
    });
  }
}

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
