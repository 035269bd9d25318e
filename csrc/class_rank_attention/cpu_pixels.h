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

// Calls f(tile) for all tiles of `size` pixels; `row_work` is the cost of one pixel in operations.
template <typename F>
void for_tiles(const ClassRankInput& in, int64_t row_work, const F& f, int64_t size = kTile) {
  const int64_t tiles = in.batch * ceil_div(in.pixels, size);
  parallel_for(tiles, 1 + (1 << 20) / (row_work * size), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) f(tile_at(index, in.pixels, size));
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
