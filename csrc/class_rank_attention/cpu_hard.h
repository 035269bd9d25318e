// The hard form of class_rank_attention: a softmax over classes, in O(N K).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "class_rank_attention/cpu_hard_rows.h"
#include "common/simd.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

// labels [B][N]: the first argmax of each row of W.
template <typename S>
void first_argmax(const ClassRankInput& in, int32_t* labels) {
  using C = Compute<S>;
  if (classes_side_by_side<S>(in, in.weights_strides)) {
    const auto argmax = [&](const Tile& tile) {
      argmax_rows<S>(in, tile, labels + tile.image * in.pixels + tile.first);
    };
    return for_tiles(in, in.classes, argmax, kLanes<C>);
  }
  for_tiles(in, in.classes, [&](const Tile& tile) {
    Scratch scratch(in.classes * kTile * static_cast<int64_t>(sizeof(C)));
    C* weights = scratch.as<C>();
    int64_t best[kTile];
    C largest[kTile];
    load_pixels<S>(in, in.weights, in.weights_strides, tile, weights);
    argmax_tile(weights, in.classes, best, largest);
    int32_t* to = labels + tile.image * in.pixels + tile.first;
    for (int64_t t = 0; t < tile.count; ++t) to[t] = static_cast<int32_t>(best[t]);
  });
}

// logs [B][K]: logarithm of the number of rows of W whose first argmax is the class, -inf for none.
template <typename S>
void log_counts(const ClassRankInput& in, Compute<S>* logs) {
  using C = Compute<S>;
  Scratch memory(in.batch * in.pixels * static_cast<int64_t>(sizeof(int32_t)));
  int32_t* labels = memory.as<int32_t>();
  first_argmax<S>(in, labels);
  Scratch counters(in.classes * static_cast<int64_t>(sizeof(int64_t)));
  int64_t* counts = counters.as<int64_t>();
  for (int64_t b = 0; b < in.batch; ++b, labels += in.pixels, logs += in.classes) {
    memset(counts, 0, static_cast<size_t>(in.classes) * sizeof(int64_t));
    for (int64_t n = 0; n < in.pixels; ++n) ++counts[labels[n]];
    for (int64_t k = 0; k < in.classes; ++k) logs[k] = std::log(static_cast<C>(counts[k]));
  }
}

template <typename S>
void attend_hard(const ClassRankInput& in, void* out, void* lse) {
  using C = Compute<S>;
  Scratch memory(in.batch * in.classes * static_cast<int64_t>(sizeof(C)));
  log_counts<S>(in, memory.as<C>());
  if (classes_side_by_side<S>(in, in.query_strides)) {
    const auto softmax = [&](const Tile& tile) {
      softmax_rows<S>(in, tile, memory.as<C>() + tile.image * in.classes, out,
                      static_cast<C*>(lse));
    };
    return for_tiles(in, 16 * in.classes, softmax, kLanes<C>);
  }
  for_tiles(in, 16 * in.classes, [&](const Tile& tile) {
    Scratch scratch(in.classes * kTile * static_cast<int64_t>(sizeof(C)));
    C* scores = scratch.as<C>();
    C statistic[kTile];
    const C scale = static_cast<C>(in.scale), *logs = memory.as<C>() + tile.image * in.classes;
    load_pixels<S>(in, in.query, in.query_strides, tile, scores);
    for (int64_t k = 0; k < in.classes; ++k) {
      C* row = scores + k * kTile;
      for (int64_t t = 0; t < kTile; ++t) row[t] = scale * row[t] + logs[k];
    }
    softmax_tile(scores, in.classes, kTile, statistic);
    store_pixels<S>(in, scores, tile, out);
    memcpy(static_cast<C*>(lse) + tile.image * in.pixels + tile.first, statistic,
           static_cast<size_t>(tile.count) * sizeof(C));
  });
}

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
