// Rows of pixels with their classes side by side, in float32 (float64): what bilinear upsampling
// reads in the CPU kernels. Every interpolated pixel is then a few vector operations on whole
// vectors of classes, with weights that are the same in all lanes, whatever the scale.
//
// A row is [pixel][stride], the stride being K rounded up to whole vectors. What stands behind the
// K classes is zero.
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
constexpr int64_t kVectorLanes = VectorOf<C>::kLanes;

template <typename C>
int64_t class_stride(int64_t classes) {
  return ceil_div(classes, kVectorLanes<C>) * kVectorLanes<C>;
}

// ---- reading and writing maps of any strides ----------------------------------------------------

template <typename S>
MCIBI_SIMD Vector<Compute<S>> load_up_to(const S* p, int64_t count) {
  return count == kVectorLanes<Compute<S>> ? load(p) : load_first(p, count);
}
template <typename S>
MCIBI_SIMD void store_up_to(S* p, Vector<Compute<S>> v, int64_t count) {
  if (count == kVectorLanes<Compute<S>>) return store(p, v);
  store_first(p, v, count);
}

template <typename S>
void load_class_row(const S* row, const MapStrides& s, int64_t width, int64_t classes,
                    Compute<S>* out) {
  using C = Compute<S>;
  constexpr int64_t kLanes = kVectorLanes<C>;
  const int64_t stride = class_stride<C>(classes);
  for (int64_t k = 0; k < classes; k += kLanes) {
    const int64_t left = classes - k < kLanes ? classes - k : kLanes;
    if (s.channel == 1) {
      for (int64_t x = 0; x < width; ++x) {
        store(out + x * stride + k, load_up_to(row + x * s.column + k, left));
      }
    } else if (s.column == 1) {
      for (int64_t x = 0; x < width; x += kLanes) {
        const int64_t count = width - x < kLanes ? width - x : kLanes;
        Vector<C> block[kLanes] = {};
        for (int64_t i = 0; i < left; ++i) {
          block[i] = load_up_to(row + (k + i) * s.channel + x, count);
        }
        transpose<C>(block);
        for (int64_t i = 0; i < count; ++i) store(out + (x + i) * stride + k, block[i]);
      }
    } else {
      for (int64_t x = 0; x < width; ++x) {
        S lanes[kLanes] = {};
        for (int64_t i = 0; i < left; ++i) lanes[i] = row[x * s.column + (k + i) * s.channel];
        store(out + x * stride + k, load(lanes));
      }
    }
  }
}

// Writes a row where either the classes (channels_last) or the pixels lie side by side.
template <typename S>
void store_class_row(const Compute<S>* row, int64_t width, int64_t classes, const MapStrides& s,
                     S* out) {
  using C = Compute<S>;
  constexpr int64_t kLanes = kVectorLanes<C>;
  const int64_t stride = class_stride<C>(classes);
  for (int64_t k = 0; k < classes; k += kLanes) {
    const int64_t left = classes - k < kLanes ? classes - k : kLanes;
    if (s.channel == 1) {
      for (int64_t x = 0; x < width; ++x) {
        store_up_to(out + x * s.column + k, load(row + x * stride + k), left);
      }
      continue;
    }
    for (int64_t x = 0; x < width; x += kLanes) {
      const int64_t count = width - x < kLanes ? width - x : kLanes;
      Vector<C> block[kLanes] = {};
      for (int64_t i = 0; i < count; ++i) block[i] = load(row + (x + i) * stride + k);
      transpose<C>(block);
      for (int64_t i = 0; i < left; ++i) {
        store_up_to(out + (k + i) * s.channel + x, block[i], count);
      }
    }
  }
}

// How many rows, of so many interpolated values each, are worth a thread.
inline int64_t rows_per_thread(int64_t values) { return 1 + (1 << 16) / values; }

// ---- upsampling ---------------------------------------------------------------------------------

template <typename C>
std::vector<BilinearTap<C>> bilinear_taps(int64_t in_size, int64_t out_size, bool align_corners) {
  const BilinearAxis<C> axis =
      make_bilinear_axis<C>(static_cast<int>(in_size), static_cast<int>(out_size), align_corners);
  std::vector<BilinearTap<C>> taps(out_size);
  for (int64_t i = 0; i < out_size; ++i) taps[i] = bilinear_tap(axis, static_cast<int>(i));
  return taps;
}

// Rows of the logits, of which the two last asked for are kept: a thread goes down an image, and
// each output row lies between two of them.
template <typename S>
class SourceRows {
 public:
  using C = Compute<S>;

  explicit SourceRows(const LogitMap& logits)
      : logits_(logits),
        size_(logits.width * class_stride<C>(logits.classes)),
        data_(3 * size_ * static_cast<int64_t>(sizeof(C))) {}

  // Row y of an image, valid until two others were asked for.
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
    load_class_row(source, s, logits_.width, logits_.classes, at(slot));
    held_[slot] = id;
    oldest_ = 1 - slot;
    return at(slot);
  }

  // The row interpolated between two, valid until the next one.
  const C* between(int64_t image, const BilinearTap<C>& tap) {
    const C* row0 = row(image, tap.index0);
    const C* row1 = row(image, tap.index1);
    C* mixed = at(2);
    for (int64_t i = 0; i < size_; i += kVectorLanes<C>) {
      store(mixed + i, tap.weight0 * load(row0 + i) + tap.weight1 * load(row1 + i));
    }
    return mixed;
  }

 private:
  C* at(int slot) const { return data_.template as<C>() + slot * size_; }

  const LogitMap& logits_;
  int64_t size_;
  Scratch data_;
  int64_t held_[2] = {-1, -1};
  int oldest_ = 0;
};

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
