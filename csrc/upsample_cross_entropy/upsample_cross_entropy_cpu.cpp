// CPU kernels of upsample_cross_entropy, one copy per instruction set (see common/cpu_dispatch.h).
//
// Interpolation is separable: a row between two source rows is mixed once per output row, [w][K] in
// the second-level cache, and each of its pixels is then interpolated between two neighbours. What
// the loss needs of a pixel is reduced over its classes at once; ignored pixels cost nothing.
//
// The backward interpolates again, forms the gradient of a few pixels, [pixel][K], and applies the
// adjoint in the same two steps: along the row into [w][K], then onto the two source rows. A unit
// of work is all output rows that lie below one of kUnitRows source rows. Only the first of these
// gets something from the unit before as well; both parts are kept and added at the end, so that
// the bits depend on no thread.
#include <algorithm>
#include <vector>

#include "common/checked_label_rows.h"
#include "common/parallel.h"
#include "upsample_cross_entropy/upsample_cross_entropy.h"
#include "upsample_cross_entropy/upsample_cross_entropy_block.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

template <typename C>
struct Taps {
  std::vector<BilinearTap<C>> y, x;

  Taps(const LogitMap& logits, const LabelMap& labels, bool align_corners)
      : y(bilinear_taps<C>(logits.height, labels.height, align_corners)),
        x(bilinear_taps<C>(logits.width, labels.width, align_corners)) {}
};

// The next pixels of a row that are not ignored, at most a block of them.
template <typename C>
struct NextPixels {
  static constexpr int64_t kPixels = PixelBlock<C>::kPixels;
  int64_t count = 0;
  int64_t x[kPixels];

  template <typename Skip>
  int64_t fill(int64_t from, int64_t width, const Skip& skip) {
    for (count = 0; from < width && count < kPixels; ++from) {
      if (!skip(from)) x[count++] = from;
    }
    return from;
  }
};

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
        // Differences from the largest logit, which are exact where they matter.
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

  // The logits of the pixels, their largest, and log sum_k exp(l_k - largest).
  void reduce(const C* row, const std::vector<BilinearTap<C>>& taps, const NextPixels<C>& next) {
    Vector<C> rows[kPixels] = {};
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

  // below_: sum_k w_k (largest - l_k)
  void reduce_smoothing(const NextPixels<C>& next) {
    const C* weights = weights_.of_class.data();
    Vector<C> rows[kPixels] = {};
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

  // The gradient along one row: [w][K], to be taken away by spread(); false where it is zero.
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

  // Each pixel's gradient up to the factor scale_: e_k - S (t_k / sum of t), with e = exp(l - lse),
  // S = sum e and t the smoothed target. lse is rounded, coarsely where logits are large: dividing
  // by S makes up for it.
  void gradients(const C* row, const NextPixels<C>& next, const int32_t* labels,
                 const C* grad_losses, const C* lse) {
    Vector<C> rows[kPixels] = {};
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

  // The adjoint of the interpolation along the row. Pixels between the same two columns go
  // together.
  void spread_along(const NextPixels<C>& next) {
    C weight0[kPixels], weight1[kPixels];
    for (int64_t first = 0, end; first < next.count; first = end) {
      const BilinearTap<C>& tap = taps_[next.x[first]];
      const bool border = tap.index0 == tap.index1;  // both weights go to one column
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

// Everything that the units of the backward read.
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

  // The output rows whose upper source row is y or one below.
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
      const C* lse = static_cast<const C*>(cotangent.lse) + (b * labels.height + y) * labels.width;
      const BilinearTap<C>& tap = taps.y[y];
      if (!gradient->run(source->between(b, tap), classes.data(), grad_losses.data(), lse)) {
        continue;
      }
      gradient->spread(tap, sums + (tap.index0 - top) * row_size(),
                       sums + (tap.index1 - top) * row_size());
    }
  }
};

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
  // Of each unit the first row and the one below the last, which belongs to the next unit.
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
  switch (logits.kind) {
    case FloatKind::kFloat32:
      return forward<float>(logits, labels, options, losses, lse, bad);
    case FloatKind::kFloat64:
      return forward<double>(logits, labels, options, losses, lse, bad);
    case FloatKind::kBFloat16:
      return forward<BFloat16>(logits, labels, options, losses, lse, bad);
    case FloatKind::kFloat16:
      return forward<Float16>(logits, labels, options, losses, lse, bad);
  }
}

void upsample_cross_entropy_backward_cpu(const CrossEntropyCotangent& cotangent,
                                         const LogitMap& logits, const LabelMap& labels,
                                         const CrossEntropyOptions& options,
                                         const LogitMap& grad_logits, BadLabel* bad) {
  switch (logits.kind) {
    case FloatKind::kFloat32:
      return backward<float>(cotangent, logits, labels, options, grad_logits, bad);
    case FloatKind::kFloat64:
      return backward<double>(cotangent, logits, labels, options, grad_logits, bad);
    case FloatKind::kBFloat16:
      return backward<BFloat16>(cotangent, logits, labels, options, grad_logits, bad);
    case FloatKind::kFloat16:
      return backward<Float16>(cotangent, logits, labels, options, grad_logits, bad);
  }
}

}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
