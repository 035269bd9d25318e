// The two matrix products of class_rank_attention, on one packed copy of each operand.
//
// One operand is read as vectors along its pixels, columns [class][kBlockColumns]. The elements of
// the other one, packed in panels, are broadcast. The same panel serves both products, the scores
// (a sum over classes) and the weighted sum (over pixels): keys and values, which are the same
// matrix, are loaded once.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/block_product.h"
#include "common/parallel.h"
#include "common/pixel_tiles.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

// The softmax proceeds by groups of this many rows, whose scores stay in the first-level cache.
constexpr int64_t kGroupPanels = 56 / kBlockRows;
constexpr int64_t kGroupRows = kGroupPanels * kBlockRows;

// Classes per block of the weighted sum: the available size that pads K least.
inline int64_t class_block(int64_t classes) {
#if defined(__AVX512F__)
  constexpr int64_t kSizes[] = {14, 12, 10, 8};
#else
  constexpr int64_t kSizes[] = {6, 5, 4};
#endif
  int64_t best = kSizes[0];
  for (int64_t size : kSizes) {
    if (ceil_div(classes, size) * size < ceil_div(classes, best) * best) best = size;
  }
  return best;
}

// A (B, N, K) operand in float32 (float64 for float64), as [B][group][panel][class][kBlockRows],
// with zeros after the last pixel and the last class.
template <typename C>
class Panels {
 public:
  template <typename S>
  Panels(const S* source, const MapStrides& strides, int64_t batch, int64_t pixels, int64_t classes,
         C factor)
      : groups_(ceil_div(pixels, kGroupRows)),
        block_(class_block(classes)),
        classes_(ceil_div(classes, block_) * block_),
        memory_(batch * groups_ * kGroupPanels * panel_size() * static_cast<int64_t>(sizeof(C))) {
    parallel_for(batch * groups_, 4, [&](int64_t begin, int64_t end) {
      Scratch scratch(classes * kTile * static_cast<int64_t>(sizeof(C)));
      C* tile = scratch.as<C>();
      for (int64_t index = begin; index < end; ++index) {
        const int64_t first = index % groups_ * kGroupRows;
        const int64_t count = pixels - first < kGroupRows ? pixels - first : kGroupRows;
        load_tile(source + index / groups_ * strides.batch, strides, pixels, classes, first, count,
                  tile);
        for (int64_t panel = 0; panel < kGroupPanels; ++panel) {
          pack(tile + panel * kBlockRows, classes, factor,
               memory_.as<C>() + (index * kGroupPanels + panel) * panel_size());
        }
      }
    });
  }

  int64_t groups() const { return groups_; }
  int64_t block() const { return block_; }
  int64_t padded_classes() const { return classes_; }
  int64_t panel_size() const { return classes_ * kBlockRows; }
  // The panels of one group, one after the other.
  const C* group(int64_t image, int64_t index) const {
    return memory_.as<C>() + (image * groups_ + index) * kGroupPanels * panel_size();
  }

 private:
  void pack(const C* tile, int64_t classes, C factor, C* panel) const {
    for (int64_t k = 0; k < classes_; ++k) {
      for (int i = 0; i < kBlockRows; ++i) {
        panel[k * kBlockRows + i] = k < classes ? factor * tile[k * kTile + i] : C(0);
      }
    }
  }

  int64_t groups_, block_, classes_;
  Scratch memory_;
};

// Columns from a tile and back. In the tile itself, whose rows are further apart, they would
// compete for a few sets of the cache.
template <typename C>
void load_columns(const C* tile, int64_t classes, C* columns) {
  for (int64_t k = 0; k < classes; ++k) {
    memcpy(columns + k * kBlockColumns<C>, tile + k * kTile, kBlockColumns<C> * sizeof(C));
  }
}
template <typename C>
void store_columns(const C* columns, int64_t classes, C* tile) {
  for (int64_t k = 0; k < classes; ++k) {
    memcpy(tile + k * kTile, columns + k * kBlockColumns<C>, kBlockColumns<C> * sizeof(C));
  }
}

// scores[row][column] = sum_k panels[row][k] * columns[k][column], for the panels that hold `rows`.
template <typename C>
void score(const Panels<C>& panels, const C* group, int64_t rows, int64_t classes, const C* columns,
           C* scores) {
  for (int64_t row = 0; row < rows; row += kBlockRows) {
    const Block<C> block = multiply(classes, group, kBlockRows, columns, kBlockColumns<C>);
    store_block(block, kBlockRows, kBlockColumns<C>, kBlockColumns<C>,
                scores + row * kBlockColumns<C>);
    group += panels.panel_size();
  }
}

template <int Classes, typename C>
void add_weighted(const Panels<C>& panels, const C* group, int64_t rows, const C* factors,
                  const Vector<C> (&decay)[kBlockVectors], C* sum) {
  for (int64_t k = 0; k < panels.padded_classes(); k += Classes) {
    Vector<C> block[Classes][kBlockVectors] = {};
    const C* f = factors;
    for (int64_t row = 0; row < rows; row += kBlockRows) {
      const C* a = group + row / kBlockRows * panels.panel_size() + k * kBlockRows;
      for (int i = 0; i < kBlockRows; ++i, ++a, f += kBlockColumns<C>) {
        Vector<C> columns[kBlockVectors];
        for (int j = 0; j < kBlockVectors; ++j) columns[j] = load(f + j * kLanes<C>);
#pragma GCC unroll 16
        for (int r = 0; r < Classes; ++r) {
          for (int j = 0; j < kBlockVectors; ++j) block[r][j] += columns[j] * a[r * kBlockRows];
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Classes; ++r) {
      for (int j = 0; j < kBlockVectors; ++j) {
        C* at = sum + (k + r) * kBlockColumns<C> + j * kLanes<C>;
        store(at, load(at) * decay[j] + block[r][j]);
      }
    }
  }
}

// sum[k][column] = decay[column] * sum[k][column] + sum_row panels[row][k] * factors[row][column],
// the sum over the group's rows first, which keeps the rounding errors of float32 down.
template <typename C>
void add_weighted(const Panels<C>& panels, const C* group, int64_t rows, const C* factors,
                  const Vector<C> (&decay)[kBlockVectors], C* sum) {
  switch (panels.block()) {
#if defined(__AVX512F__)
    case 8:
      return add_weighted<8>(panels, group, rows, factors, decay, sum);
    case 10:
      return add_weighted<10>(panels, group, rows, factors, decay, sum);
    case 12:
      return add_weighted<12>(panels, group, rows, factors, decay, sum);
#else
    case 4:
      return add_weighted<4>(panels, group, rows, factors, decay, sum);
    case 5:
      return add_weighted<5>(panels, group, rows, factors, decay, sum);
#endif
    default:
      return add_weighted<kBlockRows>(panels, group, rows, factors, decay, sum);
  }
}

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
