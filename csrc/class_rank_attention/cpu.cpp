// CPU kernels of class_rank_attention, one copy per instruction set (see common/cpu_dispatch.h).
//
// A thread takes a few vectors of a tile's queries at a time (the backward also keys) and goes over
// all keys in groups, whose scores never leave the first-level cache. One thread computes each sum,
// in a fixed order, so that the bits do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "class_rank_attention/api.h"
#include "class_rank_attention/cpu_hard.h"
#include "class_rank_attention/cpu_pixels.h"
#include "class_rank_attention/cpu_product.h"
#include "common/parallel.h"
#include "common/pixel_tiles.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

template <typename C>
void scale_tile(C* tile, int64_t classes, C factor) {
  for (int64_t i = 0; i < classes * kTile; ++i) tile[i] *= factor;
}

template <typename S>
Panels<Compute<S>> pack(const ClassRankInput& in, const void* source, const MapStrides& strides,
                        double factor = 1) {
  return Panels<Compute<S>>(static_cast<const S*>(source), strides, in.batch, in.pixels, in.classes,
                            static_cast<Compute<S>>(factor));
}

// The number of rows in a group. Up to a whole panel, the scores after the last row are 0 and are
// multiplied with the panel's zeros.
int64_t rows_of_group(const ClassRankInput& in, int64_t group) {
  const int64_t left = in.pixels - group * kGroupRows;
  return left < kGroupRows ? left : kGroupRows;
}

// ---- forward ------------------------------------------------------------------------------------

// exp(score - shift), for a shift that is the largest score or hardly less. The difference is taken
// first: of two large scores it is exact, while products with log2(e) differ by their rounding.
template <typename C>
MCIBI_SIMD Vector<C> exponential_of(Vector<C> score, Vector<C> shift) {
  return exponential2((score - shift) * kLog2E<C>);
}

// The softmax over the keys so far, for one block of queries: the largest score, which is the
// shift, and the sum of the exponentials of all scores less the shift.
template <typename C>
struct Softmax {
  Vector<C> shift[kBlockVectors], sum[kBlockVectors];

  // Replaces the scores by exp(score - shift). Sets decay to the factor for earlier sums.
  void add(C* scores, int64_t rows, Vector<C> (&decay)[kBlockVectors]) {
    Vector<C> largest[kBlockVectors];
    for (int j = 0; j < kBlockVectors; ++j) largest[j] = load(scores + j * kLanes<C>);
    for (int64_t row = 1; row < rows; ++row) {
      const C* from = scores + row * kBlockColumns<C>;
      for (int j = 0; j < kBlockVectors; ++j) {
        largest[j] = maximum(load(from + j * kLanes<C>), largest[j]);
      }
    }
    for (int j = 0; j < kBlockVectors; ++j) {
      const Vector<C> next = maximum(largest[j], shift[j]);
      decay[j] = exponential_of<C>(shift[j], next);
      shift[j] = next;
    }
    Vector<C> group[kBlockVectors] = {};
    for (int64_t row = 0; row < rows; ++row) {
      C* at = scores + row * kBlockColumns<C>;
      for (int j = 0; j < kBlockVectors; ++j) {
        const Vector<C> e = exponential_of<C>(load(at + j * kLanes<C>), shift[j]);
        group[j] += e;
        store(at + j * kLanes<C>, e);
      }
    }
    for (int j = 0; j < kBlockVectors; ++j) sum[j] = sum[j] * decay[j] + group[j];
  }
};

// One block of queries against all keys; the caller has set sum to zero.
template <typename C>
void attend_columns(const ClassRankInput& in, const Panels<C>& weights, int64_t image,
                    const C* query, C* scores, C* sum, C* lse) {
  Softmax<C> softmax;
  for (int j = 0; j < kBlockVectors; ++j) {
    softmax.shift[j] = Vector<C>{} - static_cast<C>(INFINITY);
    softmax.sum[j] = Vector<C>{};
  }
  for (int64_t index = 0; index < weights.groups(); ++index) {
    const int64_t rows = rows_of_group(in, index);
    const C* group = weights.group(image, index);
    score(weights, group, rows, in.classes, query, scores);
    Vector<C> decay[kBlockVectors];
    softmax.add(scores, rows, decay);
    add_weighted(weights, group, rows, scores, decay, sum);
  }
  for (int j = 0; j < kBlockVectors; ++j) {
    const Vector<C> inverse = C(1) / softmax.sum[j];
    for (int64_t k = 0; k < in.classes; ++k) {
      C* at = sum + k * kBlockColumns<C> + j * kLanes<C>;
      store(at, load(at) * inverse);
    }
    for (int64_t i = 0; i < kLanes<C>; ++i) {
      const C log_sum = std::log(softmax.sum[j][i]);
      lse[j * kLanes<C> + i] = softmax.shift[j][i] + log_sum;
    }
  }
}

template <typename S>
void attend(const ClassRankInput& in, void* out, void* lse) {
  using C = Compute<S>;
  const Panels<C> weights = pack<S>(in, in.weights, in.weights_strides);
  const int64_t tile_size = in.classes * kTile;
  const int64_t columns_size = weights.padded_classes() * kBlockColumns<C>;
  const int64_t scores_size = kGroupRows * kBlockColumns<C>;
  for_tiles(in, 4 * in.pixels * in.classes, [&](const Tile& tile) {
    Scratch scratch((2 * tile_size + 2 * columns_size + scores_size) * int64_t{sizeof(C)});
    C *queries = scratch.as<C>(), *sums = queries + tile_size;
    C *query = sums + tile_size, *sum = query + columns_size, *scores = sum + columns_size;
    C statistic[kTile];
    load_pixels<S>(in, in.query, in.query_strides, tile, queries);
    scale_tile(queries, in.classes, static_cast<C>(in.scale));
    for (int64_t n = 0; n < tile.count; n += kBlockColumns<C>) {
      load_columns(queries + n, in.classes, query);
      memset(sum, 0, static_cast<size_t>(columns_size) * sizeof(C));
      attend_columns(in, weights, tile.image, query, scores, sum, statistic + n);
      store_columns(sum, in.classes, sums + n);
    }
    store_pixels<S>(in, sums, tile, out);
    memcpy(static_cast<C*>(lse) + tile.image * in.pixels + tile.first, statistic,
           static_cast<size_t>(tile.count) * sizeof(C));
  });
}

// ---- backward -----------------------------------------------------------------------------------

// Let P be the softmax, D = grad W^T and delta the row sums of grad * out. The gradient of the
// scores is dS = P (D - delta), that of the query is scale dS W, and that of W is scale dS^T Q +
// P^T grad.

// For each query: the log-sum-exp, infinite after the last query; delta; and the inverse
// sum of P as computed with this lse, which is rounded, and coarsely so where scores are large.
// Exactly, each row of dS sums to zero; delta is rounded, so it does not. The gradient of the query
// finds the excess of each row and corrects delta by it.
template <typename C>
struct Statistics {
  explicit Statistics(const ClassRankInput& in)
      : stride(ceil_div(in.pixels, kGroupRows) * kGroupRows + kTile),
        memory(3 * in.batch * stride * static_cast<int64_t>(sizeof(C))) {}
  C* lse(int64_t image) const { return memory.as<C>() + 3 * image * stride; }
  C* delta(int64_t image) const { return lse(image) + stride; }
  C* inverse(int64_t image) const { return delta(image) + stride; }

  int64_t stride;
  Scratch memory;
};

// The strides of the contiguous result, as a map.
inline MapStrides out_strides(const ClassRankInput& in) {
  return {in.pixels * in.classes, 1, in.pixels, in.classes};
}

template <typename S>
void make_statistics(const ClassRankInput& in, const ClassRankResult& result,
                     const Statistics<Compute<S>>& statistics) {
  using C = Compute<S>;
  for (int64_t b = 0; b < in.batch; ++b) {
    const C* lse = static_cast<const C*>(result.lse) + b * in.pixels;
    for (int64_t n = 0; n < statistics.stride; ++n) {
      statistics.lse(b)[n] = n < in.pixels ? lse[n] : static_cast<C>(INFINITY);
      statistics.delta(b)[n] = statistics.inverse(b)[n] = C(0);
    }
  }
  for_tiles(in, 8 * in.classes, [&](const Tile& tile) {
    Scratch scratch(2 * in.classes * kTile * static_cast<int64_t>(sizeof(C)));
    C *out = scratch.as<C>(), *grad = out + in.classes * kTile;
    load_pixels<S>(in, result.out, out_strides(in), tile, out);
    load_pixels<S>(in, result.grad, result.grad_strides, tile, grad);
    C* delta = statistics.delta(tile.image) + tile.first;
    for (int64_t k = 0; k < in.classes; ++k) {
      for (int64_t t = 0; t < tile.count; ++t) delta[t] += out[k * kTile + t] * grad[k * kTile + t];
    }
  });
}

// Scores and D of one group and one block of columns, each [row][column].
template <typename C>
struct Pair {
  C *scores, *dots;
};

// The gradient of the query without the factor scale, for one block of queries from `first` on; the
// caller has set sum to zero. Writes the inverse sums of the statistics and corrects delta.
template <typename C>
void query_gradient(const ClassRankInput& in, const Panels<C>& weights,
                    const Statistics<C>& statistics, int64_t image, int64_t first, const C* query,
                    const C* grad, const C* out, Pair<C> pair, C* sum) {
  Vector<C> shift[kBlockVectors], delta[kBlockVectors], one[kBlockVectors];
  Vector<C> total[kBlockVectors] = {}, excess[kBlockVectors] = {};  // of P, and of dS
  for (int j = 0; j < kBlockVectors; ++j) {
    shift[j] = load(statistics.lse(image) + first + j * kLanes<C>);
    delta[j] = load(statistics.delta(image) + first + j * kLanes<C>);
    one[j] = Vector<C>{} + C(1);
  }
  for (int64_t index = 0; index < weights.groups(); ++index) {
    const int64_t rows = rows_of_group(in, index);
    const C* group = weights.group(image, index);
    score(weights, group, rows, in.classes, query, pair.scores);
    score(weights, group, rows, in.classes, grad, pair.dots);
    Vector<C> group_total[kBlockVectors] = {}, group_excess[kBlockVectors] = {};
    for (int64_t row = 0; row < rows; ++row) {
      for (int j = 0; j < kBlockVectors; ++j) {
        const int64_t at = row * kBlockColumns<C> + j * kLanes<C>;
        const Vector<C> p = exponential_of<C>(load(pair.scores + at), shift[j]);
        const Vector<C> ds = p * (load(pair.dots + at) - delta[j]);
        group_total[j] += p;
        group_excess[j] += ds;
        store(pair.dots + at, ds);
      }
    }
    for (int j = 0; j < kBlockVectors; ++j) {
      total[j] += group_total[j];
      excess[j] += group_excess[j];
    }
    add_weighted(weights, group, rows, pair.dots, one, sum);
  }
  for (int j = 0; j < kBlockVectors; ++j) {
    const int64_t at = first + j * kLanes<C>, left = std::min(in.pixels - at, kLanes<C>);
    const Vector<C> inverse = C(1) / total[j], mean = excess[j] * inverse;
    store_first(statistics.inverse(image) + at, inverse, left);
    store_first(statistics.delta(image) + at, delta[j] + mean, left);
    for (int64_t k = 0; k < in.classes; ++k) {
      const int64_t i = k * kBlockColumns<C> + j * kLanes<C>;
      store(sum + i, load(sum + i) * inverse - mean * load(out + i));
    }
  }
}

// The gradient of W, for one block of keys; the caller has set sum to zero. The packed query is
// already multiplied by the scale.
template <typename C>
void weights_gradient(const ClassRankInput& in, const Panels<C>& query, const Panels<C>& grad,
                      const Statistics<C>& statistics, int64_t image, const C* weights,
                      Pair<C> pair, C* sum) {
  Vector<C> one[kBlockVectors];
  for (int j = 0; j < kBlockVectors; ++j) one[j] = Vector<C>{} + C(1);
  for (int64_t index = 0; index < query.groups(); ++index) {
    const int64_t rows = rows_of_group(in, index), first = index * kGroupRows;
    const C *queries = query.group(image, index), *grads = grad.group(image, index);
    score(query, queries, rows, in.classes, weights, pair.scores);
    score(grad, grads, rows, in.classes, weights, pair.dots);
    const C *lse = statistics.lse(image) + first, *delta = statistics.delta(image) + first;
    const C* inverse = statistics.inverse(image) + first;
    for (int64_t row = 0; row < ceil_div(rows, kBlockRows) * kBlockRows; ++row) {
      for (int j = 0; j < kBlockVectors; ++j) {
        const int64_t at = row * kBlockColumns<C> + j * kLanes<C>;
        const Vector<C> e = exponential_of<C>(load(pair.scores + at), Vector<C>{} + lse[row]);
        const Vector<C> p = e * inverse[row];
        store(pair.scores + at, p);
        store(pair.dots + at, p * (load(pair.dots + at) - delta[row]));
      }
    }
    add_weighted(query, queries, rows, pair.dots, one, sum);
    add_weighted(grad, grads, rows, pair.scores, one, sum);
  }
}

template <typename S>
void query_gradients(const ClassRankInput& in, const ClassRankResult& result,
                     const Panels<Compute<S>>& weights, const Statistics<Compute<S>>& statistics,
                     void* grad_query) {
  using C = Compute<S>;
  const int64_t tile_size = in.classes * kTile;
  const int64_t columns_size = weights.padded_classes() * kBlockColumns<C>;
  const int64_t scores_size = kGroupRows * kBlockColumns<C>;
  for_tiles(in, 6 * in.pixels * in.classes, [&](const Tile& tile) {
    Scratch scratch((4 * tile_size + 4 * columns_size + 2 * scores_size) * int64_t{sizeof(C)});
    C *queries = scratch.as<C>(), *grads = queries + tile_size, *outs = grads + tile_size;
    C *sums = outs + tile_size, *query = sums + tile_size, *grad = query + columns_size;
    C *out = grad + columns_size, *sum = out + columns_size;
    const Pair<C> pair = {sum + columns_size, sum + columns_size + scores_size};
    load_pixels<S>(in, in.query, in.query_strides, tile, queries);
    load_pixels<S>(in, result.grad, result.grad_strides, tile, grads);
    load_pixels<S>(in, result.out, out_strides(in), tile, outs);
    scale_tile(queries, in.classes, static_cast<C>(in.scale));
    for (int64_t n = 0; n < tile.count; n += kBlockColumns<C>) {
      load_columns(queries + n, in.classes, query);
      load_columns(grads + n, in.classes, grad);
      load_columns(outs + n, in.classes, out);
      memset(sum, 0, static_cast<size_t>(columns_size) * sizeof(C));
      query_gradient(in, weights, statistics, tile.image, tile.first + n, query, grad, out, pair,
                     sum);
      store_columns(sum, in.classes, sums + n);
    }
    scale_tile(sums, in.classes, static_cast<C>(in.scale));
    store_pixels<S>(in, sums, tile, grad_query);
  });
}

template <typename S>
void weights_gradients(const ClassRankInput& in, const ClassRankResult& result,
                       const Statistics<Compute<S>>& statistics, void* grad_weights) {
  using C = Compute<S>;
  const Panels<C> query = pack<S>(in, in.query, in.query_strides, in.scale);
  const Panels<C> grad = pack<S>(in, result.grad, result.grad_strides);
  const int64_t tile_size = in.classes * kTile;
  const int64_t columns_size = query.padded_classes() * kBlockColumns<C>;
  const int64_t scores_size = kGroupRows * kBlockColumns<C>;
  for_tiles(in, 8 * in.pixels * in.classes, [&](const Tile& tile) {
    Scratch scratch((2 * tile_size + 2 * columns_size + 2 * scores_size) * int64_t{sizeof(C)});
    C *tiles = scratch.as<C>(), *sums = tiles + tile_size;
    C *weights = sums + tile_size, *sum = weights + columns_size;
    const Pair<C> pair = {sum + columns_size, sum + columns_size + scores_size};
    load_pixels<S>(in, in.weights, in.weights_strides, tile, tiles);
    for (int64_t n = 0; n < tile.count; n += kBlockColumns<C>) {
      load_columns(tiles + n, in.classes, weights);
      memset(sum, 0, static_cast<size_t>(columns_size) * sizeof(C));
      weights_gradient(in, query, grad, statistics, tile.image, weights, pair, sum);
      store_columns(sum, in.classes, sums + n);
    }
    store_pixels<S>(in, sums, tile, grad_weights);
  });
}

template <typename S>
void backward(const ClassRankInput& in, const ClassRankResult& result, void* grad_query,
              void* grad_weights) {
  using C = Compute<S>;
  const Statistics<C> statistics(in);
  make_statistics<S>(in, result, statistics);
  query_gradients<S>(in, result, pack<S>(in, in.weights, in.weights_strides), statistics,
                     grad_query);
  weights_gradients<S>(in, result, statistics, grad_weights);
}

}  // namespace

void class_rank_attention_cpu(const ClassRankInput& input, void* out, void* lse) {
  with_storage_type(input.kind, [&](auto s) { attend<decltype(s)>(input, out, lse); });
}

void class_rank_attention_hard_cpu(const ClassRankInput& input, void* out, void* lse) {
  with_storage_type(input.kind, [&](auto s) { attend_hard<decltype(s)>(input, out, lse); });
}

void class_rank_attention_backward_cpu(const ClassRankInput& input, const ClassRankResult& result,
                                       void* grad_query, void* grad_weights) {
  with_storage_type(
      input.kind, [&](auto s) { backward<decltype(s)>(input, result, grad_query, grad_weights); });
}

}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
