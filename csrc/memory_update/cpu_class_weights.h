// The sparse matrix A = U^T onehot(GT) of the memory update, by rows of low-resolution pixels.
//
// Row r of the features gets weight from the label rows whose bilinear source is in (r - 1, r + 1).
// A label row is read as runs of equal labels. A run adds to each column the sum of its horizontal
// weights there, times the row's vertical weight. One thread computes each row of A, from its label
// rows in order, so that the bits do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "common/bilinear.h"
#include "common/label_rows.h"
#include "common/parallel.h"
#include "memory_update/api.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {

// Weights of one class on neighbouring pixels of a row: weights[offset + i] is that of begin + i.
struct ClassRun {
  int32_t label;
  int32_t begin;
  int32_t count;
  int32_t offset;
};

struct WeightRow {
  std::unique_ptr<ClassRun[]> runs;
  std::unique_ptr<double[]> weights;
  int32_t num_runs = 0;
  BadLabel bad = {};
};

// One axis of U. Output positions start[i] <= p < start[i + 1] read the inputs i and i + 1. Those
// that read the last input alone have weight1 = 0.
struct AxisTaps {
  template <typename T>
  explicit AxisTaps(const BilinearAxis<T>& axis)
      : start(axis.in_size + 1, axis.out_size), index0(axis.out_size) {
    int filled = 0;
    for (int p = 0; p < axis.out_size; ++p) {
      const BilinearTap<T> tap = bilinear_tap(axis, p);
      const bool border = tap.index0 == tap.index1;
      while (filled <= tap.index0) start[filled++] = p;
      index0[p] = tap.index0;
      weight0.push_back(border ? double(tap.weight0) + double(tap.weight1) : tap.weight0);
      weight1.push_back(border ? 0.0 : tap.weight1);
    }
  }

  std::vector<int32_t> start, index0;
  std::vector<double> weight0, weight1;
};

// One row of A while it is summed up: w + 1 weights for each class that occurs.
class DenseRow {
 public:
  DenseRow(int64_t num_classes, int64_t width) : pitch_(width + 1), place_(num_classes, -1) {}

  // The class's weights, to which the caller adds from column `first` to `last`.
  double* touch(int32_t label, int32_t first, int32_t last) {
    int32_t& place = place_[label];
    if (place < 0) {
      place = static_cast<int32_t>(touched_.size());
      touched_.push_back({label, first, last});
      if (sums_.size() < touched_.size() * pitch_) sums_.resize(touched_.size() * pitch_);
    }
    Touched& touched = touched_[place];
    if (first < touched.first) touched.first = first;
    if (last > touched.last) touched.last = last;
    return &sums_[place * pitch_];
  }

  // Moves the values that are not zero to `row` and clears this one. The vectors are scratch
  // memory.
  void move_to(WeightRow& row, std::vector<ClassRun>& runs, std::vector<double>& weights) {
    runs.clear();
    weights.clear();
    double* sums = sums_.data();
    for (const Touched& touched : touched_) {
      bool open = false;
      for (int32_t j = touched.first; j <= touched.last; ++j) {
        if (sums[j] != 0.0) {
          if (!open) runs.push_back({touched.label, j, 0, static_cast<int32_t>(weights.size())});
          ++runs.back().count;
          weights.push_back(sums[j]);
        }
        open = sums[j] != 0.0;
        sums[j] = 0.0;
      }
      place_[touched.label] = -1;
      sums += pitch_;
    }
    touched_.clear();
    row.num_runs = static_cast<int32_t>(runs.size());
    row.runs.reset(new ClassRun[runs.size()]);
    row.weights.reset(new double[weights.size()]);
    for (size_t i = 0; i < runs.size(); ++i) row.runs[i] = runs[i];
    for (size_t i = 0; i < weights.size(); ++i) row.weights[i] = weights[i];
  }

 private:
  struct Touched {
    int32_t label, first, last;
  };

  size_t pitch_;
  std::vector<int32_t> place_;    // of each class among those that are touched, or -1
  std::vector<Touched> touched_;  // in the order in which they came
  std::vector<double> sums_;      // (touched, w + 1), zeros where nothing was added
};

// Computes consecutive rows of A on one thread.
class WeightRowBuilder {
 public:
  WeightRowBuilder(const LabelMap& labels, const AxisTaps& vertical, const AxisTaps& horizontal)
      : labels_(labels),
        vertical_(vertical),
        horizontal_(horizontal),
        read_(label_reader(labels.kind)),
        current_(labels.num_classes, horizontal.start.size() - 1),
        next_(labels.num_classes, horizontal.start.size() - 1),
        classes_(labels.width),
        counts_(labels.num_classes) {
    for (size_t i = 0; i + 1 < horizontal.start.size(); ++i) {
      whole_.push_back(piece(i, horizontal.start[i], horizontal.start[i + 1]));
    }
  }

  // Starts at row r of image b with the weights from the label rows between r - 1 and r.
  void start(int64_t b, int64_t r) {
    if (r == 0) return;
    WeightRow unused;
    for (int32_t y = vertical_.start[r - 1]; y < vertical_.start[r]; ++y) {
      read_pieces(b, y, unused, /*count=*/false);
      add(vertical_.weight1[y], current_);
    }
  }

  // Finishes row r. start(), or the call for r - 1, has added the label rows above it.
  void finish(int64_t b, int64_t r, WeightRow& row) {
    for (int32_t y = vertical_.start[r]; y < vertical_.start[r + 1]; ++y) {
      read_pieces(b, y, row, /*count=*/true);
      add(vertical_.weight0[y], current_);
      add(vertical_.weight1[y], next_);
    }
    current_.move_to(row, run_scratch_, weight_scratch_);
    std::swap(current_, next_);
  }

  const std::vector<int64_t>& counts() const { return counts_; }

 private:
  // The weights that a run of labels adds to columns i and i + 1, before the vertical weight.
  struct Piece {
    double sum0, sum1;
    int32_t label, column;
  };

  Piece piece(int32_t i, int32_t begin, int32_t end) const {
    Piece sums = {0.0, 0.0, 0, i};
    for (int32_t x = begin; x < end; ++x) {
      sums.sum0 += horizontal_.weight0[x];
      sums.sum1 += horizontal_.weight1[x];
    }
    return sums;
  }

  void read_pieces(int64_t b, int32_t y, WeightRow& row, bool count) {
    read_(labels_, b, y, classes_.data());
    pieces_.clear();
    const int32_t width = static_cast<int32_t>(labels_.width);
    for (int32_t begin = 0, end = 0; begin < width; begin = end) {
      const int32_t label = classes_[begin];
      while (end < width && classes_[end] == label) ++end;
      if (label >= 0) {
        add_pieces(label, begin, end);
        if (count) counts_[label] += end - begin;
      } else if (label == kBad && !row.bad.found) {
        row.bad = {true, b, y, begin, label_value(labels_, b, y, begin)};
      }
    }
  }

  void add_pieces(int32_t label, int32_t begin, int32_t end) {
    while (begin < end) {
      const int32_t i = horizontal_.index0[begin];
      const int32_t stop = horizontal_.start[i + 1] < end ? horizontal_.start[i + 1] : end;
      const bool whole = begin == horizontal_.start[i] && stop == horizontal_.start[i + 1];
      pieces_.push_back(whole ? whole_[i] : piece(i, begin, stop));
      pieces_.back().label = label;
      begin = stop;
    }
  }

  void add(double vertical_weight, DenseRow& row) const {
    if (vertical_weight == 0.0) return;
    const Piece* const end = pieces_.data() + pieces_.size();
    for (const Piece *first = pieces_.data(), *last; first < end; first = last) {
      // Neighbouring pieces of one class, whose columns ascend.
      for (last = first + 1; last < end && last->label == first->label;) ++last;
      double* const sums = row.touch(first->label, first->column, last[-1].column + 1);
      for (const Piece* piece = first; piece < last; ++piece) {
        sums[piece->column] += vertical_weight * piece->sum0;
        sums[piece->column + 1] += vertical_weight * piece->sum1;
      }
    }
  }

  const LabelMap& labels_;
  const AxisTaps& vertical_;
  const AxisTaps& horizontal_;
  const LabelReader read_;
  DenseRow current_, next_;
  std::vector<int32_t> classes_;
  std::vector<int64_t> counts_;
  std::vector<Piece> whole_, pieces_;
  std::vector<ClassRun> run_scratch_;
  std::vector<double> weight_scratch_;
};

// A of a batch of features (B, h, w), row after row, and the label counts per class (K,), which
// the caller has set to zero. T is the type aten computes the weights in.
template <typename T>
std::vector<WeightRow> class_weights(const LabelMap& labels, int64_t batch, int64_t height,
                                     int64_t width, bool align_corners, int64_t* counts) {
  const AxisTaps vertical(make_bilinear_axis<T>(height, labels.height, align_corners));
  const AxisTaps horizontal(make_bilinear_axis<T>(width, labels.width, align_corners));
  std::vector<WeightRow> rows(batch * height);
  const int64_t labels_per_row = labels.height * labels.width / height + 1;
  parallel_for(batch * height, 32768 / labels_per_row + 1, [&](int64_t begin, int64_t end) {
    WeightRowBuilder builder(labels, vertical, horizontal);
    builder.start(begin / height, begin % height);
    for (int64_t i = begin; i < end; ++i) builder.finish(i / height, i % height, rows[i]);
    for (int64_t c = 0; c < labels.num_classes; ++c) {
      __atomic_fetch_add(&counts[c], builder.counts()[c], __ATOMIC_RELAXED);
    }
  });
  return rows;
}

inline BadLabel first_bad_label(const std::vector<WeightRow>& rows) {
  for (const WeightRow& row : rows) {
    if (row.bad.found) return row.bad;
  }
  return {};
}

}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
