// The predictions of one output row without cells, which pay off only where several pixels share
// one: from planes (common/planes.h), or class by class from rows of classes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/planes.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

// Where `value` is larger than `best`, they and the numbers of their classes change places. NaN is
// larger than any number; the first of equal values stays.
template <typename C>
MCIBI_SIMD void take_larger(Vector<C> value, Vector<C> number, Vector<C>* best, Vector<C>* winner) {
  const auto better = ~(value <= *best) & (*best == *best);
  *winner = better ? number : *winner;
  *best = better ? value : *best;
}

// Calls emit(x, count, classes) for vectors of pixels.
template <typename C, typename F>
void predict_from_planes(const C* planes, int64_t stride, const PlaneTaps<C>& taps, int64_t classes,
                         int64_t width, const F& emit) {
  for (int64_t x = 0; x < width; x += kLanes<C>) {
    Vector<C> best = taps.at(planes, x), winner = {};
    for (int64_t k = 1; k < classes; ++k) {
      const Vector<C> number = Vector<C>{} + static_cast<C>(k);
      take_larger<C>(taps.at(planes + k * stride, x), number, &best, &winner);
    }
    C out[kLanes<C>];
    store(out, winner);
    emit(x, std::min(width - x, kLanes<C>), out);
  }
}

// The same from a row of classes, [w][stride].
template <typename C, typename F>
void predict_from_classes(const C* row, int64_t classes, const std::vector<BilinearTap<C>>& taps,
                          const F& emit) {
  const int64_t stride = class_stride<C>(classes), last = stride - kLanes<C>;
  Vector<C> lanes;
  for (int64_t i = 0; i < kLanes<C>; ++i) lanes[i] = static_cast<C>(i);
  const auto is_class = lanes + static_cast<C>(last) < static_cast<C>(classes);
  const Vector<C> nothing = Vector<C>{} - std::numeric_limits<C>::infinity();
  for (int64_t x = 0; x < static_cast<int64_t>(taps.size()); ++x) {
    const C *left = row + taps[x].index0 * stride, *right = row + taps[x].index1 * stride;
    const C weight0 = taps[x].weight0, weight1 = taps[x].weight1;
    Vector<C> best = nothing, winner = lanes;
    for (int64_t k = 0; k < stride; k += kLanes<C>) {
      Vector<C> value = weight0 * load(left + k) + weight1 * load(right + k);
      if (k == last) value = is_class ? value : nothing;
      take_larger<C>(value, lanes + static_cast<C>(k), &best, &winner);
    }
    C value = best[0], number = winner[0];
    for (int64_t i = 1; i < kLanes<C>; ++i) {
      const bool nan = best[i] != best[i], held_nan = value != value;
      const bool equal = best[i] == value || (nan && held_nan);
      const bool larger = (nan && !held_nan) || best[i] > value;
      if (larger || (equal && winner[i] < number)) value = best[i], number = winner[i];
    }
    emit(x, int64_t{1}, &number);
  }
}

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
