// How a thread walks over the logits for the gradient, and where its sums go.
//
// Cell (y, x) is the set of output pixels that interpolate between low-resolution pixels y, y + 1
// and x, x + 1. Every pixel is in one cell. A block has a tile of cells, and a thread walks down
// one of its columns of cells for a few classes. Their four logits and the sums for the four
// corners stay in registers. The sums of the columns are added in shared memory; those of
// low-resolution pixels on the borders of tiles are added by a later launch (cuda_gather.cuh), in a
// fixed order.
#pragma once

#include "upsample_cross_entropy/cuda_forward.cuh"

namespace mcibi_fast {

inline constexpr int kMaxWalks = 16;  // columns of cells in a tile
inline constexpr int kMaxCells = 8;   // cells in such a column

// How the cells are divided into tiles.
struct TilePlan {
  int walks, cells;           // in a tile
  int tiles_y, tiles_x;       // in an image
  int groups, group_classes;  // the classes may be divided too
  int lanes;                  // threads on one walk

  int threads() const { return (walks * lanes + 31) / 32 * 32; }
};

// A block's tile: its image, its number, its first cell, its group of classes.
struct TilePlace {
  int b, tile_y, tile_x, cell_y, cell_x, group;

  __device__ TilePlace(const TilePlan& plan, int block) {
    const int tile = block / plan.groups;
    group = block - tile * plan.groups;
    tile_x = tile % plan.tiles_x;
    tile_y = tile / plan.tiles_x % plan.tiles_y;
    b = tile / plan.tiles_x / plan.tiles_y;
    cell_y = tile_y * plan.cells;
    cell_x = tile_x * plan.walks;
  }
};

// The first output pixels of a tile's cells, in shared memory.
struct CellBegins {
  int y[kMaxCells + 1], x[kMaxWalks + 1];

  // Called by all threads, with a barrier after it.
  template <typename T>
  __device__ void find(const BilinearAxis<T>& y_axis, const BilinearAxis<T>& x_axis,
                       const TilePlan& plan, const TilePlace& place) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread <= plan.cells) y[thread] = bilinear_first_output(y_axis, place.cell_y + thread);
    if (thread <= plan.walks) x[thread] = bilinear_first_output(x_axis, place.cell_x + thread);
  }
};

// The weight with which the forward interpolates output i.
template <typename T>
__device__ __forceinline__ T far_weight(const BilinearAxis<T>& axis, int i) {
  return without_zero(bilinear_tap(axis, i)).weight1;
}

// The sums of a walk for the low-resolution rows that it passes: [left, right][row][class].
template <typename T>
struct WalkSums {
  T* data;
  int rows, width;

  __device__ T& at(int side, int row, int k) const { return data[(side * rows + row) * width + k]; }
};

// What a thread has of the cell where it is on its walk, for `kClasses` classes. `Walk`, which
// derives from it, reads a row of the logits for all of them: read_row(y, rows).
template <typename Walk, typename T, int kClasses>
class CellWalk {
 protected:
  // The logits of a low-resolution row in the left and the right column.
  struct Row {
    T left, right;
  };
  // Sums for a low-resolution row: of both columns, and of the right column.
  struct Sums {
    T both, right;
  };
  struct Corners {
    Row upper, lower;
    Sums upper_sums, lower_sums;
  };

  __device__ CellWalk(int lanes, int lane, int y, int height, bool one_row_alone)
      : lanes_(lanes), lane_(lane), first_y_(y), height_(height), one_row_alone_(one_row_alone) {}

  // Goes to the first cell.
  __device__ __forceinline__ void start() {
    cell_ = 0;
    Row upper[kClasses];
    read(first_y_, upper);
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      corners_[j].lower = upper[j];
      corners_[j].lower_sums = {T(0), T(0)};
    }
    go_down();
  }

  // Goes to the next cell and stores the sums of the row that it leaves; with `add`, it adds them
  // to those that are stored.
  __device__ __forceinline__ void next_cell(bool add, const WalkSums<T>& sums) {
    store_upper(add, sums);
    ++cell_;
    go_down();
  }

  __device__ __forceinline__ void store_upper(bool add, const WalkSums<T>& sums) {
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      const Sums& s = corners_[j].upper_sums;
      const int k = lane_ + j * lanes_;
      T& left = sums.at(0, cell_, k);
      T& right = sums.at(1, cell_, k);
      left = (add ? left : T(0)) + (s.both - s.right);
      right = (add ? right : T(0)) + s.right;
    }
  }

  // Adds the sums of one column of pixels: of all, and with the weights of the lower row.
  __device__ __forceinline__ void add_column_sums(int j, T both, T far, T right) {
    // A NaN must not reach a neighbour that was not interpolated, not even times 0.
    if (one_row_) far = T(0);
    add_sums(corners_[j].upper_sums, both - far, right);
    add_sums(corners_[j].lower_sums, far, right);
  }

  int lanes_, lane_, first_y_, height_, cell_ = 0;
  bool one_row_alone_;       // every cell has one row
  bool one_row_ = false;     // the cell has no lower row
  bool one_column_ = false;  // the walk has no right column
  Corners corners_[kClasses];

 private:
  __device__ __forceinline__ void read(int y, Row (&rows)[kClasses]) const {
    static_cast<const Walk*>(this)->read_row(min(y, height_ - 1), rows);
  }

  // The lower row of the cell above becomes the upper row.
  __device__ __forceinline__ void go_down() {
    Row lower[kClasses];
    read(first_y_ + cell_ + 1, lower);
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      Corners& c = corners_[j];
      c.upper = c.lower;
      c.lower = lower[j];
      c.upper_sums = c.lower_sums;
      c.lower_sums = {T(0), T(0)};
    }
    one_row_ = one_row_alone_ || first_y_ + cell_ >= height_ - 1;
  }

  __device__ __forceinline__ void add_sums(Sums& sums, T d, T right) {
    sums.both += d;
    if (!one_column_) sums.right = fused_multiply_add(right, d, sums.right);
  }
};

// Called by all threads: adds what the walks have for the low-resolution columns between them.
// input.sums: (B, tiles_y * (cells + 1), tiles_x * (walks + 1), K).
template <typename Input, typename T>
__device__ __forceinline__ void write_tile_sums(const Input& input, const TilePlace& place,
                                                int classes_of_walk, const T* sums) {
  const TilePlan& plan = input.plan;
  const int first = place.group * plan.group_classes;
  const int count = min(plan.group_classes, input.classes - first);
  const int rows = plan.cells + 1, columns = plan.walks + 1, width = classes_of_walk * plan.lanes;
  const FastDivisor by_count(count), by_columns(columns);
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns * count;
       i += static_cast<int>(blockDim.x)) {
    const int at = by_count.quotient(i), k = i - at * count;
    const int row = by_columns.quotient(at), column = at - row * columns;
    if (place.cell_y + row >= input.y_axis.in_size || place.cell_x + column >= input.x_axis.in_size)
      continue;
    T sum = T(0);
    if (column > 0) sum += sums[((2 * column - 1) * rows + row) * width + k];
    if (column < plan.walks) sum += sums[(2 * column * rows + row) * width + k];
    const int64_t out_y = static_cast<int64_t>(place.b * plan.tiles_y + place.tile_y) * rows + row;
    const int64_t out_x = static_cast<int64_t>(place.tile_x) * columns + column;
    input.sums[(out_y * plan.tiles_x * columns + out_x) * input.classes + first + k] = sum;
  }
}

}  // namespace mcibi_fast
