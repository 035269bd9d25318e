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
#include "upsample_cross_entropy/cpu_gradient.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

// ---- forward ------------------------------------------------------------------------------------

// Calls done(i, classes, losses, lse) for every row i of all images, where losses and lse are the
// memory that rows_of(i) gives for them.
template <typename S, typename RowsOf, typename Done>
void forward(const LogitMap& logits, const LabelMap& labels, const CrossEntropyOptions& options,
             BadLabel* bad, const RowsOf& rows_of, const Done& done) {
  using C = Compute<S>;
  const Taps<C> taps(logits, labels, options.align_corners);
  const ClassWeights<C> weights(options, logits.classes);
  CheckedLabelRows rows(labels);
  const int64_t grain = rows_per_thread(labels.width * logits.classes);
  const auto run_rows = [&](int64_t begin, int64_t end, auto& source, const auto& run_row) {
    std::vector<int32_t> classes(labels.width);
    std::vector<C> own(2 * labels.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / labels.height, y = i % labels.height;
      rows.read(b, y, classes.data());
      C *losses = own.data(), *lse = own.data() + labels.width;
      rows_of(i, &losses, &lse);
      run_row(source.between(b, taps.y[y]), classes.data(), losses, lse);
      done(i, classes.data(), losses);
    }
  };
  const bool planes = prefers_planes(logits, labels.width);
  parallel_for(logits.batch * labels.height, grain, [&](int64_t begin, int64_t end) {
    if (planes) {
      SourcePlanes<S> source(logits);
      PlanarLossRow<C> loss(weights, taps.x, logits.classes, source.stride());
      run_rows(begin, end, source, [&](const C* row, const int32_t* classes, C* losses, C* lse) {
        loss.run(row, classes, losses, lse);
      });
    } else {
      SourceRows<S> source(logits, taps.x);
      LossRow<C> loss(weights, taps.x, logits.classes);
      run_rows(begin, end, source, [&](const C* row, const int32_t* classes, C* losses, C* lse) {
        loss.run(row, classes, losses, lse);
      });
    }
  });
  *bad = rows.first_bad();
}

template <typename S>
void forward_to(const LogitMap& logits, const LabelMap& labels, const CrossEntropyOptions& options,
                void* all_losses, void* all_lse, BadLabel* bad) {
  using C = Compute<S>;
  forward<S>(
      logits, labels, options, bad,
      [&](int64_t i, C** losses, C** lse) {
        *losses = static_cast<C*>(all_losses) + i * labels.width;
        *lse = static_cast<C*>(all_lse) + i * labels.width;
      },
      [](int64_t, const int32_t*, const C*) {});
}

// What the reduced loss needs of one output row.
template <typename C>
struct RowTotal {
  C loss = 0, weight = 0;
  int64_t valid = 0;

  void count(const int32_t* classes, int64_t width, const C* weights) {
    for (int64_t x = 0; x < width; ++x) valid += classes[x] != kIgnored;
    if (weights == nullptr) return;
    for (int64_t x = 0; x < width; ++x) {
      if (classes[x] != kIgnored) weight += weights[classes[x]];
    }
  }

  void add(const C* losses, int64_t width) {
    Vector<C> sum = {};
    const int64_t whole = width / kLanes<C> * kLanes<C>;
    for (int64_t x = 0; x < whole; x += kLanes<C>) sum += load(losses + x);
    for (int64_t lane = 0; lane < kLanes<C>; ++lane) loss += sum[lane];
    for (int64_t x = whole; x < width; ++x) loss += losses[x];
  }
};

template <typename C>
double divisor_of(const std::vector<RowTotal<C>>& totals, bool weighted, bool mean) {
  double weights = 0;
  int64_t valid = 0;
  for (const RowTotal<C>& total : totals) weights += total.weight, valid += total.valid;
  if (!mean || valid == 0) return 1;
  if (!weighted) return static_cast<double>(valid);
  return weights == 0 ? std::numeric_limits<double>::quiet_NaN() : weights;
}

template <typename C>
void write_loss(const std::vector<RowTotal<C>>& totals, double divisor, void* loss) {
  double sum = 0;
  for (const RowTotal<C>& total : totals) sum += total.loss;
  *static_cast<C*>(loss) = static_cast<C>(sum / divisor);
}

template <typename S>
void forward_reduced(const LogitMap& logits, const LabelMap& labels,
                     const CrossEntropyOptions& options, bool mean, void* loss, BadLabel* bad) {
  using C = Compute<S>;
  const C* weight = static_cast<const C*>(options.weight);
  std::vector<RowTotal<C>> totals(logits.batch * labels.height);
  forward<S>(
      logits, labels, options, bad, [](int64_t, C**, C**) {},
      [&](int64_t i, const int32_t* classes, const C* losses) {
        totals[i].count(classes, labels.width, weight);
        totals[i].add(losses, labels.width);
      });
  write_loss(totals, divisor_of(totals, weight != nullptr, mean), loss);
}

// ---- gradient -----------------------------------------------------------------------------------

// The losses and gradients of all images, by rows of type Row.
template <typename T, typename Row, typename Read, typename Done>
void gradients_by(const LogitMap& logits, const ClassWeights<typename Row::C>& weights,
                  const Taps<typename Row::C>& taps, const LogitMap& grad, const Read& read,
                  const Done& done) {
  auto* run = are_disjoint(taps.y) ? &gradients_in_rows<T, Row, Read, Done>
                                   : &gradients_in_units<T, Row, Read, Done>;
  run(logits, weights, taps, grad, read, done);
}

// The same by the rows that are faster for these logits; T: the type of the gradient.
template <typename S, typename T, typename Read, typename Done>
void gradients(const LogitMap& logits, const LabelMap& labels, const CrossEntropyOptions& options,
               const LogitMap& grad, const Read& read, const Done& done) {
  using C = Compute<S>;
  const Taps<C> taps(logits, labels, options.align_corners);
  const ClassWeights<C> weights(options, logits.classes);
  if (prefers_planes(logits, labels.width)) {
    gradients_by<T, PlanarGradientRow<S>>(logits, weights, taps, grad, read, done);
  } else {
    gradients_by<T, GradientRow<S>>(logits, weights, taps, grad, read, done);
  }
}

// The gradient of the reduced loss times `factor`, a map of type T, and the loss unless it is null.
// The labels are read once more, first: the divisor is a factor of the gradient.
template <typename S, typename T>
void gradient_of_reduced(const LogitMap& logits, const LabelMap& labels,
                         const CrossEntropyOptions& options, bool mean, Compute<S> factor,
                         void* loss, const LogitMap& grad, BadLabel* bad) {
  using C = Compute<S>;
  const C* weight = static_cast<const C*>(options.weight);
  CheckedLabelRows rows(labels);
  std::vector<RowTotal<C>> totals(logits.batch * labels.height);
  parallel_for(logits.batch * labels.height, rows_per_thread(labels.width),
               [&](int64_t begin, int64_t end) {
                 std::vector<int32_t> classes(labels.width);
                 for (int64_t i = begin; i < end; ++i) {
                   rows.read(i / labels.height, i % labels.height, classes.data());
                   totals[i].count(classes.data(), labels.width, weight);
                 }
               });
  *bad = rows.first_bad();
  if (bad->found) return;
  const double divisor = divisor_of(totals, weight != nullptr, mean);
  const C each = static_cast<C>(factor / divisor);
  gradients<S, T>(
      logits, labels, options, grad,
      [&](int64_t b, int64_t y, int32_t* classes, C* cotangent) {
        rows.read(b, y, classes);
        std::fill(cotangent, cotangent + labels.width, each);
        if (factor == C(0)) std::fill(classes, classes + labels.width, kIgnored);
      },
      [&](int64_t i, const C* losses) { totals[i].add(losses, labels.width); });
  if (loss != nullptr) write_loss(totals, divisor, loss);
}

template <typename S>
void backward(const CrossEntropyCotangent& cotangent, const LogitMap& logits,
              const LabelMap& labels, const CrossEntropyOptions& options, const LogitMap& grad,
              BadLabel* bad) {
  using C = Compute<S>;
  CheckedLabelRows rows(labels);
  gradients<S, S>(
      logits, labels, options, grad,
      [&](int64_t b, int64_t y, int32_t* classes, C* grad_losses) {
        rows.read(b, y, classes);
        const C* row = static_cast<const C*>(cotangent.grad_losses) + b * cotangent.stride_b +
                       y * cotangent.stride_y;
        for (int64_t x = 0; x < labels.width; ++x) {
          grad_losses[x] = row[x * cotangent.stride_x];
          if (grad_losses[x] == C(0)) classes[x] = kIgnored;
        }
      },
      [](int64_t, const C*) {});
  *bad = rows.first_bad();
}

}  // namespace

void upsample_cross_entropy_cpu(const LogitMap& logits, const LabelMap& labels,
                                const CrossEntropyOptions& options, void* losses, void* lse,
                                BadLabel* bad) {
  with_storage_type(logits.kind, [&](auto s) {
    forward_to<decltype(s)>(logits, labels, options, losses, lse, bad);
  });
}

void upsample_cross_entropy_reduced_cpu(const LogitMap& logits, const LabelMap& labels,
                                        const CrossEntropyOptions& options, bool mean, void* loss,
                                        const LogitMap* grad_logits, BadLabel* bad) {
  with_storage_type(logits.kind, [&](auto s) {
    if (grad_logits == nullptr) {
      forward_reduced<decltype(s)>(logits, labels, options, mean, loss, bad);
    } else {
      using S = decltype(s);
      gradient_of_reduced<S, Compute<S>>(logits, labels, options, mean, 1, loss, *grad_logits, bad);
    }
  });
}

void upsample_cross_entropy_reduced_backward_cpu(const void* grad_loss, const LogitMap& logits,
                                                 const LabelMap& labels,
                                                 const CrossEntropyOptions& options, bool mean,
                                                 const LogitMap& grad_logits, BadLabel* bad) {
  with_storage_type(logits.kind, [&](auto s) {
    using S = decltype(s);
    const auto factor = *static_cast<const Compute<S>*>(grad_loss);
    gradient_of_reduced<S, S>(logits, labels, options, mean, factor, nullptr, grad_logits, bad);
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
