// CPU kernels of upsample_cross_entropy, one copy per instruction set (see common/cpu_dispatch.h).
//
// Interpolation is separable: each output row first mixes two source rows, [w][K] in the
// second-level cache, and then interpolates each of its pixels between two neighbours. What the
// loss needs of a pixel is reduced over its classes immediately, and ignored pixels are skipped.
#include <algorithm>
#include <vector>

#include "common/checked_label_rows.h"
#include "common/parallel.h"
#include "upsample_cross_entropy/api.h"
#include "upsample_cross_entropy/cpu_backward.h"
#include "upsample_cross_entropy/cpu_block.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

// ---- forward ------------------------------------------------------------------------------------

template <typename C>
class LossRow {
 public:
  LossRow(const ClassWeights<C>& weights, int64_t classes) : weights_(weights), block_(classes) {}

  void run(const C* row, const std::vector<BilinearTap<C>>& taps, const int32_t* labels, C* losses,
           C* lse) {
    const int64_t width = static_cast<int64_t>(taps.size());
    std::fill(losses, losses + width, C(0));
    std::fill(lse, lse + width, C(0));
    NextPixels<C> next;
    for (int64_t x = 0; x < width;) {
      x = next.fill(x, width, [&](int64_t i) { return labels[i] == kIgnored; });
      reduce(row, taps, next);
      if (weights_.smoothing != C(0)) reduce_smoothing(next);
      for (int64_t p = 0; p < next.count; ++p) {
        const int64_t i = next.x[p];
        const int32_t label = labels[i];
        // Computed from differences to the largest logit, which are exact where they matter.
        const C log_sum = log_sum_[p];
        lse[i] = largest_[p] + log_sum;
        losses[i] = weights_.hard(label) * (largest_[p] - block_.pixel(p)[label] + log_sum);
        if (weights_.smoothing != C(0)) {
          losses[i] += weights_.smoothing_per_class * below_[p] + weights_.soft() * log_sum;
        }
      }
    }
  }

 private:
  static constexpr int64_t kPixels = PixelBlock<C>::kPixels;

  // Computes the logits of the pixels, their largest, and log sum_k exp(l_k - largest).
  void reduce(const C* row, const std::vector<BilinearTap<C>>& taps, const NextPixels<C>& next) {
    Vector<C> rows[kPixels];
    next.clear_unused(rows);
    for (int64_t p = 0; p < next.count; ++p) {
      Vector<C> largest = Vector<C>{} - std::numeric_limits<C>::infinity();
      interpolate(block_, row, taps[next.x[p]], block_.pixel(p), [&](Vector<C> logits) {
        largest = maximum(logits, largest);
        return logits;
      });
      rows[p] = largest;
    }
    store(largest_, reduce_rows<C>(rows, [](auto a, auto b) { return maximum(a, b); }));
    for (int64_t p = 0; p < next.count; ++p) {
      const C* logits = block_.pixel(p);
      const C largest = largest_[p];
      rows[p] = Vector<C>{};
      for (int64_t k = 0; k < block_.stride; k += kPixels) {
        rows[p] += exp_of(load(logits + k) - largest);
      }
    }
    store(log_sum_, log_of(reduce_rows<C>(rows, [](auto a, auto b) { return a + b; })));
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
  PixelBlock<C> block_;
  C largest_[kPixels], log_sum_[kPixels], below_[kPixels];
};

template <typename S>
void forward(const LogitMap& logits, const LabelMap& labels, const CrossEntropyOptions& options,
             void* losses, void* lse, BadLabel* bad) {
  using C = Compute<S>;
  const Taps<C> taps(logits, labels, options.align_corners);
  const ClassWeights<C> weights(options, logits.classes);
  CheckedLabelRows rows(labels);
  const int64_t grain = rows_per_thread(labels.width * logits.classes);
  parallel_for(logits.batch * labels.height, grain, [&](int64_t begin, int64_t end) {
    SourceRows<S> source(logits);
    LossRow<C> loss(weights, logits.classes);
    std::vector<int32_t> classes(labels.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / labels.height, y = i % labels.height;
      rows.read(b, y, classes.data());
      const C* mixed = source.between(b, taps.y[y]);
      const int64_t at = i * labels.width;
      loss.run(mixed, taps.x, classes.data(), static_cast<C*>(losses) + at,
               static_cast<C*>(lse) + at);
    }
  });
  *bad = rows.first_bad();
}

// ---- backward -----------------------------------------------------------------------------------

template <typename S>
void backward(const CrossEntropyCotangent& cotangent, const LogitMap& logits,
              const LabelMap& labels, const CrossEntropyOptions& options, const LogitMap& grad,
              BadLabel* bad) {
  using C = Compute<S>;
  const Taps<C> taps(logits, labels, options.align_corners);
  const ClassWeights<C> weights(options, logits.classes);
  CheckedLabelRows label_rows(labels);
  const Backward<S> work = {cotangent, logits, labels, weights, taps, label_rows};
  const int64_t size = work.row_size(), units = work.units();
  const auto write = [&](int64_t b, int64_t y, const C* row) {
    S* image = static_cast<S*>(const_cast<void*>(grad.data)) + b * grad.strides.batch;
    store_class_row(row, grad.width, grad.classes, grad.strides, image + y * grad.strides.row);
  };
  // The first row of each unit and the row after its last, which is the first of the next unit.
  Scratch shared(logits.batch * units * 2 * size * static_cast<int64_t>(sizeof(C)));
  C* edges = shared.as<C>();
  const int64_t work_of_unit = labels.height * labels.width * logits.classes / units + 1;
  parallel_for(logits.batch * units, rows_per_thread(work_of_unit),
               [&](int64_t begin, int64_t end) {
                 SourceRows<S> source(logits);
                 GradientRow<C> gradient(weights, taps.x, logits.classes, logits.width);
                 Scratch scratch((kUnitRows + 1) * size * static_cast<int64_t>(sizeof(C)));
                 C* sums = scratch.as<C>();
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t b = i / units, unit = i % units, top = unit * kUnitRows;
                   work.run_unit(b, unit, &source, &gradient, sums);
                   std::copy(sums, sums + size, edges + 2 * i * size);
                   std::copy(sums + kUnitRows * size, sums + (kUnitRows + 1) * size,
                             edges + (2 * i + 1) * size);
                   for (int64_t y = top + 1; y < std::min(top + kUnitRows, logits.height); ++y) {
                     write(b, y, sums + (y - top) * size);
                   }
                 }
               });
  parallel_for(logits.batch * units, rows_per_thread(size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      C* first = edges + 2 * i * size;
      if (i % units > 0) {
        const C* above = edges + (2 * i - 1) * size;
        for (int64_t j = 0; j < size; ++j) first[j] += above[j];
      }
      write(i / units, i % units * kUnitRows, first);
    }
  });
  *bad = label_rows.first_bad();
}

}  // namespace

void upsample_cross_entropy_cpu(const LogitMap& logits, const LabelMap& labels,
                                const CrossEntropyOptions& options, void* losses, void* lse,
                                BadLabel* bad) {
  with_storage_type(logits.kind, [&](auto s) {
    forward<decltype(s)>(logits, labels, options, losses, lse, bad);
  });
}

void upsample_cross_entropy_backward_cpu(const CrossEntropyCotangent& cotangent,
                                         const LogitMap& logits, const LabelMap& labels,
                                         const CrossEntropyOptions& options,
                                         const LogitMap& grad_logits, BadLabel* bad) {
  with_storage_type(logits.kind, [&](auto s) {
    backward<decltype(s)>(cotangent, logits, labels, options, grad_logits, bad);
  });
}

}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
