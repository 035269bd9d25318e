// The hard form for maps in which the classes of a pixel are neighbours in memory: it reads whole
// vectors of classes and does not transpose the maps. As many rows as a vector has lanes are
// reduced together: one small transposition turns their partial results into a vector of results.
//
// The last vector of a row ends with the row and overlaps the one before it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "class_rank_attention/cpu_pixels.h"
#include "common/pixel_tiles.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

// Whether this form is the faster one: with few classes, the reductions across lanes cost more than
// transposing the map.
template <typename S>
bool classes_side_by_side(const ClassRankInput& in, const MapStrides& strides) {
  return strides.channel == 1 && in.classes >= 3 * kLanes<Compute<S>>;
}

// 0, 1, 2, ... in the lanes.
template <typename C>
MCIBI_SIMD Vector<C> lane_numbers() {
  C lanes[kLanes<C>];
  for (int64_t i = 0; i < kLanes<C>; ++i) lanes[i] = static_cast<C>(i);
  return load(lanes);
}

// The first argmax of each row of W. NaN counts as the largest, as in torch.argmax.
template <typename S>
void argmax_rows(const ClassRankInput& in, const Tile& tile, int32_t* labels) {
  using C = Compute<S>;
  using V = Vector<C>;
  const MapStrides& s = in.weights_strides;
  const S* rows = static_cast<const S*>(in.weights) + tile.image * s.batch + tile.first * s.column;
  V value[kLanes<C>] = {}, winner[kLanes<C>] = {};  // a class as C: float holds those below 2^24
  const V lanes = lane_numbers<C>();
  for (int64_t r = 0; r < tile.count; ++r) {
    const S* row = rows + r * s.column;
    V best = load(row), at{};
    for_channel_blocks<C>(in.classes, [&](int64_t k) {
      const V next = load(row + k);
      const auto better = ~(next <= best) & (best == best);
      at = better ? V{} + static_cast<C>(k) : at;
      best = better ? next : best;
    });
    value[r] = best;
    winner[r] = at + lanes;
  }
  transpose<C>(value);
  transpose<C>(winner);
  V best = value[0], at = winner[0];
  for (int64_t i = 1; i < kLanes<C>; ++i) {
    const V next = value[i];
    const auto same = (next == best) | (~(next == next) & ~(best == best));
    const auto better = (~(next <= best) & (best == best)) | (same & (winner[i] < at));
    at = better ? winner[i] : at;
    best = better ? next : best;
  }
  for (int64_t r = 0; r < tile.count; ++r) labels[r] = static_cast<int32_t>(at[r]);
}

// out [B][N][K] = softmax over classes of scale Q + logs, with the log-sum-exp of each row.
template <typename S>
void softmax_rows(const ClassRankInput& in, const Tile& tile, const Compute<S>* logs, void* out,
                  Compute<S>* lse) {
  using C = Compute<S>;
  using V = Vector<C>;
  const MapStrides& s = in.query_strides;
  const S* rows = static_cast<const S*>(in.query) + tile.image * s.batch + tile.first * s.column;
  const int64_t at = tile.image * in.pixels + tile.first, K = in.classes;
  const C scale = static_cast<C>(in.scale);
  Scratch scratch(kLanes<C> * K * static_cast<int64_t>(sizeof(C)));
  C* scores = scratch.as<C>();

  V largest[kLanes<C>] = {};
  for (int64_t r = 0; r < tile.count; ++r) {
    V m = V{} - std::numeric_limits<C>::infinity();
    for_channel_blocks<C>(K, [&](int64_t k) {
      const V score = scale * load(rows + r * s.column + k) + load(logs + k);
      m = maximum(score, m);
      store(scores + r * K + k, score);
    });
    largest[r] = m;
  }
  transpose<C>(largest);
  for (int64_t i = 1; i < kLanes<C>; ++i) largest[0] = maximum(largest[i], largest[0]);

  // In the last vector, the lanes that the one before it already has do not count.
  const C overlap = static_cast<C>((kLanes<C> - K % kLanes<C>) % kLanes<C>);
  const auto counts = lane_numbers<C>() >= V{} + overlap;
  V sum[kLanes<C>] = {};
  for (int64_t r = 0; r < tile.count; ++r) {
    C* row = scores + r * K;
    const C m = largest[0][r];
    V total{};
    int64_t k = 0;
    for (; k + kLanes<C> <= K; k += kLanes<C>) {
      const V e = exponential(load(row + k) - m);
      total += e;
      store(row + k, e);
    }
    if (k < K) {  // the first lanes of this vector are exponentials already
      const V e = exponential(load(row + K - kLanes<C>) - m);
      total += counts ? e : V{};
      store(row + K - kLanes<C>, counts ? e : load(row + K - kLanes<C>));
    }
    sum[r] = total;
  }
  transpose<C>(sum);
  for (int64_t i = 1; i < kLanes<C>; ++i) sum[0] += sum[i];

  const V inverse = C(1) / sum[0];
  for (int64_t r = 0; r < tile.count; ++r) {
    S* to = static_cast<S*>(out) + (at + r) * K;
    for_channel_blocks<C>(K,
                          [&](int64_t k) { store(to + k, load(scores + r * K + k) * inverse[r]); });
    const C m = largest[0][r];
    lse[at + r] = std::isinf(m) ? m : m + std::log(sum[0][r]);
  }
}

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
