// Products of a few pixels with a table of class representations as it is, (K, Z): packing it, as
// the products of many pixels do (block_product.h), would take longer.
#pragma once

#include <cstdint>

#include "common/pixel_tiles.h"
#include "common/simd.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

constexpr int64_t kFew = 8;  // pixels of a batch

// out[n][z] = sum_k softmax[k][n] * table[k][z]
template <typename C>
void product_of_few(const C* softmax, const C* table, int64_t classes, int64_t channels,
                    int64_t count, C* out) {
  for (int64_t i = 0; i < count * channels; ++i) out[i] = C(0);
  for (int64_t k = 0; k < classes; ++k) {
    const C* row = table + k * channels;
    for (int64_t n = 0; n < count; ++n) {
      const C factor = softmax[k * kTile + n];
      C* to = out + n * channels;
      for (int64_t z = 0; z < channels; ++z) to[z] += factor * row[z];
    }
  }
}

// dot[k][n] = sum_z table[k][z] * grad[n][z], for as many classes at a time as a vector has lanes.
template <typename C>
void product_of_few_channels(const C* table, const C* grad, int64_t classes, int64_t channels,
                             int64_t count, C* dot) {
  for (int64_t k = 0; k < classes; k += kLanes<C>) {
    const int64_t last = classes - k < kLanes<C> ? classes - k - 1 : kLanes<C> - 1;
    for (int64_t n = 0; n < count; ++n) {
      Vector<C> sums[kLanes<C>] = {};
      for (int64_t z = 0; z < channels; z += kLanes<C>) {
        const int64_t left = channels - z;
        const C *row = table + k * channels + z, *from = grad + n * channels + z;
        const bool whole = left >= kLanes<C>;
        const Vector<C> g = whole ? load(from) : load_first(from, left);
        for (int64_t i = 0; i < kLanes<C>; ++i) {  // after the last class its row once more
          const C* value = row + (i < last ? i : last) * channels;
          sums[i] += g * (whole ? load(value) : load_first(value, left));
        }
      }
      const Vector<C> sum = reduce_rows<C>(sums, [](Vector<C> a, Vector<C> b) { return a + b; });
      for (int64_t i = 0; i <= last; ++i) dot[(k + i) * kTile + n] = sum[i];
    }
  }
}

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
