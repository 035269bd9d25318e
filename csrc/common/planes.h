// Rows of pixels as planes, [class][w], in float32 (float64 for float64): the other order than in
// class_rows.h. One vector has the same class of neighbouring output pixels, so that two classes
// take two vectors and not one padded vector for every pixel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/class_rows.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

// Whether planes are faster than rows of classes (measured with AVX-512): for few classes, and
// where the map is not enlarged and its classes are not neighbours in memory.
inline bool prefers_planes(const LogitMap& logits, int64_t out_width) {
  return logits.classes <= 12 || (out_width <= logits.width && logits.strides.channel != 1);
}

// A vector of every step-th value from p on, the first `count` of them.
template <typename S>
MCIBI_SIMD Vector<Compute<S>> load_strided(const S* p, int64_t step, int64_t count) {
  if (step == 1) return load_up_to(p, count);
  S lanes[kLanes<Compute<S>>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i * step];
  return load(lanes);
}

// Rows interpolated between two rows of the logits.
template <typename S>
class SourcePlanes {
 public:
  using C = Compute<S>;

  explicit SourcePlanes(const LogitMap& logits)
      : logits_(logits),
        stride_(class_stride<C>(logits.width) + 2 * kLanes<C>),  // read by PlaneTaps
        data_(logits.classes * stride_ * static_cast<int64_t>(sizeof(C))) {
    std::fill(data_.template as<C>(), data_.template as<C>() + logits.classes * stride_, C(0));
  }

  int64_t stride() const { return stride_; }

  // [K][stride], valid until the next call.
  const C* between(int64_t image, const BilinearTap<C>& tap) {
    const MapStrides& s = logits_.strides;
    const S* source = static_cast<const S*>(logits_.data) + image * s.batch;
    const S *row0 = source + tap.index0 * s.row, *row1 = source + tap.index1 * s.row;
    C* mixed = data_.template as<C>();
    for (int64_t k = 0; k < logits_.classes; ++k) {
      for (int64_t x = 0; x < logits_.width; x += kLanes<C>) {
        const int64_t at = k * s.channel + x * s.column;
        const int64_t count = std::min(logits_.width - x, kLanes<C>);
        store(mixed + k * stride_ + x,
              interpolated(tap.weight0, load_strided(row0 + at, s.column, count), tap.weight1,
                           load_strided(row1 + at, s.column, count)));
      }
    }
    return mixed;
  }

 private:
  const LogitMap& logits_;
  int64_t stride_;
  Scratch data_;
};

// The interpolation along a row, for one vector of output pixels at a time.
template <typename C>
class PlaneTaps {
 public:
  using Index = decltype(Vector<C>{} < Vector<C>{});  // a vector of integers of the size of C

  explicit PlaneTaps(const std::vector<BilinearTap<C>>& taps) {
    const int64_t width = static_cast<int64_t>(taps.size());
    for (int64_t x = 0; x < width; x += kLanes<C>) {
      Block block = {};
      block.base = taps[x].index0;
      int64_t last = block.base;
      for (int64_t p = 0; p < kLanes<C>; ++p) {
        const BilinearTap<C>& tap = taps[std::min(x + p, width - 1)];
        block.left[p] = tap.index0 - block.base;
        block.right[p] = tap.index1 - block.base;
        block.weight0[p] = tap.weight0;
        block.weight1[p] = tap.weight1;
        last = std::max<int64_t>(last, tap.index1);
      }
      block.vectors = (last - block.base) / kLanes<C> + 1;
      blocks_.push_back(block);
    }
  }

  // The pixels from x on, which is a multiple of the number of lanes; those after the last are
  // copies of it.
  Vector<C> at(const C* plane, int64_t x) const {
    const Block& block = blocks_[x / kLanes<C>];
    const C* from = plane + block.base;
    Vector<C> left, right;
    if (block.vectors == 1) {
      const Vector<C> v = load(from);
      left = pick(v, block.left);
      right = pick(v, block.right);
    } else if (block.vectors == 2) {
      const Vector<C> v0 = load(from), v1 = load(from + kLanes<C>);
      left = pick(v0, v1, block.left);
      right = pick(v0, v1, block.right);
    } else {
      for (int64_t p = 0; p < kLanes<C>; ++p) {
        left[p] = from[block.left[p]];
        right[p] = from[block.right[p]];
      }
    }
    return interpolated(block.weight0, left, block.weight1, right);
  }

 private:
  struct Block {
    Index left, right;  // from base on
    Vector<C> weight0, weight1;
    int64_t base, vectors;  // how many vectors from base on have all that is read
  };

  std::vector<Block> blocks_;
};

// Whether every input belongs to one output at most, as on an axis twice as long as the labels'.
template <typename C>
bool are_disjoint(const std::vector<BilinearTap<C>>& taps) {
  for (size_t i = 1; i < taps.size(); ++i) {
    if (taps[i].index0 <= taps[i - 1].index1) return false;
  }
  return true;
}

// The adjoint of the interpolation along a row, for one vector of input pixels at a time.
template <typename C>
class PlaneAdjoint {
 public:
  PlaneAdjoint(const std::vector<BilinearTap<C>>& taps, int64_t in_width)
      : first_(class_stride<C>(in_width)), copies_(static_cast<int64_t>(taps.size()) == in_width) {
    if (!copies_ && are_disjoint(taps)) {
      pick_pixels(taps);
      return;
    }
    const int64_t width = static_cast<int64_t>(taps.size());
    std::vector<int64_t> end(first_.size());
    for (int64_t p = 0; p < width; ++p) {
      copies_ = copies_ && taps[p].index0 == p && taps[p].weight1 == C(0);
      for (const int64_t x : {taps[p].index0, taps[p].index1}) {
        if (end[x] == 0) first_[x] = p;
        end[x] = p + 1;
        vectors_ = std::max(vectors_, ceil_div(end[x] - first_[x], kLanes<C>));
      }
    }
    weights_.resize(first_.size() * vectors_ * kLanes<C>);
    for (int64_t p = 0; p < width; ++p) {
      weight(taps[p].index0, p) += taps[p].weight0;
      weight(taps[p].index1, p) += taps[p].weight1;
    }
  }

  // How many zeros must follow the W values of a plane: at() reads them.
  int64_t padding() const { return vectors_ * kLanes<C>; }

  // The input pixels from x on, which is a multiple of the number of lanes.
  Vector<C> at(const C* plane, int64_t x) const {
    if (copies_) return load(plane + x);
    if (!picked_.empty()) {
      const Picked& picked = picked_[x / kLanes<C>];
      const Vector<C> values = pick(load(plane + picked.base), picked.pixel);
      return picked.weight != C(0) ? picked.weight * values : Vector<C>{};
    }
    Vector<C> rows[kLanes<C>];
    const C* weights = weights_.data() + x * vectors_ * kLanes<C>;
    for (int64_t i = 0; i < kLanes<C>; ++i) {
      rows[i] = Vector<C>{};
      for (int64_t v = 0; v < vectors_; ++v, weights += kLanes<C>) {
        const Vector<C> weight = load(weights);
        const Vector<C> values = load(plane + first_[x + i] + v * kLanes<C>);
        rows[i] += weight != C(0) ? weight * values : Vector<C>{};  // values may be NaN
      }
    }
    return reduce_rows<C>(rows, [](auto a, auto b) { return a + b; });
  }

 private:
  // The only output pixel that reads an input pixel, from base on, and its weight, which is 0 where
  // there is none.
  struct Picked {
    typename PlaneTaps<C>::Index pixel;
    Vector<C> weight;
    int64_t base;
  };

  void pick_pixels(const std::vector<BilinearTap<C>>& taps) {
    picked_.resize(first_.size() / kLanes<C>, Picked{{}, {}, -1});
    for (int64_t p = 0; p < static_cast<int64_t>(taps.size()); ++p) {
      const BilinearTap<C>& tap = taps[p];
      for (int64_t x = tap.index0; x <= tap.index1; ++x) {
        Picked& picked = picked_[x / kLanes<C>];
        if (picked.base < 0) picked.base = p;
        picked.pixel[x % kLanes<C>] = p - picked.base;
        picked.weight[x % kLanes<C>] = bilinear_weight(tap, x);
      }
    }
    for (Picked& picked : picked_) picked.base = std::max<int64_t>(picked.base, 0);
  }

  C& weight(int64_t x, int64_t p) { return weights_[x * vectors_ * kLanes<C> + p - first_[x]]; }

  std::vector<Picked> picked_;  // for vectors of input pixels, if each has one output pixel at most
  std::vector<int64_t> first_;  // the first output pixel that reads an input pixel
  bool copies_;                 // the row is not resized
  int64_t vectors_ = 1;         // how many vectors from it on have all that do
  std::vector<C> weights_;      // [w][vectors_][kLanes]
};

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
