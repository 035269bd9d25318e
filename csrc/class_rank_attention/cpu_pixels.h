// The pixels of class_rank_attention in tiles.
#pragma once

#include <cstdint>

#include "class_rank_attention/api.h"
#include "common/parallel.h"
#include "common/pixel_tiles.h"
#include "common/scratch.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

struct Tile {
  int64_t image, first, count;
};

// Calls f(tile) for all tiles of pixels; `row_work` is what one pixel costs, in operations.
template <typename F>
void for_tiles(const ClassRankInput& in, int64_t row_work, const F& f) {
  const int64_t tiles = ceil_div(in.pixels, kTile);
  parallel_for(in.batch * tiles, 1 + (1 << 20) / (row_work * kTile),
               [&](int64_t begin, int64_t end) {
                 for (int64_t index = begin; index < end; ++index) {
                   const int64_t first = index % tiles * kTile, left = in.pixels - first;
                   f(Tile{index / tiles, first, left < kTile ? left : kTile});
                 }
               });
}

template <typename S>
void load_pixels(const ClassRankInput& in, const void* source, const MapStrides& strides,
                 const Tile& tile, Compute<S>* to) {
  const S* image = static_cast<const S*>(source) + tile.image * strides.batch;
  load_tile(image, strides, in.pixels, in.classes, tile.first, tile.count, to);
}

template <typename S>
void store_pixels(const ClassRankInput& in, const Compute<S>* from, const Tile& tile, void* to) {
  S* image = static_cast<S*>(to) + tile.image * in.pixels * in.classes;
  store_tile(from, in.classes, tile.first, tile.count, in.pixels, true, image);
}

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
