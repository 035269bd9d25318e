// Losses and their gradient in one pass: the exponentials are computed once for both.
//
// The gradient of a few pixels, [pixel][K], goes through the adjoint of the interpolation in two
// steps: along the row into [w][K], then to the two source rows. A unit of work is kUnitRows source
// rows with all output rows between them and the next ones. The first source row of a unit also
// gets a part from the unit before it. Both parts are kept and added at the end, so that the bits
// do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "upsample_cross_entropy/cpu_losses.h"
#include "upsample_cross_entropy/cpu_planes.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

constexpr int64_t kUnitRows = 4;

// Losses and gradients of one output row; source rows are rows of classes, [w][stride].
template <typename S>
class GradientRow {
 public:
  using C = Compute<S>;

  GradientRow(const ClassWeights<C>& weights, const LogitMap& logits,
              const std::vector<BilinearTap<C>>& taps)
      : weights_(weights),
        taps_(taps),
        columns_read_(columns_read(taps)),
        source_(logits, taps),
        losses_(weights, taps, logits.classes),
        stride_(class_stride<C>(logits.classes)),
        in_width_(logits.width),
        scratch_((in_width_ + 1) * stride_ * static_cast<int64_t>(sizeof(C))),
        columns_(scratch_.template as<C>()) {
    std::fill(columns_, columns_ + (in_width_ + 1) * stride_, C(0));
  }

  static int64_t size(const LogitMap& logits) {
    return logits.width * class_stride<C>(logits.classes);
  }

  // Writes the losses of an output row, and adds the gradient of their sum, each times its
  // cotangent, to the two source rows that it is between.
  void run(int64_t image, const BilinearTap<C>& tap, const int32_t* labels, const C* cotangent,
           C* losses, C* lse, C* row0, C* row1) {
    const int64_t width = static_cast<int64_t>(taps_.size());
    const C* row = source_.between(image, tap);
    std::fill(losses, losses + width, C(0));
    NextPixels<C> next;
    bool any = false;
    for (int64_t x = 0; x < width;) {
      x = next.fill(x, labels, width);
      if (next.count == 0) continue;
      any = true;
      losses_.template run_block<true>(row, next, labels, losses, lse);
      gradients(next, labels, cotangent);
      spread_along(next);
    }
    if (any) spread(tap, row0, row1);
  }

  // Writes a source row to row `out` of a map.
  template <typename T>
  static void write(const C* row, const LogitMap& grad, T* out) {
    store_class_row(row, grad.width, grad.classes, grad.strides, out);
  }

 private:
  static constexpr int64_t kPixels = PixelBlock<C>::kPixels;

  // The gradient of each pixel without the factor scale_: e_k - S (t_k / t), with e and S of
  // LossRow, t_k the smoothed target and t its sum.
  void gradients(const NextPixels<C>& next, const int32_t* labels, const C* cotangent) {
    const C* sums = losses_.sums();
    for (int64_t p = 0; p < next.count; ++p) {
      const int64_t x = next.x[p];
      const C hard = weights_.hard(labels[x]), target = hard + weights_.soft();
      C* pixel = losses_.block().pixel(p);
      if (weights_.smoothing == C(0)) {
        pixel[labels[x]] -= sums[p];
      } else if (target != C(0)) {
        const C share = sums[p] / target, soft = share * weights_.smoothing_per_class;
        for (int64_t k = 0; k < stride_; k += kPixels) {
          store(pixel + k, load(pixel + k) - soft * load(&weights_.of_class[k]));
        }
        pixel[labels[x]] -= share * hard;
      }
      scale_[p] = cotangent[x] * target / sums[p];
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
      C* column0 = columns_ + tap.index0 * stride_;
      C* column1 = columns_ + (border ? in_width_ : tap.index1) * stride_;
      for (int64_t k = 0; k < stride_; k += kPixels) {
        Vector<C> sum0 = load(column0 + k), sum1 = load(column1 + k);
        for (int64_t p = first; p < end; ++p) {
          const Vector<C> g = load(losses_.block().pixel(p) + k);
          sum0 += weight0[p] * g;
          sum1 += weight1[p] * g;
        }
        store(column0 + k, sum0);
        store(column1 + k, sum1);
      }
    }
  }

  // Adds the row's gradient to two source rows and clears it.
  void spread(const BilinearTap<C>& tap, C* row0, C* row1) {
    for (const int64_t x : columns_read_) {
      for (int64_t i = x * stride_; i < (x + 1) * stride_; i += kPixels) {
        const Vector<C> g = load(columns_ + i);
        store(row0 + i, load(row0 + i) + tap.weight0 * g);
        store(row1 + i, load(row1 + i) + tap.weight1 * g);
        store(columns_ + i, Vector<C>{});
      }
    }
  }

  const ClassWeights<C>& weights_;
  const std::vector<BilinearTap<C>>& taps_;
  std::vector<int64_t> columns_read_;
  SourceRows<S> source_;
  LossRow<C> losses_;
  int64_t stride_, in_width_;
  Scratch scratch_;
  C* columns_;  // [w + 1][K]: one more for the weight 0 at the border
  C scale_[kPixels];
};

// What one thread holds of an output row, a number for each of its pixels.
template <typename C>
struct OutputRow {
  explicit OutputRow(int64_t width) : labels(width), numbers(3 * width) {}

  std::vector<int32_t> labels;
  std::vector<C> numbers;
  C *cotangent = numbers.data(), *losses = cotangent + labels.size(), *lse = losses + labels.size();
};

// Computes losses and gradients of all images with rows of type Row (one of the two above), and
// writes the gradient to a map of type T.
//
// read(b, y, labels, cotangent) reads an output row: classes or kIgnored, and the cotangents of its
// losses; done(i, losses) is called with the losses of output row i of all images.
template <typename T, typename Row, typename Read, typename Done>
void gradients_in_units(const LogitMap& logits, const ClassWeights<typename Row::C>& weights,
                        const Taps<typename Row::C>& taps, const LogitMap& grad, const Read& read,
                        const Done& done) {
  using C = typename Row::C;
  const int64_t size = Row::size(logits), units = ceil_div(logits.height, kUnitRows);
  const int64_t width = static_cast<int64_t>(taps.x.size());
  const int64_t height = static_cast<int64_t>(taps.y.size());
  const auto write = [&](int64_t b, int64_t y, const C* row) {
    T* image = static_cast<T*>(const_cast<void*>(grad.data)) + b * grad.strides.batch;
    Row::write(row, grad, image + y * grad.strides.row);
  };
  // The first output row whose upper source row is y or below it.
  const auto first_from = [&](int64_t y) {
    const auto above = [](const BilinearTap<C>& tap, int64_t row) { return tap.index0 < row; };
    return std::lower_bound(taps.y.begin(), taps.y.end(), y, above) - taps.y.begin();
  };
  // The first row of each unit and the row after its last, which is the first of the next unit.
  Scratch shared(logits.batch * units * 2 * size * static_cast<int64_t>(sizeof(C)));
  C* edges = shared.as<C>();
  const int64_t grain = rows_per_thread(height * width * logits.classes / units + 1);
  parallel_for(logits.batch * units, grain, [&](int64_t begin, int64_t end) {
    Row row(weights, logits, taps.x);
    Scratch scratch((kUnitRows + 1) * size * static_cast<int64_t>(sizeof(C)));
    C* sums = scratch.as<C>();
    OutputRow<C> output(width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / units, top = i % units * kUnitRows;
      std::fill(sums, sums + (kUnitRows + 1) * size, C(0));
      for (int64_t y = first_from(top), last = first_from(top + kUnitRows); y < last; ++y) {
        const BilinearTap<C>& tap = taps.y[y];
        read(b, y, output.labels.data(), output.cotangent);
        row.run(b, tap, output.labels.data(), output.cotangent, output.losses, output.lse,
                sums + (tap.index0 - top) * size, sums + (tap.index1 - top) * size);
        done(b * height + y, output.losses);
      }
      std::copy(sums, sums + size, edges + 2 * i * size);
      std::copy(sums + kUnitRows * size, sums + (kUnitRows + 1) * size, edges + (2 * i + 1) * size);
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
}

// Writes zeros to the rows from `begin` to `end` of an image, contiguous or channels_last.
template <typename T>
void clear_rows(const LogitMap& grad, int64_t begin, int64_t end, T* image) {
  const bool rows_of_classes = grad.strides.channel == 1;
  const int64_t blocks = rows_of_classes ? 1 : grad.classes;
  const int64_t row = rows_of_classes ? grad.width * grad.classes : grad.width;
  for (int64_t k = 0; k < blocks && begin < end; ++k) {
    T* first = image + k * grad.strides.channel + begin * row;
    memset(first, 0, static_cast<size_t>((end - begin) * row) * sizeof(T));
  }
}

// What gradients_in_units does, for output rows whose source rows are disjoint: nothing is added up
// across rows, and source rows that no output row reads are only cleared.
template <typename T, typename Row, typename Read, typename Done>
void gradients_in_rows(const LogitMap& logits, const ClassWeights<typename Row::C>& weights,
                       const Taps<typename Row::C>& taps, const LogitMap& grad, const Read& read,
                       const Done& done) {
  using C = typename Row::C;
  const int64_t size = Row::size(logits), width = static_cast<int64_t>(taps.x.size());
  const int64_t height = static_cast<int64_t>(taps.y.size());
  const int64_t grain = rows_per_thread(logits.height / height * logits.width * logits.classes);
  parallel_for(logits.batch * height, grain, [&](int64_t begin, int64_t end) {
    Row row(weights, logits, taps.x);
    Scratch scratch(2 * size * static_cast<int64_t>(sizeof(C)));
    C* sums = scratch.as<C>();
    OutputRow<C> output(width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / height, y = i % height;
      const BilinearTap<C>& tap = taps.y[y];
      const int64_t rows = tap.index1 - tap.index0 + 1;  // 1 at the border, else 2
      std::fill(sums, sums + rows * size, C(0));
      read(b, y, output.labels.data(), output.cotangent);
      row.run(b, tap, output.labels.data(), output.cotangent, output.losses, output.lse, sums,
              sums + (rows - 1) * size);
      done(i, output.losses);
      T* image = static_cast<T*>(const_cast<void*>(grad.data)) + b * grad.strides.batch;
      for (int64_t r = 0; r < rows; ++r) {
        Row::write(sums + r * size, grad, image + (tap.index0 + r) * grad.strides.row);
      }
      if (y == 0) clear_rows(grad, 0, tap.index0, image);
      const bool last = y == height - 1;
      clear_rows(grad, tap.index1 + 1, last ? logits.height : taps.y[y + 1].index0, image);
    }
  });
}

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
