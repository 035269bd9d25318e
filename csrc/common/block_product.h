// The register-blocked matrix product of the CPU kernels.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/pixel_tiles.h"
#include "common/simd.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

// The accumulators of the product: kBlockRows broadcast values times kBlockVectors vectors, as many
// as the registers hold.
#if defined(__AVX512F__)
constexpr int kBlockRows = 14, kBlockVectors = 2;
// For results that are written to memory: longer runs of fewer rows at a time.
constexpr int kWideRows = 6, kWideVectors = 4;
#else
constexpr int kBlockRows = 6, kBlockVectors = 2;
constexpr int kWideRows = kBlockRows, kWideVectors = kBlockVectors;
#endif

template <typename C>
constexpr int64_t kBlockColumns = kBlockVectors * kLanes<C>;
template <typename C>
constexpr int64_t kWideColumns = kWideVectors * kLanes<C>;
template <typename C, int kRows = kBlockRows, int kVectors = kBlockVectors>
struct Block {
  Vector<C> v[kRows][kVectors];
};
template <typename C>
using WideBlock = Block<C, kWideRows, kWideVectors>;

// sum_d a[d * a_stride + row] * b[d * b_stride + column]
template <int kRows = kBlockRows, int kVectors = kBlockVectors, typename C>
MCIBI_SIMD Block<C, kRows, kVectors> multiply(int64_t depth, const C* a, int64_t a_stride,
                                              const C* b, int64_t b_stride) {
  Block<C, kRows, kVectors> sum = {};
  for (int64_t d = 0; d < depth; ++d, a += a_stride, b += b_stride) {
    Vector<C> columns[kVectors];
    for (int j = 0; j < kVectors; ++j) columns[j] = load(b + j * kLanes<C>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) sum.v[i][j] += columns[j] * a[i];
    }
  }
  return sum;
}
template <typename C>
MCIBI_SIMD WideBlock<C> multiply_wide(int64_t depth, const C* a, int64_t a_stride, const C* b,
                                      int64_t b_stride) {
  return multiply<kWideRows, kWideVectors>(depth, a, a_stride, b, b_stride);
}

template <typename S, int kRows, int kVectors>
MCIBI_SIMD void store_block(const Block<Compute<S>, kRows, kVectors>& block, int64_t rows,
                            int64_t columns, int64_t stride, S* out) {
  using C = Compute<S>;
  if (columns >= kVectors * kLanes<C>) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      for (int j = 0; j < kVectors; ++j) {
        store(out + i * stride + j * kLanes<C>, block.v[i][j]);
      }
    }
    return;
  }
  C spilled[kRows][kVectors * kLanes<C>];
  memcpy(spilled, &block, sizeof(spilled));
  for (int64_t i = 0; i < rows && i < kRows; ++i) {
    store_row(spilled[i], columns, out + i * stride);
  }
}

template <typename C>
MCIBI_SIMD void add_block(const Block<C>& block, C* tile) {
#pragma GCC unroll 16
  for (int i = 0; i < kBlockRows; ++i) {
    for (int j = 0; j < kBlockVectors; ++j) {
      C* to = tile + i * kTile + j * kLanes<C>;
      store(to, load(to) + block.v[i][j]);
    }
  }
}

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
