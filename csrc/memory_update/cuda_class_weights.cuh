// A = U^T onehot(GT) from the labels, for one tile of 64 low-resolution pixels in each block.
//
// Cell (y, x) is the set of full-resolution pixels whose bilinear source is in [y, y+1) x [x, x+1)
// (index0 of both axes). Every label is in one cell and gives weight to its cell's four corners, so
// that a low-resolution pixel gets weight from four cells: its own, the left, the upper and the
// upper left one. Groups of 8 or 32 lanes read a cell and list its classes, in ascending order,
// with the weight of each at the corners. Most cells have one class: its weights are products of
// sums along the axes, for which no label is read a second time. If a cell has more classes than
// the list holds, looking up one of the others reads the cell again: slower, with the same result.
#pragma once

#include "memory_update/cuda_common.cuh"

namespace mcibi_fast {

inline constexpr int kNoLabel = 0x7fffffff;

struct alignas(16) CellRange {
  int y_begin, y_end, x_begin, x_end;  // full-resolution pixels
};

// Byte offsets in dynamic shared memory.
struct WeightsShared {
  int ranges, distinct, labels, corners, present, histogram, slot_labels, bytes;
};

template <typename T>
struct WeightsInput {
  const void* labels;
  int64_t stride_b, stride_y, stride_x;
  int64_t ignore_index;
  BilinearAxis<T> y_axis, x_axis;
  TileGrid grid;
  int cells;   // that a tile needs
  int listed;  // the most classes in a cell's list
  int group;   // lanes that share a cell
  WeightsShared shared;
  ClassWeights<T> out;
  LabelFlag flag;
};

// The cells of a tile: those of its pixels, and one more column and row before them.
inline int cells_of_tile(const TileGrid& grid) {
  return ((1 << grid.columns_log2) + 1) * ((kTile >> grid.columns_log2) + 1);
}

// The weights of index0 and index0 + 1 at a full-resolution position. At the border index0 gets
// both.
template <typename T>
struct Sides {
  T near_side, far_side;
};
template <typename T>
__device__ Sides<T> sides(const BilinearAxis<T>& axis, int i) {
  const BilinearTap<T> tap = bilinear_tap(axis, i);
  if (tap.index0 == tap.index1) return {tap.weight0 + tap.weight1, T(0)};
  return {tap.weight0, tap.weight1};
}

template <typename Label>
struct LabelImage {
  const Label* data;
  int64_t stride_y, stride_x, ignore_index;
  int classes;

  __device__ int64_t value(int y, int x) const {
    return static_cast<int64_t>(data[y * stride_y + x * stride_x]);
  }
  __device__ bool is_class(int64_t value) const {
    return value >= 0 && value < classes && value != ignore_index;
  }
  // The class, or -1.
  __device__ int label(int y, int x) const {
    const int64_t v = value(y, x);
    return is_class(v) ? static_cast<int>(v) : -1;
  }
};

// The weights of a class at a cell's corners (near near, near far, far near, far far; y first).
template <typename T>
struct CellSums {
  T corner[4];
  int count;
  int next;  // the smallest larger class
};

// The sums over columns x_begin + first, + step, ... of the cell. Without branches, so that the
// loads of kRows rows are in flight together.
template <int kRows, typename Label, typename T>
__device__ __forceinline__ CellSums<T> sum_cell(const LabelImage<Label>& image,
                                                const WeightsInput<T>& input,
                                                const CellRange& range, int label, int first,
                                                int step) {
  CellSums<T> sums = {{T(0), T(0), T(0), T(0)}, 0, kNoLabel};
  for (int x = range.x_begin + first; x < range.x_end; x += step) {
    T near_sum = T(0), far_sum = T(0);
#pragma unroll kRows
    for (int y = range.y_begin; y < range.y_end; ++y) {
      const int other = image.label(y, x);
      const Sides<T> side = sides(input.y_axis, y);
      near_sum += other == label ? side.near_side : T(0);
      far_sum += other == label ? side.far_side : T(0);
      sums.count += other == label;
      sums.next = min(sums.next, other > label ? other : kNoLabel);
    }
    const Sides<T> side = sides(input.x_axis, x);
    sums.corner[0] += near_sum * side.near_side;
    sums.corner[1] += near_sum * side.far_side;
    sums.corner[2] += far_sum * side.near_side;
    sums.corner[3] += far_sum * side.far_side;
  }
  return sums;
}

// The smallest class among one lane's columns, and the largest; a label that is no class counts as
// kNoLabel, which is larger than any. So the two are equal where there is one class and nothing
// else, and where there is no class.
struct FirstLook {
  int smallest, largest;
};
template <typename Label>
__device__ __forceinline__ FirstLook look_at_cell(const LabelImage<Label>& image,
                                                  const CellRange& range, int first, int step) {
  FirstLook look = {kNoLabel, -1};
  const auto classes = static_cast<unsigned>(image.classes);
  const bool may_be_class = image.ignore_index == static_cast<int>(image.ignore_index);
  const int ignored = may_be_class ? static_cast<int>(image.ignore_index) : -1;
  for (int x = range.x_begin + first; x < range.x_end; x += step) {
    const Label* at = image.data + range.y_begin * image.stride_y + x * image.stride_x;
#pragma unroll 8
    for (int y = range.y_begin; y < range.y_end; ++y) {
      const Label value = *at;
      at += image.stride_y;
      const auto low = static_cast<int>(value);
      bool is_class = static_cast<unsigned>(low) < classes && low != ignored;
      if constexpr (sizeof(Label) == 8) is_class = is_class && value == low;
      const int label = is_class ? low : kNoLabel;
      look.smallest = min(look.smallest, label);
      look.largest = max(look.largest, label);
    }
  }
  return look;
}

// Reports the labels of one lane's columns that are neither classes nor ignored.
template <typename Label>
__device__ void report_cell(const LabelImage<Label>& image, const CellRange& range, int first,
                            int step, const LabelFlag& flag) {
  int count = 0;
  int64_t bad_value = 0;
  for (int x = range.x_begin + first; x < range.x_end; x += step) {
#pragma unroll 1
    for (int y = range.y_begin; y < range.y_end; ++y) {
      const int64_t value = image.value(y, x);
      if (image.is_class(value) || value == image.ignore_index) continue;
      ++count;
      bad_value = value;
    }
  }
  report_bad_labels(flag, count, bad_value);
}

// The sums of one axis's weights over [begin, end), in all lanes of a group that shares them.
template <typename T>
__device__ __forceinline__ Sides<T> sum_sides(const BilinearAxis<T>& axis, int begin, int end,
                                              int first, int group) {
  Sides<T> sum = {T(0), T(0)};
#pragma unroll 1
  for (int i = begin + first; i < end; i += group) {
    const Sides<T> side = sides(axis, i);
    sum.near_side += side.near_side;
    sum.far_side += side.far_side;
  }
  for (int offset = group / 2; offset > 0; offset /= 2) {
    sum.near_side += __shfl_xor_sync(kFullWarp, sum.near_side, offset);
    sum.far_side += __shfl_xor_sync(kFullWarp, sum.far_side, offset);
  }
  return sum;
}

// A cell all of whose labels are of one class.
template <typename T>
__device__ __forceinline__ CellSums<T> sum_whole_cell(const WeightsInput<T>& input,
                                                      const CellRange& range, int first) {
  const Sides<T> y = sum_sides(input.y_axis, range.y_begin, range.y_end, first, input.group);
  const Sides<T> x = sum_sides(input.x_axis, range.x_begin, range.x_end, first, input.group);
  return {{y.near_side * x.near_side, y.near_side * x.far_side, y.far_side * x.near_side,
           y.far_side * x.far_side},
          (range.y_end - range.y_begin) * (range.x_end - range.x_begin),
          kNoLabel};
}

// sum_cell over the whole group of lanes; each has the sums.
template <typename Label, typename T>
__device__ __forceinline__ CellSums<T> sum_mixed_cell(const LabelImage<Label>& image,
                                                      const WeightsInput<T>& input,
                                                      const CellRange& range, int label,
                                                      int first) {
  CellSums<T> sums = sum_cell<4>(image, input, range, label, first, input.group);
  for (int offset = input.group / 2; offset > 0; offset /= 2) {
    for (T& corner : sums.corner) corner += __shfl_xor_sync(kFullWarp, corner, offset);
    sums.count += __shfl_xor_sync(kFullWarp, sums.count, offset);
    sums.next = min(sums.next, __shfl_xor_sync(kFullWarp, sums.next, offset));
  }
  return sums;
}

// The cells of a tile, numbered row by row. Those outside the image are empty.
struct TileCells {
  PixelTile tile;

  __device__ int across() const { return tile.columns() + 1; }
  // Of the low-resolution pixel with the coordinates of a cell; -1 before the image.
  __device__ int y(int cell) const { return tile.y0 - 1 + cell / across(); }
  __device__ int x(int cell) const { return tile.x0 - 1 + cell % across(); }
  // Whether the cell is that of one of the tile's pixels, not of a neighbour before them.
  __device__ bool own(int cell) const { return cell >= across() && cell % across() != 0; }
  // The cell of the tile's pixel, or of its neighbour before it by (dy, dx).
  __device__ int cell_of(int pixel, int dy, int dx) const {
    return (tile.y(pixel) - tile.y0 + 1 - dy) * across() + tile.x(pixel) - tile.x0 + 1 - dx;
  }
};

// Reads every cell. Writes the lists of its classes with their corner weights, the set of classes
// present in the tile, and their counts.
template <typename Label, typename T>
__device__ void list_cells(const LabelImage<Label>& image, const WeightsInput<T>& input,
                           const TileCells& cells, unsigned char* shared) {
  const auto* ranges = reinterpret_cast<const CellRange*>(shared + input.shared.ranges);
  auto* distinct = reinterpret_cast<int*>(shared + input.shared.distinct);
  auto* labels = reinterpret_cast<int*>(shared + input.shared.labels);
  auto* corners = reinterpret_cast<T*>(shared + input.shared.corners);
  auto* present = reinterpret_cast<unsigned*>(shared + input.shared.present);
  auto* histogram = reinterpret_cast<int*>(shared + input.shared.histogram);
  const int group = input.group, lane = static_cast<int>(threadIdx.x) % 32;
  const int first = lane % group, cells_per_warp = 32 / group;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int base = warp * cells_per_warp; base < input.cells; base += kWarps * cells_per_warp) {
    const int cell = base + lane / group;
    const bool real = cell < input.cells;
    const CellRange range = real ? ranges[cell] : CellRange{0, 0, 0, 0};
    const bool own = cells.own(cell);
    FirstLook look = look_at_cell(image, range, first, group);
    if (own && look.largest == kNoLabel) report_cell(image, range, first, group, input.flag);
    for (int offset = group / 2; offset > 0; offset /= 2) {
      look.smallest = min(look.smallest, __shfl_xor_sync(kFullWarp, look.smallest, offset));
      look.largest = max(look.largest, __shfl_xor_sync(kFullWarp, look.largest, offset));
    }
    int label = look.smallest, found = 0;
    const bool whole = __all_sync(kFullWarp, look.smallest >= look.largest);
    while (__any_sync(kFullWarp, label != kNoLabel)) {
      const CellSums<T> sums = whole ? sum_whole_cell(input, range, first)
                                     : sum_mixed_cell(image, input, range, label, first);
      if (first == 0 && label != kNoLabel) {
        atomicOr(&present[label / 32], 1u << (label % 32));
        if (own) atomicAdd(&histogram[label], sums.count);
        if (found < input.listed) {
          const int entry = cell * input.listed + found;
          labels[entry] = label;
          for (int i = 0; i < 4; ++i) corners[4 * entry + i] = sums.corner[i];
        }
        ++found;
      }
      label = label == kNoLabel ? kNoLabel : sums.next;
    }
    if (first == 0 && real) distinct[cell] = found;
  }
}

// The weight of `label` at one corner of a cell.
template <typename Label, typename T>
__device__ T corner_weight(const LabelImage<Label>& image, const WeightsInput<T>& input,
                           const unsigned char* shared, int cell, int corner, int label) {
  const int distinct = reinterpret_cast<const int*>(shared + input.shared.distinct)[cell];
  const int first = cell * input.listed;
  const auto* labels = reinterpret_cast<const int*>(shared + input.shared.labels) + first;
  const auto* corners = reinterpret_cast<const T*>(shared + input.shared.corners) + 4 * first;
  for (int i = 0; i < distinct && i < input.listed; ++i) {
    if (labels[i] == label) return corners[4 * i + corner];
    if (labels[i] > label) return T(0);
  }
  if (distinct <= input.listed) return T(0);
  const auto* ranges = reinterpret_cast<const CellRange*>(shared + input.shared.ranges);
  const CellSums<T> sums = sum_cell<1>(image, input, ranges[cell], label, 0, 1);
  return corner == 0   ? sums.corner[0]  // a dynamic index would put it into local memory
         : corner == 1 ? sums.corner[1]
         : corner == 2 ? sums.corner[2]
                       : sums.corner[3];
}

// A[pixel, label].
template <typename Label, typename T>
__device__ T pixel_weight(const LabelImage<Label>& image, const WeightsInput<T>& input,
                          const TileCells& cells, const unsigned char* shared, int pixel,
                          int label) {
  T weight = T(0);
#pragma unroll 1
  for (int corner = 0; corner < 4; ++corner) {
    const int cell = cells.cell_of(pixel, corner / 2, corner % 2);
    weight += corner_weight(image, input, shared, cell, corner, label);
  }
  return weight;
}

// Gives the classes present their slots, in ascending order; returns the number of slots.
template <typename T>
__device__ int number_slots(const WeightsInput<T>& input, unsigned char* shared) {
  const auto* present = reinterpret_cast<const unsigned*>(shared + input.shared.present);
  auto* slot_labels = reinterpret_cast<int*>(shared + input.shared.slot_labels);
  const int words = ceil_div(input.out.classes, 32);
  int slots = 0;
  for (int word = 0; word < words; ++word) {
    unsigned bits = present[word];
    if (word % kUpdateThreads == static_cast<int>(threadIdx.x)) {
      int slot = slots;
      for (unsigned rest = bits; rest != 0; rest &= rest - 1)
        slot_labels[slot++] = 32 * word + __ffs(static_cast<int>(rest)) - 1;
    }
    slots += __popc(bits);
  }
  return slots;
}

// Grid: one block for each tile of a group.
template <typename Label, typename T>
__global__ void __launch_bounds__(kUpdateThreads, sizeof(T) == 8 ? 3 : 4)
    class_weights_kernel(WeightsInput<T> input) {
  MCIBI_DYNAMIC_SHARED(shared);
  const int tile_index = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const PixelTile tile = input.grid.tile(input.out.first_tile + tile_index);
  const TileCells cells = {tile};
  const LabelImage<Label> image = {
      static_cast<const Label*>(input.labels) + tile.image * input.stride_b, input.stride_y,
      input.stride_x, input.ignore_index, input.out.classes};
  auto* ranges = reinterpret_cast<CellRange*>(shared + input.shared.ranges);
  auto* present = reinterpret_cast<unsigned*>(shared + input.shared.present);
  auto* histogram = reinterpret_cast<int*>(shared + input.shared.histogram);
  for (int cell = thread; cell < input.cells; cell += kUpdateThreads) {
    const int y = cells.y(cell), x = cells.x(cell);
    ranges[cell] = {0, 0, 0, 0};
    if (y >= 0 && y < tile.height && x >= 0 && x < tile.width)
      ranges[cell] = {
          bilinear_first_output(input.y_axis, y), bilinear_first_output(input.y_axis, y + 1),
          bilinear_first_output(input.x_axis, x), bilinear_first_output(input.x_axis, x + 1)};
  }
  for (int i = thread; i < ceil_div(input.out.classes, 32); i += kUpdateThreads) present[i] = 0;
  for (int i = thread; i < input.out.classes; i += kUpdateThreads) histogram[i] = 0;
  __syncthreads();
  list_cells(image, input, cells, shared);
  __syncthreads();
  const int slots = number_slots(input, shared);
  if (thread == 0) input.out.slot_counts[tile_index] = slots;
  __syncthreads();
  const auto* slot_labels = reinterpret_cast<const int*>(shared + input.shared.slot_labels);
  const int lane = thread % 32;
  for (int slot = thread / 32; slot < slots; slot += kWarps) {
    const int label = slot_labels[slot];
#pragma unroll 1
    for (int i = lane; i < kTile; i += 32)
      input.out.weight_row(tile_index, slot)[i] =
          tile.has(i) ? pixel_weight(image, input, cells, shared, i, label) : T(0);
    if (lane == 0) *input.out.slot(tile_index, slot) = {label, histogram[label]};
  }
}

}  // namespace mcibi_fast
