// Rows of pixels whose classes are neighbours in memory, in float32 (float64 for float64), as the
// bilinear upsampling of the CPU kernels reads them. Interpolating a pixel then takes a few
// operations on whole vectors of classes, with the same weights in all lanes, whatever the scale.
//
// A row is [pixel][stride], where the stride is K rounded up to whole vectors. The values after the
// K classes are zero.
#pragma once

#include <cstdint>
#include <vector>

#include "common/bilinear.h"
#include "common/logit_map.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

template <typename C>
int64_t class_stride(int64_t classes) {
  return ceil_div(classes, kLanes<C>) * kLanes<C>;
}

// ---- reading and writing maps of any strides ----------------------------------------------------

template <typename S>
MCIBI_SIMD Vector<Compute<S>> load_up_to(const S* p, int64_t count) {
  return count == kLanes<Compute<S>> ? load(p) : load_first(p, count);
}
template <typename S>
MCIBI_SIMD void store_up_to(S* p, Vector<Compute<S>> v, int64_t count) {
  if (count == kLanes<Compute<S>>) return store(p, v);
  store_first(p, v, count);
}

// The pixels that an output is between, in ascending order.
template <typename C>
std::vector<int64_t> columns_read(const std::vector<BilinearTap<C>>& taps) {
  std::vector<int64_t> columns;
  for (const BilinearTap<C>& tap : taps) {
    for (const int64_t column : {tap.index0, tap.index1}) {
      if (columns.empty() || columns.back() < column) columns.push_back(column);
    }
  }
  return columns;
}

// Writes the pixels of `columns` and, if their classes are not neighbours in memory, all others.
template <typename S>
void load_class_row(const S* row, const MapStrides& s, int64_t width, int64_t classes,
                    const std::vector<int64_t>& columns, Compute<S>* out) {
  using C = Compute<S>;
  const int64_t stride = class_stride<C>(classes);
  if (s.channel == 1) {
    for (const int64_t x : columns) {
      for (int64_t k = 0; k < classes; k += kLanes<C>) {
        const int64_t left = classes - k < kLanes<C> ? classes - k : kLanes<C>;
        store(out + x * stride + k, load_up_to(row + x * s.column + k, left));
      }
    }
    return;
  }
  for (int64_t k = 0; k < classes; k += kLanes<C>) {
    const int64_t left = classes - k < kLanes<C> ? classes - k : kLanes<C>;
    if (s.column == 1) {
      for (int64_t x = 0; x < width; x += kLanes<C>) {
        const int64_t count = width - x < kLanes<C> ? width - x : kLanes<C>;
        Vector<C> block[kLanes<C>] = {};
        for (int64_t i = 0; i < left; ++i) {
          block[i] = load_up_to(row + (k + i) * s.channel + x, count);
        }
        transpose<C>(block);
        for (int64_t i = 0; i < count; ++i) store(out + (x + i) * stride + k, block[i]);
      }
    } else {
      for (int64_t x = 0; x < width; ++x) {
        S lanes[kLanes<C>] = {};
        for (int64_t i = 0; i < left; ++i) lanes[i] = row[x * s.column + (k + i) * s.channel];
        store(out + x * stride + k, load(lanes));
      }
    }
  }
}

// Writes a row in which either the classes (channels_last) or the pixels are neighbours in memory.
template <typename S>
void store_class_row(const Compute<S>* row, int64_t width, int64_t classes, const MapStrides& s,
                     S* out) {
  using C = Compute<S>;
  const int64_t stride = class_stride<C>(classes);
  for (int64_t k = 0; k < classes; k += kLanes<C>) {
    const int64_t left = classes - k < kLanes<C> ? classes - k : kLanes<C>;
    if (s.channel == 1) {
      for (int64_t x = 0; x < width; ++x) {
        store_up_to(out + x * s.column + k, load(row + x * stride + k), left);
      }
      continue;
    }
    for (int64_t x = 0; x < width; x += kLanes<C>) {
      const int64_t count = width - x < kLanes<C> ? width - x : kLanes<C>;
      Vector<C> block[kLanes<C>] = {};
      for (int64_t i = 0; i < count; ++i) block[i] = load(row + (x + i) * stride + k);
      transpose<C>(block);
      for (int64_t i = 0; i < left; ++i) {
        store_up_to(out + (k + i) * s.channel + x, block[i], count);
      }
    }
  }
}

// The number of rows, of this many interpolated values each, that is worth a thread.
inline int64_t rows_per_thread(int64_t values) { return 1 + (1 << 16) / values; }

// ---- upsampling ---------------------------------------------------------------------------------

template <typename C>
std::vector<BilinearTap<C>> bilinear_taps(int64_t in_size, int64_t out_size, bool align_corners) {
  const BilinearAxis<C> axis = make_bilinear_axis<C>(in_size, out_size, align_corners);
  std::vector<BilinearTap<C>> taps(out_size);
  for (int64_t i = 0; i < out_size; ++i) taps[i] = bilinear_tap(axis, static_cast<int>(i));
  return taps;
}

// Rows of the logits. The last two are kept, because a thread goes down an image and every output
// row is between two rows of the logits.
template <typename S>
class SourceRows {
 public:
  using C = Compute<S>;

  SourceRows(const LogitMap& logits, const std::vector<BilinearTap<C>>& taps)
      : logits_(logits),
        columns_(columns_read(taps)),
        stride_(class_stride<C>(logits.classes)),
        size_(logits.width * stride_),
        data_(3 * size_ * static_cast<int64_t>(sizeof(C))) {}

  // Row y of an image, of which the columns are written that an output is between; valid until two
  // other rows have been requested.
  const C* row(int64_t image, int64_t y) {
    const int64_t id = image * logits_.height + y;
    for (int slot : {0, 1}) {
      if (held_[slot] == id) {
        oldest_ = 1 - slot;
        return at(slot);
      }
    }
    const int slot = oldest_;
    const MapStrides& s = logits_.strides;
    const S* source = static_cast<const S*>(logits_.data) + image * s.batch + y * s.row;
    load_class_row(source, s, logits_.width, logits_.classes, columns_, at(slot));
    held_[slot] = id;
    oldest_ = 1 - slot;
    return at(slot);
  }

  // A row interpolated between two rows of the logits, valid until the next call.
  const C* between(int64_t image, const BilinearTap<C>& tap) {
    const C* row0 = row(image, tap.index0);
    const C* row1 = row(image, tap.index1);
    C* mixed = at(2);
    for (const int64_t x : columns_) {
      for (int64_t i = x * stride_; i < (x + 1) * stride_; i += kLanes<C>) {
        store(mixed + i, interpolated(tap.weight0, load(row0 + i), tap.weight1, load(row1 + i)));
      }
    }
    return mixed;
  }

 private:
  C* at(int slot) const { return data_.template as<C>() + slot * size_; }

  const LogitMap& logits_;
  std::vector<int64_t> columns_;
  int64_t stride_, size_;
  Scratch data_;
  int64_t held_[2] = {-1, -1};
  int oldest_ = 0;
};

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
