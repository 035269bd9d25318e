// CPU kernels of the memory update (Eqs. 6-9), one copy per flavour (see common/cpu_dispatch.h).
//
// The labels become the sparse matrix A (cpu_class_weights.h). Each row of the features is then
// transposed, sixteen channels at a time, into a tile [pixel][channel] in the first-level cache,
// and every run of a class's weights adds its weighted pixels to that class's sums in double
// precision. One thread takes a block of channels through A in order, so that the bits do not
// depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"
#include "memory_update/api.h"
#include "memory_update/cpu_class_weights.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

constexpr int kBlock = 16;  // channels
constexpr int kVectors = kBlock / kLanes<double>;

// ---- tiles --------------------------------------------------------------------------------------

// Channels z0 .. z0 + 15 of one row of R, as [pixel][channel]; channels after the last are zero.
template <typename S>
class Tile {
 public:
  using C = Compute<S>;

  explicit Tile(const FeatureMap& features) : features_(features), data_(features.width * kBlock) {}

  const C* at(int64_t x) const { return &data_[x * kBlock]; }

  void load_row(int64_t b, int64_t y, int64_t z0) {
    const FeatureMap& f = features_;
    const S* row =
        static_cast<const S*>(f.data) + b * f.stride_b + y * f.stride_y + z0 * f.stride_z;
    const int64_t channels = f.channels - z0 < kBlock ? f.channels - z0 : kBlock;
    if (f.stride_x == 1) {
      for (int z = 0; z < kBlock; z += kLanes<C>) load_columns(row, channels - z, z);
    } else if (f.stride_z == 1) {
      for (int64_t x = 0; x < f.width; ++x) load_pixel(row + x * f.stride_x, channels, x);
    } else {
      load_strided(row, channels);
    }
  }

 private:
  // kLanes channels from z on, of which `channels` exist, each contiguous along the row.
  void load_columns(const S* row, int64_t channels, int z) {
    const int64_t width = features_.width;
    const S* sources[kLanes<C>];
    for (int i = 0; i < kLanes<C>; ++i) {
      sources[i] = i < channels ? row + (z + i) * features_.stride_z : nullptr;
    }
    for (int64_t x = 0; x < width; x += kLanes<C>) {
      const int64_t count = width - x < kLanes<C> ? width - x : kLanes<C>;
      Vector<C> block[kLanes<C>];
      for (int i = 0; i < kLanes<C>; ++i) {
        if (sources[i] == nullptr) {
          block[i] = Vector<C>{};
        } else {
          block[i] = count == kLanes<C> ? load(sources[i] + x) : load_first(sources[i] + x, count);
        }
      }
      transpose<C>(block);
      for (int i = 0; i < count; ++i) store(&data_[(x + i) * kBlock + z], block[i]);
    }
  }

  void load_pixel(const S* pixel, int64_t channels, int64_t x) {
    for (int z = 0; z < kBlock; z += kLanes<C>) {
      const int64_t left = channels - z;
      const Vector<C> v = left >= kLanes<C> ? load(pixel + z)
                          : left > 0        ? load_first(pixel + z, left)
                                            : Vector<C>{};
      store(&data_[x * kBlock + z], v);
    }
  }

  void load_strided(const S* row, int64_t channels) {
    for (int64_t x = 0; x < features_.width; ++x) {
      S pixel[kBlock] = {};
      for (int64_t z = 0; z < channels; ++z) {
        pixel[z] = row[x * features_.stride_x + z * features_.stride_z];
      }
      load_pixel(pixel, channels, x);
    }
  }

  const FeatureMap& features_;
  std::vector<C> data_;
};

// ---- sums ---------------------------------------------------------------------------------------

MCIBI_SIMD VectorD load_double(const double* p) { return load(p); }
MCIBI_SIMD VectorD load_double(const float* p) {
  typedef float Half __attribute__((vector_size(MCIBI_VECTOR_BYTES / 2)));
  return __builtin_convertvector(load_unaligned<Half>(p), VectorD);
}
// The two halves of a vector.
MCIBI_SIMD void widen(VectorD v, VectorD* out) { *out = v; }
MCIBI_SIMD void widen(VectorF v, VectorD* out) {
  float lanes[kLanes<float>];
  memcpy(lanes, &v, sizeof(v));
  for (int64_t i = 0; i < 2; ++i) out[i] = load_double(lanes + i * kLanes<double>);
}

// sums[0..16) += sum_i weights[i] * tile[i][0..16)
template <typename C>
void add_weighted(const double* weights, const C* tile, int count, double* sums) {
  VectorD acc[kVectors];
  for (int v = 0; v < kVectors; ++v) acc[v] = load(sums + v * kLanes<double>);
  for (int i = 0; i < count; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      acc[v] += weights[i] * load_double(tile + i * kBlock + v * kLanes<double>);
    }
  }
  for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes<double>, acc[v]);
}

// The same for kBlock channels that are neighbours in memory, of pixels that are `step` apart.
template <typename S>
void add_weighted_pixels(const double* weights, const S* pixel, int64_t step, int count,
                         double* sums) {
  using C = Compute<S>;
  constexpr int64_t kHalves = sizeof(double) / sizeof(C);
  VectorD acc[kVectors];
  for (int v = 0; v < kVectors; ++v) acc[v] = load(sums + v * kLanes<double>);
  for (int i = 0; i < count; ++i, pixel += step) {
    for (int v = 0; v < kVectors; v += kHalves) {
      VectorD halves[kHalves];
      widen(load(pixel + v * kLanes<double>), halves);
      for (int64_t half = 0; half < kHalves; ++half) acc[v + half] += weights[i] * halves[half];
    }
  }
  for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes<double>, acc[v]);
}

// The sums of the blocks of channels [begin, end), which are neighbours in memory. A run goes
// through all of them before the next one: its pixels are then still in a cache.
template <typename S>
void sum_neighbours(const FeatureMap& f, const std::vector<WeightRow>& rows, int64_t begin,
                    int64_t end, double* sums) {
  for (int64_t i = 0; i < static_cast<int64_t>(rows.size()); ++i) {
    const WeightRow& row = rows[i];
    const S* first =
        static_cast<const S*>(f.data) + i / f.height * f.stride_b + i % f.height * f.stride_y;
    for (int32_t n = 0; n < row.num_runs; ++n) {
      const ClassRun& run = row.runs[n];
      for (int64_t z0 = begin * kBlock; z0 < end * kBlock; z0 += kBlock) {
        add_weighted_pixels(&row.weights[run.offset], first + run.begin * f.stride_x + z0,
                            f.stride_x, run.count, sums + run.label * f.channels + z0);
      }
    }
  }
}

// The sums of kBlock channels from z0 on, or those that are left.
template <typename S>
void sum_block(const FeatureMap& f, const std::vector<WeightRow>& rows, int64_t classes, int64_t z0,
               Tile<S>* tile, double* sums) {
  const bool whole = z0 + kBlock <= f.channels;
  std::vector<double> partial(whole ? 0 : classes * kBlock);  // of the last channels
  double* block = whole ? sums + z0 : partial.data();
  const int64_t pitch = whole ? f.channels : kBlock;
  for (int64_t i = 0; i < static_cast<int64_t>(rows.size()); ++i) {
    const WeightRow& row = rows[i];
    if (row.num_runs == 0) continue;
    tile->load_row(i / f.height, i % f.height, z0);
    for (int32_t n = 0; n < row.num_runs; ++n) {
      const ClassRun& run = row.runs[n];
      add_weighted(&row.weights[run.offset], tile->at(run.begin), run.count,
                   block + run.label * pitch);
    }
  }
  for (int64_t c = 0; c < classes && !whole; ++c) {
    for (int64_t z = z0; z < f.channels; ++z) {
      sums[c * f.channels + z] = block[c * kBlock + z - z0];
    }
  }
}

// Numbers the classes that occur in ascending order, in the runs too; makes room for their sums.
ClassSums number_classes(const int64_t* counts, int64_t num_classes, int64_t channels,
                         std::vector<WeightRow>& rows) {
  ClassSums found = {std::unique_ptr<int32_t[]>(new int32_t[num_classes]), nullptr, 0};
  std::vector<int32_t> number_of(num_classes);
  for (int32_t c = 0; c < num_classes; ++c) {
    number_of[c] = static_cast<int32_t>(found.count);
    if (counts[c] > 0) found.classes[found.count++] = c;
  }
  for (WeightRow& row : rows) {
    for (int32_t n = 0; n < row.num_runs; ++n) row.runs[n].label = number_of[row.runs[n].label];
  }
  found.sums.reset(new double[found.count * channels]());
  return found;
}

// sums: (classes, Z), zeros.
template <typename S>
void sum_channels(const FeatureMap& features, const std::vector<WeightRow>& rows, int64_t classes,
                  double* sums) {
  const int64_t neighbours = features.stride_z == 1 ? features.channels / kBlock : 0;
  parallel_for(ceil_div(features.channels, kBlock), 1, [&](int64_t begin, int64_t end) {
    sum_neighbours<S>(features, rows, begin, std::min(end, neighbours), sums);
    Tile<S> tile(features);
    for (int64_t block = std::max(begin, neighbours); block < end; ++block) {
      sum_block<S>(features, rows, classes, block * kBlock, &tile, sums);
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------

// Writes one row of `channels` channels from the tile [pixel][kBlock] of doubles.
template <typename S>
void store_planes(const double* tile, int64_t width, int64_t channels, int64_t stride_z, S* out) {
  using C = Compute<S>;
  for (int64_t x = 0; x < width; x += kLanes<C>) {
    const int64_t pixels = std::min(width - x, kLanes<C>);
    for (int64_t z = 0; z < channels; z += kLanes<C>) {
      Vector<C> rows[kLanes<C>] = {};
      for (int64_t i = 0; i < pixels; ++i) {
        const double* from = tile + (x + i) * kBlock + z;
        for (int64_t j = 0; j < kLanes<C>; ++j) rows[i][j] = static_cast<C>(from[j]);
      }
      transpose<C>(rows);
      for (int64_t i = 0; i < kLanes<C> && z + i < channels; ++i) {
        S* to = out + (z + i) * stride_z + x;
        if (pixels == kLanes<C>) {
          store(to, rows[i]);
        } else {
          store_first(to, rows[i], pixels);
        }
      }
    }
  }
}

template <typename S>
void spread_to_rows(const double* grad_sums, const std::vector<WeightRow>& rows,
                    const FeatureMap& grad) {
  const int64_t channels = grad.channels, width = grad.width, height = grad.height;
  parallel_for(static_cast<int64_t>(rows.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> tile(width * kBlock);
    for (int64_t i = begin; i < end; ++i) {
      const WeightRow& row = rows[i];
      S* image = static_cast<S*>(const_cast<void*>(grad.data)) + (i / height) * grad.stride_b +
                 (i % height) * grad.stride_y;
      if (row.num_runs == 0) {  // many rows, where there are fewer labels than rows
        for (int64_t z = 0; z < channels; ++z) {
          memset(image + z * grad.stride_z, 0, static_cast<size_t>(width) * sizeof(S));
        }
        continue;
      }
      for (int64_t z0 = 0; z0 < channels; z0 += kBlock) {
        const int64_t count = channels - z0 < kBlock ? channels - z0 : kBlock;
        std::fill(tile.begin(), tile.end(), 0.0);
        for (int32_t n = 0; n < row.num_runs; ++n) {
          const ClassRun& run = row.runs[n];
          const double* source = grad_sums + run.label * channels + z0;
          for (int32_t p = 0; p < run.count; ++p) {
            const double weight = row.weights[run.offset + p];
            double* pixel = &tile[(run.begin + p) * kBlock];
            for (int64_t z = 0; z < count; ++z) pixel[z] += weight * source[z];
          }
        }
        store_planes(tile.data(), width, count, grad.stride_z, image + z0 * grad.stride_z);
      }
    }
  });
}

// The sum of f(i) as eight interleaved partial sums, which the compiler can vectorise.
template <typename F>
double sum_over(int64_t count, const F& f) {
  double partial[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int lane = 0; lane < 8; ++lane) partial[lane] += f(i + lane);
  }
  for (; i < count; ++i) partial[i % 8] += f(i);
  double sum = 0.0;
  for (const double p : partial) sum += p;
  return sum;
}

}  // namespace

void class_feature_sums_cpu(const FeatureMap& features, const LabelMap& labels, bool align_corners,
                            ClassSums& sums, int64_t* counts, BadLabel* bad) {
  std::fill(counts, counts + labels.num_classes, 0);
  with_storage_type(features.kind, [&](auto type) {
    using S = decltype(type);
    auto rows = class_weights<Compute<S>>(labels, features.batch, features.height, features.width,
                                          align_corners, counts);
    *bad = first_bad_label(rows);
    if (bad->found) return;
    sums = number_classes(counts, labels.num_classes, features.channels, rows);
    sum_channels<S>(features, rows, sums.count, sums.sums.get());
  });
}

void class_feature_sums_backward_cpu(const double* grad_sums, const LabelMap& labels,
                                     bool align_corners, const FeatureMap& grad_features,
                                     BadLabel* bad) {
  std::vector<int64_t> counts(labels.num_classes);
  with_storage_type(grad_features.kind, [&](auto type) {
    using S = decltype(type);
    const auto rows = class_weights<Compute<S>>(labels, grad_features.batch, grad_features.height,
                                                grad_features.width, align_corners, counts.data());
    *bad = first_bad_label(rows);
    if (!bad->found) spread_to_rows<S>(grad_sums, rows, grad_features);
  });
}

void moving_average_cpu(const ClassSums& sums, const int64_t* counts, int64_t channels,
                        double momentum, bool unbiased, double* memory) {
  parallel_for(sums.count, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = sums.classes[i];
      const double* x = sums.sums.get() + i * channels;
      const double scale = 1.0 / static_cast<double>(counts[c]);  // Eq. 8
      const double mean = scale * sum_over(channels, [&](int64_t z) { return x[z]; }) / channels;
      const double squares = sum_over(channels, [&](int64_t z) {
        const double d = x[z] * scale - mean;
        return d * d;
      });
      const double std = std::sqrt(squares / static_cast<double>(channels - (unbiased ? 1 : 0)));
      memory[2 * c] = (1.0 - momentum) * memory[2 * c] + momentum * mean;  // Eqs. 9 and 6
      memory[2 * c + 1] = (1.0 - momentum) * memory[2 * c + 1] + momentum * std;
    }
  });
}

}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
