// The losses of one output row whose classes are neighbours (common/class_rows.h).
#pragma once

#include <algorithm>
#include <vector>

#include "common/label_rows.h"
#include "upsample_cross_entropy/cpu_block.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

template <typename C>
class LossRow {
 public:
  LossRow(const ClassWeights<C>& weights, const std::vector<BilinearTap<C>>& taps, int64_t classes)
      : weights_(weights), taps_(taps), block_(classes) {}

  // 0 where a pixel is ignored.
  void run(const C* row, const int32_t* labels, C* losses, C* lse) {
    const int64_t width = static_cast<int64_t>(taps_.size());
    std::fill(losses, losses + width, C(0));
    std::fill(lse, lse + width, C(0));
    NextPixels<C> next;
    for (int64_t x = 0; x < width;) {
      x = next.fill(x, labels, width);
      run_block<false>(row, next, labels, losses, lse);
    }
  }

  // The same for a few pixels. If `kKeep`, block() then holds e_k = exp(l_k - largest), and sums()
  // their sums.
  template <bool kKeep>
  void run_block(const C* row, const NextPixels<C>& next, const int32_t* labels, C* losses,
                 C* lse) {
    interpolate_pixels(row, next);
    if (weights_.smoothing != C(0)) reduce_smoothing(next);
    for (int64_t p = 0; p < next.count; ++p) chosen_[p] = block_.pixel(p)[labels[next.x[p]]];
    reduce_exponentials<kKeep>(next);
    for (int64_t p = 0; p < next.count; ++p) {
      const int64_t i = next.x[p];
      // Computed from differences to the largest logit, which are exact where they matter.
      const C log_sum = log_sum_[p];
      lse[i] = largest_[p] + log_sum;
      losses[i] = weights_.hard(labels[i]) * (largest_[p] - chosen_[p] + log_sum);
      if (weights_.smoothing != C(0)) {
        losses[i] += weights_.smoothing_per_class * below_[p] + weights_.soft() * log_sum;
      }
    }
  }

  const PixelBlock<C>& block() const { return block_; }
  const C* sums() const { return sums_; }

 private:
  static constexpr int64_t kPixels = PixelBlock<C>::kPixels;

  // Computes the logits of the pixels and their largest.
  void interpolate_pixels(const C* row, const NextPixels<C>& next) {
    Vector<C> rows[kPixels];
    next.clear_unused(rows);
    for (int64_t p = 0; p < next.count; ++p) {
      Vector<C> largest = Vector<C>{} - std::numeric_limits<C>::infinity();
      interpolate(block_, row, taps_[next.x[p]], block_.pixel(p), [&](Vector<C> logits) {
        largest = maximum(logits, largest);
        return logits;
      });
      rows[p] = largest;
    }
    store(largest_, reduce_rows<C>(rows, [](auto a, auto b) { return maximum(a, b); }));
  }

  // Computes log sum_k exp(l_k - largest).
  template <bool kKeep>
  void reduce_exponentials(const NextPixels<C>& next) {
    Vector<C> rows[kPixels];
    next.clear_unused(rows);
    for (int64_t p = 0; p < next.count; ++p) {
      C* logits = block_.pixel(p);
      const C largest = largest_[p];
      rows[p] = Vector<C>{};
      for (int64_t k = 0; k < block_.stride; k += kPixels) {
        const Vector<C> e = exp_of(load(logits + k) - largest);
        rows[p] += e;
        if (kKeep) store(logits + k, e);
      }
    }
    const Vector<C> sums = reduce_rows<C>(rows, [](auto a, auto b) { return a + b; });
    store(sums_, sums);
    store(log_sum_, log_of(sums));
  }

  // Computes below_ = sum_k w_k (largest - l_k).
  void reduce_smoothing(const NextPixels<C>& next) {
    const C* weights = weights_.of_class.data();
    Vector<C> rows[kPixels];
    next.clear_unused(rows);
    for (int64_t p = 0; p < next.count; ++p) {
      const C* logits = block_.pixel(p);
      const C largest = largest_[p];
      rows[p] = sum_of_vectors(
          block_, [&](int64_t k) { return load(weights + k) * (largest - load(logits + k)); });
    }
    store(below_, reduce_rows<C>(rows, [](auto a, auto b) { return a + b; }));
  }

  const ClassWeights<C>& weights_;
  const std::vector<BilinearTap<C>>& taps_;
  PixelBlock<C> block_;
  C largest_[kPixels], chosen_[kPixels], sums_[kPixels], log_sum_[kPixels], below_[kPixels];
};

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
