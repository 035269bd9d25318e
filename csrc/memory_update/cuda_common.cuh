// What the CUDA kernels of the memory update share: how the work is divided, and how A = U^T
// onehot(GT) is stored.
//
// The low-resolution pixels of each image are divided into tiles of 64, 16 columns by 4 rows where
// the image is as wide: fewer classes meet in such a tile than in 64 pixels of a row (2.7 instead
// of 3.9 on CamVid at 64x64), and it has fewer neighbours. A tile's part of A is stored by class:
// every class that gives weight to the tile has a slot with its 64 weights, row by row, in
// ascending order of the classes. A tile may have every class, so room for all tiles would be as
// large as the one-hot labels of the low-resolution pixels: the tiles are taken in groups, one
// after another, whose part of A takes at most kMostWeightBytes.
#pragma once

#include "common/bilinear.h"
#include "common/device_intrinsics.cuh"
#include "common/labels.cuh"
#include "common/launch.cuh"
#include "memory_update/api.h"

namespace mcibi_fast {

inline constexpr int kTile = 64;            // low-resolution pixels
inline constexpr int kMostColumns = 16;     // of a tile: 32 bytes of a row in 16 bits, a sector
inline constexpr int kChannelChunk = 64;    // channels of one block
inline constexpr int kUpdateThreads = 256;  // of every block
inline constexpr int kWarps = kUpdateThreads / 32;
inline constexpr int kMaxSlices = 384;  // of a group: about three blocks on each of 132 SMs
#ifndef MCIBI_MOST_WEIGHT_BYTES         // tests make it small
#define MCIBI_MOST_WEIGHT_BYTES (32 << 20)
#endif
inline constexpr int64_t kMostWeightBytes = MCIBI_MOST_WEIGHT_BYTES;

struct alignas(8) Slot {
  int label;  // the class
  int count;  // full-resolution pixels of the class in the tile's cells (cuda_class_weights.cuh)
};

// Of one group of tiles, which are numbered from 0 on.
template <typename T>
struct ClassWeights {
  T* weights;        // (tiles, K, 64); only the first slot_counts rows of a tile are written
  Slot* slots;       // (tiles, K)
  int* slot_counts;  // (tiles,)
  int classes;       // K
  int first_tile;    // the group's first one among all tiles

  __device__ T* weight_row(int tile, int slot) const {
    return weights + (static_cast<int64_t>(tile) * classes + slot) * kTile;
  }
  __device__ Slot* slot(int tile, int slot) const {
    return slots + static_cast<int64_t>(tile) * classes + slot;
  }
};

// Sums over each slice of the tiles of all groups, per class. If there is one group, the sums of a
// class with count -1 are not written.
template <typename T>
struct PartialSums {
  T* sums;          // (slices, K, Z)
  int64_t* counts;  // (slices, K); -1: the class has no weight in the slice
  int slices;
  bool grouped;  // there are several groups
};

// The pixels of one tile, numbered row by row. At the right and the lower border of the image some
// of them are outside.
struct PixelTile {
  int image;
  int y0, x0;         // of the first one
  int columns_log2;   // of its columns
  int height, width;  // of the image

  __device__ int columns() const { return 1 << columns_log2; }
  __device__ int y(int pixel) const { return y0 + (pixel >> columns_log2); }
  __device__ int x(int pixel) const { return x0 + (pixel & (columns() - 1)); }
  __device__ bool has(int pixel) const { return y(pixel) < height && x(pixel) < width; }
};

// How images are divided into tiles.
struct TileGrid {
  int height, width;  // of an image
  int columns_log2;   // of a tile
  int across;         // tiles side by side
  int per_image;

  // Tile `number` of all images.
  __device__ PixelTile tile(int number) const {
    const int image = number / per_image, in_image = number - image * per_image;
    const int row = in_image / across, column = in_image - row * across;
    return {image, row * (kTile >> columns_log2), column << columns_log2, columns_log2, height,
            width};
  }
};

inline TileGrid make_tile_grid(int64_t height, int64_t width) {
  int columns_log2 = 0;
  while ((1 << columns_log2) < kMostColumns && (1 << columns_log2) < width) ++columns_log2;
  const int64_t across = ceil_div(width, int64_t{1} << columns_log2);
  const int64_t down = ceil_div(height, int64_t{kTile} >> columns_log2);
  return {static_cast<int>(height), static_cast<int>(width), columns_log2, static_cast<int>(across),
          static_cast<int>(across * down)};
}

struct TilePlan {
  TileGrid grid;
  int tiles;
  int channel_chunks;
  int slices;       // of each group
  int group_tiles;  // in a group; the last one may have fewer
};

// Depends on the sizes alone, so that results do not differ between devices.
inline TilePlan make_tile_plan(int64_t batch, int64_t channels, int64_t height, int64_t width,
                               int64_t classes, int64_t weight_size) {
  const TileGrid grid = make_tile_grid(height, width);
  const int64_t tiles = batch * grid.per_image;
  const int64_t chunks = ceil_div(channels, kChannelChunk);
  const int64_t slices = ceil_div(kMaxSlices, chunks);
  const int64_t fitting = kMostWeightBytes / (classes * kTile * weight_size);
  const int64_t group = ceil_div(tiles, ceil_div(tiles, fitting > 0 ? fitting : 1));
  return {grid, static_cast<int>(tiles), static_cast<int>(chunks),
          static_cast<int>(slices < group ? slices : group), static_cast<int>(group)};
}

// Hands out pieces of one allocation; with a null base it only adds up their sizes.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    const size_t begin = used_;
    used_ += ceil_div(static_cast<size_t>(count) * sizeof(T), kAlignment) * kAlignment;
    return reinterpret_cast<T*>(base_ + begin);
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlignment = 256;
  uintptr_t base_;
  size_t used_ = 0;
};

template <typename T>
ClassWeights<T> take_class_weights(Arena& arena, const TilePlan& plan, int64_t classes) {
  ClassWeights<T> a;
  a.weights = arena.take<T>(plan.group_tiles * classes * kTile);
  a.slots = arena.take<Slot>(plan.group_tiles * classes);
  a.slot_counts = arena.take<int>(plan.group_tiles);
  a.classes = static_cast<int>(classes);
  a.first_tile = 0;
  return a;
}

template <typename T>
PartialSums<T> take_partial_sums(Arena& arena, const TilePlan& plan, int64_t classes,
                                 int64_t channels) {
  PartialSums<T> partial;
  partial.sums = arena.take<T>(plan.slices * classes * channels);
  partial.counts = arena.take<int64_t>(plan.slices * classes);
  partial.slices = plan.slices;
  partial.grouped = plan.group_tiles < plan.tiles;
  return partial;
}

}  // namespace mcibi_fast
