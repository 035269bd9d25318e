// The backward interpolates the logits again, computes the gradient of a few pixels, [pixel][K],
// and applies the adjoint of the interpolation in two steps: along the row into [w][K], then to the
// two source rows. A unit of work is kUnitRows source rows with all output rows between them and
// the next ones. The first source row of a unit also gets a part from the unit before it. Both
// parts are kept and added at the end, so that the bits do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "common/checked_label_rows.h"
#include "upsample_cross_entropy/cpu_block.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

constexpr int64_t kUnitRows = 4;

template <typename C>
class GradientRow {
 public:
  GradientRow(const ClassWeights<C>& weights, const std::vector<BilinearTap<C>>& taps,
              int64_t classes, int64_t in_width)
      : weights_(weights),
        taps_(taps),
        block_(classes),
        columns_size_((in_width + 1) * block_.stride),
        scratch_(columns_size_ * static_cast<int64_t>(sizeof(C))),
        columns_(scratch_.as<C>()),
        in_width_(in_width) {
    std::fill(columns_, columns_ + columns_size_, C(0));
  }

  // Adds the gradient along one row, [w][K], which spread() then moves on. False if it is zero.
  bool run(const C* row, const int32_t* labels, const C* grad_losses, const C* lse) {
    const int64_t width = static_cast<int64_t>(taps_.size());
    NextPixels<C> next;
    bool any = false;
    for (int64_t x = 0; x < width;) {
      x = next.fill(x, width,
                    [&](int64_t i) { return labels[i] == kIgnored || grad_losses[i] == C(0); });
      if (next.count == 0) continue;
      any = true;
      gradients(row, next, labels, grad_losses, lse);
      spread_along(next);
    }
    return any;
  }

  // Adds the row's gradient to two source rows and clears it.
  void spread(const BilinearTap<C>& tap, C* row0, C* row1) {
    const int64_t size = in_width_ * block_.stride;
    for (int64_t i = 0; i < size; i += kPixels) {
      const Vector<C> g = load(columns_ + i);
      store(row0 + i, load(row0 + i) + tap.weight0 * g);
      store(row1 + i, load(row1 + i) + tap.weight1 * g);
      store(columns_ + i, Vector<C>{});
    }
  }

 private:
  static constexpr int64_t kPixels = PixelBlock<C>::kPixels;

  // The gradient of each pixel without the factor scale_: e_k - S (t_k / sum of t), with
  // e = exp(l - lse), S = sum e and t the smoothed target. Dividing by S corrects for the rounding
  // of lse, which is coarse where logits are large.
  void gradients(const C* row, const NextPixels<C>& next, const int32_t* labels,
                 const C* grad_losses, const C* lse) {
    Vector<C> rows[kPixels];
    next.clear_unused(rows);
    for (int64_t p = 0; p < next.count; ++p) {
      const C shift = lse[next.x[p]];
      Vector<C> sum = {};
      interpolate(block_, row, taps_[next.x[p]], block_.pixel(p), [&](Vector<C> logits) {
        const Vector<C> e = exp_of(logits - shift);
        sum += e;
        return e;
      });
      rows[p] = sum;
    }
    C sums[kPixels];
    store(sums, reduce_rows<C>(rows, [](auto a, auto b) { return a + b; }));
    for (int64_t p = 0; p < next.count; ++p) {
      const int64_t x = next.x[p];
      const C hard = weights_.hard(labels[x]), target = hard + weights_.soft();
      C* pixel = block_.pixel(p);
      if (weights_.smoothing == C(0)) {
        pixel[labels[x]] -= sums[p];
      } else if (target != C(0)) {
        const C share = sums[p] / target, soft = share * weights_.smoothing_per_class;
        for (int64_t k = 0; k < block_.stride; k += kPixels) {
          store(pixel + k, load(pixel + k) - soft * load(&weights_.of_class[k]));
        }
        pixel[labels[x]] -= share * hard;
      }
      scale_[p] = grad_losses[x] * target / sums[p];
    }
  }

  // The adjoint of the interpolation along the row. Pixels between the same two columns are added
  // together.
  void spread_along(const NextPixels<C>& next) {
    C weight0[kPixels], weight1[kPixels];
    for (int64_t first = 0, end; first < next.count; first = end) {
      const BilinearTap<C>& tap = taps_[next.x[first]];
      const bool border = tap.index0 == tap.index1;  // both weights are for one column
      for (end = first; end < next.count; ++end) {
        const BilinearTap<C>& t = taps_[next.x[end]];
        if (t.index0 != tap.index0) break;
        weight0[end] = scale_[end] * (border ? t.weight0 + t.weight1 : t.weight0);
        weight1[end] = border ? C(0) : scale_[end] * t.weight1;
      }
      C* column0 = columns_ + tap.index0 * block_.stride;
      C* column1 = columns_ + (border ? in_width_ : tap.index1) * block_.stride;
      for (int64_t k = 0; k < block_.stride; k += kPixels) {
        Vector<C> sum0 = load(column0 + k), sum1 = load(column1 + k);
        for (int64_t p = first; p < end; ++p) {
          const Vector<C> g = load(block_.pixel(p) + k);
          sum0 += weight0[p] * g;
          sum1 += weight1[p] * g;
        }
        store(column0 + k, sum0);
        store(column1 + k, sum1);
      }
    }
  }

  const ClassWeights<C>& weights_;
  const std::vector<BilinearTap<C>>& taps_;
  PixelBlock<C> block_;
  int64_t columns_size_;
  Scratch scratch_;
  C* columns_;  // [w + 1][K]: one more for the weight 0 at the border
  int64_t in_width_;
  C scale_[kPixels];
};

// What all units of the backward read.
template <typename S>
struct Backward {
  using C = Compute<S>;
  const CrossEntropyCotangent& cotangent;
  const LogitMap& logits;
  const LabelMap& labels;
  const ClassWeights<C>& weights;
  const Taps<C>& taps;
  CheckedLabelRows& label_rows;

  int64_t row_size() const { return logits.width * class_stride<C>(logits.classes); }
  int64_t units() const { return ceil_div(logits.height, kUnitRows); }

  // The first output row whose upper source row is y or below it.
  int64_t first_from(int64_t y) const {
    const auto above = [](const BilinearTap<C>& tap, int64_t row) { return tap.index0 < row; };
    return std::lower_bound(taps.y.begin(), taps.y.end(), y, above) - taps.y.begin();
  }

  void read_cotangent(int64_t b, int64_t y, C* grad_losses) const {
    const C* row = static_cast<const C*>(cotangent.grad_losses) + b * cotangent.stride_b +
                   y * cotangent.stride_y;
    for (int64_t x = 0; x < labels.width; ++x) grad_losses[x] = row[x * cotangent.stride_x];
  }

  // The gradient of source rows [unit * kUnitRows, + kUnitRows] of an image from the output rows
  // between them, into sums [kUnitRows + 1][w][K].
  void run_unit(int64_t b, int64_t unit, SourceRows<S>* source, GradientRow<C>* gradient,
                C* sums) const {
    const int64_t top = unit * kUnitRows;
    std::fill(sums, sums + (kUnitRows + 1) * row_size(), C(0));
    std::vector<int32_t> classes(labels.width);
    std::vector<C> grad_losses(labels.width);
    for (int64_t y = first_from(top), end = first_from(top + kUnitRows); y < end; ++y) {
      label_rows.read(b, y, classes.data());
      read_cotangent(b, y, grad_losses.data());
      const C* lse =
          static_cast<const C*>(cotangent.statistic) + (b * labels.height + y) * labels.width;
      const BilinearTap<C>& tap = taps.y[y];
      if (!gradient->run(source->between(b, tap), classes.data(), grad_losses.data(), lse)) {
        continue;
      }
      gradient->spread(tap, sums + (tap.index0 - top) * row_size(),
                       sums + (tap.index1 - top) * row_size());
    }
  }
};

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
