// CPU kernels of upsample_argmax and upsample_confusion, one copy per instruction set (see
// common/cpu_dispatch.h).
//
// A cell is the area between four neighbours of the low-resolution map: 8 x 8 output pixels when
// upsampling by 8. Interpolated values are between the smallest and the largest of a class's four
// corners, so a class whose largest corner is below another's smallest corner wins nowhere in the
// cell. The kernel looks at all classes once per cell and interpolates only the few that are left,
// for one vector of pixels at a time. Cells of single pixels, and few classes, are done without
// (cpu_pixels.h).
#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

#include "common/checked_label_rows.h"
#include "common/class_rows.h"
#include "common/parallel.h"
#include "upsample_argmax/api.h"
#include "upsample_argmax/cpu_pixels.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

template <typename V>
MCIBI_SIMD V minimum(V a, V b) {
  return a < b ? a : b;
}

// Output positions [begin, end) between the same two inputs.
struct Group {
  int64_t begin, end;
};

// All positions in groups of at most `most`.
template <typename C>
std::vector<Group> groups_of(const std::vector<BilinearTap<C>>& taps, int64_t most) {
  std::vector<Group> groups;
  for (int64_t i = 0; i < static_cast<int64_t>(taps.size()); ++i) {
    const bool same = !groups.empty() && taps[i].index0 == taps[i - 1].index0 &&
                      groups.back().end - groups.back().begin < most;
    if (same) {
      ++groups.back().end;
    } else {
      groups.push_back({i, i + 1});
    }
  }
  return groups;
}

// The classes that may win in one cell, in ascending order, with their values at its corners.
template <typename C>
class Candidates {
 public:
  explicit Candidates(int64_t classes)
      : classes_(classes),
        stride_(class_stride<C>(classes)),
        data_(8 * stride_ * static_cast<int64_t>(sizeof(C))) {}

  int64_t count() const { return count_; }
  bool finite() const { return finite_; }
  const C* classes() const { return array(1); }  // as numbers
  const C* left() const { return array(6); }     // values at one height
  const C* right() const { return array(7); }

  // Takes the logits, [K], at the four corners.
  void choose(const C* top_left, const C* top_right, const C* bottom_left, const C* bottom_right) {
    const C* corners[4] = {top_left, top_right, bottom_left, bottom_right};
    const C bound = prune(corners);
    finite_ = bound == bound;
    const C* largest = array(0);
    C* classes = array(1);
    count_ = 0;
    for (int64_t k = 0; k < classes_; ++k) {  // a comparison with NaN is false: then all are kept
      classes[count_] = static_cast<C>(k);
      count_ += !(largest[k] < bound);
    }
    for (int i = 0; i < 4; ++i) {
      C* values = array(2 + i);
      for (int64_t n = 0; n < count_; ++n) {
        values[n] = corners[i][static_cast<int64_t>(classes[n])];
      }
    }
  }

  // Interpolates the candidates' values between the two rows.
  void interpolate(C weight0, C weight1) {
    for (int64_t n = 0; n < count_; n += kLanes<C>) {
      store(array(6) + n, weight0 * load(array(2) + n) + weight1 * load(array(4) + n));
      store(array(7) + n, weight0 * load(array(3) + n) + weight1 * load(array(5) + n));
    }
  }

 private:
  C* array(int i) const { return data_.template as<C>() + i * stride_; }

  // Writes the largest corner of each class. Returns the bound that a winner's largest corner must
  // reach, or NaN, which excludes no class, if a value is not finite.
  C prune(const C* const (&corners)[4]) {
    Vector<C> reach = Vector<C>{} - std::numeric_limits<C>::infinity();
    Vector<C> magnitude = {}, not_finite = {};
    for (int64_t k = 0; k < stride_; k += kLanes<C>) {
      const Vector<C> a = load(corners[0] + k), b = load(corners[1] + k);
      const Vector<C> c = load(corners[2] + k), d = load(corners[3] + k);
      const Vector<C> high = maximum(maximum(a, b), maximum(c, d));
      const Vector<C> low = minimum(minimum(a, b), minimum(c, d));
      not_finite += (a + b + c + d) * C(0);
      magnitude = maximum(magnitude, maximum(high, -low));
      store(array(0) + k, high);
      if (k + kLanes<C> <= classes_) reach = maximum(reach, low);
    }
    C best = -std::numeric_limits<C>::infinity(), largest = 0, poison = 0;
    for (int64_t i = 0; i < kLanes<C>; ++i) {
      best = reach[i] > best ? reach[i] : best;
      largest = magnitude[i] > largest ? magnitude[i] : largest;
      poison += not_finite[i];
    }
    for (int64_t k = classes_ / kLanes<C> * kLanes<C>; k < classes_; ++k) {
      const C low =
          std::min(std::min(corners[0][k], corners[1][k]), std::min(corners[2][k], corners[3][k]));
      best = low > best ? low : best;
    }
    // Room for the roundings of the interpolated values.
    return best - 16 * std::numeric_limits<C>::epsilon() * largest + poison;
  }

  int64_t classes_, stride_, count_ = 0;
  bool finite_ = true;
  Scratch data_;  // largest corner, class, four corners, values on the left and on the right
};

// What the threads share.
template <typename S>
struct Upsampling {
  using C = Compute<S>;
  static constexpr int64_t kMostRows = 16;  // in a group, so that there are enough groups

  Upsampling(const LogitMap& logits, int64_t out_height, int64_t out_width, bool align_corners)
      : logits(logits),
        y(bilinear_taps<C>(logits.height, out_height, align_corners)),
        x(bilinear_taps<C>(logits.width, out_width, align_corners)),
        rows(groups_of(y, kMostRows)),
        columns(groups_of(x, out_width)) {
    for (const BilinearTap<C>& tap : x) {
      weight0.push_back(tap.weight0);
      weight1.push_back(tap.weight1);
    }
    weight0.resize(out_width + kLanes<C>);
    weight1.resize(out_width + kLanes<C>);
  }

  // The groups of rows of all images.
  int64_t groups() const { return logits.batch * static_cast<int64_t>(rows.size()); }

  // Calls f(begin, end) on ranges of them.
  template <typename F>
  void for_groups(const F& f) const {
    const int64_t values = static_cast<int64_t>(y.size() * x.size() / rows.size());
    parallel_for(groups(), rows_per_thread(values * logits.classes + 1), f);
  }

  const LogitMap& logits;
  std::vector<BilinearTap<C>> y, x;
  std::vector<Group> rows, columns;
  std::vector<C> weight0, weight1;  // of x, followed by zeros
};

// The winning candidates at a vector of pixels, given the pixels' weights of left and right.
template <bool kFinite, typename C>
MCIBI_SIMD Vector<C> winners(const Candidates<C>& candidates, Vector<C> weight0,
                             Vector<C> weight1) {
  const C *left = candidates.left(), *right = candidates.right(), *classes = candidates.classes();
  Vector<C> best = weight0 * left[0] + weight1 * right[0];
  Vector<C> winner = Vector<C>{} + classes[0];
  for (int64_t n = 1; n < candidates.count(); ++n) {
    const Vector<C> value = weight0 * left[n] + weight1 * right[n];
    const Vector<C> number = Vector<C>{} + classes[n];
    if constexpr (kFinite) {
      winner = value > best ? number : winner;
      best = maximum(value, best);
    } else {  // the first NaN wins over every number
      const auto better = ~(value <= best) & (best == best);
      winner = better ? number : winner;
      best = better ? value : best;
    }
  }
  return winner;
}

// The classes at the vector of pixels from x on.
template <typename S, typename C>
MCIBI_SIMD Vector<C> classes_at(const Upsampling<S>& up, const Candidates<C>& candidates,
                                int64_t x) {
  if (candidates.count() == 1) return Vector<C>{} + candidates.classes()[0];
  const Vector<C> weight0 = load(&up.weight0[x]), weight1 = load(&up.weight1[x]);
  return candidates.finite() ? winners<true>(candidates, weight0, weight1)
                             : winners<false>(candidates, weight0, weight1);
}

// Calls emit(y, x, count, classes) for runs of `count` pixels that together cover a group of rows.
template <typename S, typename F>
void predict_rows(const Upsampling<S>& up, int64_t image, const Group& rows, SourceRows<S>* source,
                  Candidates<Compute<S>>* candidates, const F& emit) {
  using C = Compute<S>;
  const int64_t stride = class_stride<C>(up.logits.classes);
  const C* top = source->row(image, up.y[rows.begin].index0);
  const C* bottom = source->row(image, up.y[rows.begin].index1);
  for (const Group& columns : up.columns) {
    const int64_t left = up.x[columns.begin].index0 * stride;
    const int64_t right = up.x[columns.begin].index1 * stride;
    candidates->choose(top + left, top + right, bottom + left, bottom + right);
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      if (candidates->count() > 1) candidates->interpolate(up.y[y].weight0, up.y[y].weight1);
      for (int64_t x = columns.begin; x < columns.end; x += kLanes<C>) {
        C classes[kLanes<C>];
        store(classes, classes_at(up, *candidates, x));
        emit(y, x, std::min(columns.end - x, kLanes<C>), classes);
      }
    }
  }
}

// For the groups [begin, end): calls start(image, y, row) for each row of a group, the row-th, then
// emit(image, y, row, x, count, classes) for runs of its pixels.
template <typename S, typename Start, typename Emit>
void predict_groups(const Upsampling<S>& up, int64_t begin, int64_t end, const Start& start,
                    const Emit& emit) {
  using C = Compute<S>;
  const int64_t groups = static_cast<int64_t>(up.rows.size());
  const int64_t width = static_cast<int64_t>(up.x.size()), classes = up.logits.classes;
  const auto each_group = [&](const auto& predict) {
    for (int64_t i = begin; i < end; ++i) {
      const Group& rows = up.rows[i % groups];
      for (int64_t y = rows.begin; y < rows.end; ++y) start(i / groups, y, y - rows.begin);
      predict(i / groups, rows);
    }
  };
  if (prefers_planes(up.logits, width)) {
    SourcePlanes<S> source(up.logits);
    const PlaneTaps<C> taps(up.x);
    each_group([&](int64_t image, const Group& rows) {
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        predict_from_planes(source.between(image, up.y[y]), source.stride(), taps, classes, width,
                            [&](int64_t x, int64_t count, const C* found) {
                              emit(image, y, y - rows.begin, x, count, found);
                            });
      }
    });
  } else if (width <= up.logits.width) {
    SourceRows<S> source(up.logits, up.x);
    each_group([&](int64_t image, const Group& rows) {
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        predict_from_classes(source.between(image, up.y[y]), classes, up.x,
                             [&](int64_t x, int64_t count, const C* found) {
                               emit(image, y, y - rows.begin, x, count, found);
                             });
      }
    });
  } else {
    SourceRows<S> source(up.logits, up.x);
    Candidates<C> candidates(classes);
    each_group([&](int64_t image, const Group& rows) {
      predict_rows(up, image, rows, &source, &candidates,
                   [&](int64_t y, int64_t x, int64_t count, const C* found) {
                     emit(image, y, y - rows.begin, x, count, found);
                   });
    });
  }
}

template <typename S>
void argmax(const LogitMap& logits, int64_t out_height, int64_t out_width, bool align_corners,
            int64_t* out) {
  using C = Compute<S>;
  const Upsampling<S> up(logits, out_height, out_width, align_corners);
  up.for_groups([&](int64_t begin, int64_t end) {
    predict_groups(
        up, begin, end, [](int64_t, int64_t, int64_t) {},
        [&](int64_t image, int64_t y, int64_t, int64_t x, int64_t count, const C* classes) {
          int64_t* to = out + (image * out_height + y) * out_width + x;
          for (int64_t p = 0; p < count; ++p) to[p] = static_cast<int64_t>(classes[p]);
        });
  });
}

template <typename S>
void confusion(const LogitMap& logits, const LabelMap& labels, bool align_corners, int64_t* counts,
               BadLabel* bad) {
  using C = Compute<S>;
  const Upsampling<S> up(logits, labels.height, labels.width, align_corners);
  const int64_t K = logits.classes;
  CheckedLabelRows label_rows(labels);
  std::mutex mutex;
  std::fill(counts, counts + K * K, 0);
  up.for_groups([&](int64_t begin, int64_t end) {
    std::vector<int32_t> known(Upsampling<S>::kMostRows * labels.width);
    const bool alone = end - begin == up.groups();  // then there are no counts to add up
    std::vector<int64_t> own(alone ? 0 : K * K);
    int64_t* pairs = alone ? counts : own.data();
    predict_groups(
        up, begin, end,
        [&](int64_t image, int64_t y, int64_t row) {
          label_rows.read(image, y, &known[row * labels.width]);
        },
        [&](int64_t, int64_t, int64_t row, int64_t x, int64_t count, const C* classes) {
          const int32_t* label = &known[row * labels.width + x];
          for (int64_t p = 0; p < count; ++p) {
            if (label[p] != kIgnored) ++pairs[label[p] * K + static_cast<int64_t>(classes[p])];
          }
        });
    if (alone) return;
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t i = 0; i < K * K; ++i) counts[i] += own[i];
  });
  *bad = label_rows.first_bad();
}

}  // namespace

void upsample_argmax_cpu(const LogitMap& logits, int64_t out_height, int64_t out_width,
                         bool align_corners, int64_t* out) {
  with_storage_type(logits.kind, [&](auto s) {
    argmax<decltype(s)>(logits, out_height, out_width, align_corners, out);
  });
}

void upsample_confusion_cpu(const LogitMap& logits, const LabelMap& labels, bool align_corners,
                            int64_t* counts, BadLabel* bad) {
  with_storage_type(logits.kind, [&](auto s) {
    confusion<decltype(s)>(logits, labels, align_corners, counts, bad);
  });
}

}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
