// The tiles in which CUDA kernels go over bilinearly upsampled logits.
//
// A band is a set of at most 8 output rows that read the same two rows of the logits. A thread has
// one column of a band: for each class it interpolates horizontally twice, and then between the two
// results for each of its pixels. A block has 64 columns of 4 bands, with the logits around them in
// shared memory, some classes at a time. Where that does not pay (the output is smaller than the
// logits, or hardly larger), every output row is a band of its own and threads read global memory.
#pragma once

#include "common/bilinear.h"
#include "common/device_intrinsics.cuh"
#include "common/labels.cuh"
#include "common/launch.cuh"
#include "common/logit_map.h"

namespace mcibi_fast {

inline constexpr int kTileColumns = 64;
inline constexpr int kTileBands = 4;
inline constexpr int kTileThreads = kTileColumns * kTileBands;
inline constexpr int kBandRows = 8;
inline constexpr int kPatchValues = 4096;  // logits in shared memory

// ---- numbers ------------------------------------------------------------------------------------

__device__ __forceinline__ float maximum(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double maximum(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float minimum(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double minimum(double a, double b) { return fmin(a, b); }

// n / divisor by a multiplication; exact where n * divisor < 2^32.
struct FastDivisor {
  unsigned divisor, inverse;

  __device__ explicit FastDivisor(int d)
      : divisor(static_cast<unsigned>(d)), inverse(0xffffffffu / divisor + 1) {}
  __device__ __forceinline__ int quotient(int n) const {
    return divisor == 1 ? n : static_cast<int>(__umulhi(static_cast<unsigned>(n), inverse));
  }
};

// ---- tiles --------------------------------------------------------------------------------------

template <typename Element>
struct UpsampleInput {
  using T = Compute<Element>;
  const Element* logits;
  MapStrides strides;
  int classes;
  BilinearAxis<T> y_axis, x_axis;
  int bands_per_cell;         // 0: every output row is a band of its own
  int tiles_y, tiles_x;       // in an image
  int patch_classes;          // in shared memory at a time; a multiple of 4
  bool classes_are_adjacent;  // in memory, while pixels are not
};

struct Tile {
  int b, first_band, first_x;
};

template <typename Element>
__device__ Tile tile_at(const UpsampleInput<Element>& input, int64_t number) {
  const int64_t row = number / input.tiles_x;
  const int x = static_cast<int>(number - row * input.tiles_x);
  const int b = static_cast<int>(row / input.tiles_y);
  const int y = static_cast<int>(row - static_cast<int64_t>(b) * input.tiles_y);
  return {b, y * kTileBands, x * kTileColumns};
}

// Bands are parts of cells; cell j is the output rows whose index0 is j. Cell 0 has two parts, so
// that it is not taller than the others: part 0 is clamped to row 0, part 1 is the rest. The part
// of cell j > 0 is number j + 1.
template <typename T>
__device__ int part_begin(const BilinearAxis<T>& axis, int part) {
  if (part != 1) return part == 0 ? 0 : bilinear_first_output(axis, part - 1);
  if (axis.align_corners || !(axis.scale > T(0))) return 0;
  const int clamped = static_cast<int>(T(0.5) / axis.scale);
  return min(clamped, bilinear_first_output(axis, 1));
}

template <typename Element>
__device__ AxisRange band_rows(const UpsampleInput<Element>& input, int band) {
  const auto& axis = input.y_axis;
  if (input.bands_per_cell == 0) return {min(band, axis.out_size), min(band + 1, axis.out_size)};
  const int part = band / input.bands_per_cell, share = band - part * input.bands_per_cell;
  if (part > axis.in_size) return {axis.out_size, axis.out_size};
  const int begin = part_begin(axis, part);
  const int64_t rows = part_begin(axis, part + 1) - begin;
  return {begin + static_cast<int>(rows * share / input.bands_per_cell),
          begin + static_cast<int>(rows * (share + 1) / input.bands_per_cell)};
}

// Equal weights where both neighbours are the same, so that an infinite logit is not multiplied by
// zero.
template <typename T>
__device__ __forceinline__ BilinearTap<T> without_zero(BilinearTap<T> tap) {
  if (tap.index0 == tap.index1) tap.weight0 = tap.weight1 = T(0.5);
  return tap;
}

// One thread's pixels: `rows` rows, possibly none, of column x from row y on.
template <typename T, int kRows>
struct ThreadPixels {
  int y, x, rows;
  BilinearTap<T> column;
  int row0, row1;  // of the logits
  T far[kRows];    // the weight of row1
};

template <int kRows, typename Element, typename T = Compute<Element>>
__device__ __forceinline__ ThreadPixels<T, kRows> pixels_of_thread(
    const UpsampleInput<Element>& input, const Tile& tile) {
  const int thread = static_cast<int>(threadIdx.x);
  const AxisRange band = band_rows(input, tile.first_band + thread / kTileColumns);
  ThreadPixels<T, kRows> pixels;
  pixels.x = tile.first_x + thread % kTileColumns;
  pixels.y = band.begin;
  pixels.rows = pixels.x < input.x_axis.out_size ? band.end - band.begin : 0;
  pixels.column =
      without_zero(bilinear_tap(input.x_axis, min(pixels.x, input.x_axis.out_size - 1)));
#pragma unroll
  for (int r = kRows - 1; r >= 0; --r) {
    const auto tap =
        without_zero(bilinear_tap(input.y_axis, min(band.begin + r, input.y_axis.out_size - 1)));
    pixels.far[r] = tap.weight1;
    pixels.row0 = tap.index0;  // r = 0 comes last
    pixels.row1 = tap.index1;
  }
  return pixels;
}

// The four neighbours of a pixel in the logits, in shared or global memory, class after class.
template <typename Value>
struct Corners {
  const Value* corner[4];  // row0 left, right, row1 left, right
  int64_t stride;          // between classes

  __device__ __forceinline__ void skip(int classes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) corner[i] += classes * stride;
  }

  // Interpolates one class horizontally on both rows and moves on to the next.
  template <typename T>
  __device__ __forceinline__ void next(const BilinearTap<T>& column, T& row0, T& row1) {
    row0 = fused_multiply_add(column.weight1, T(widen(*corner[1])),
                              column.weight0 * T(widen(*corner[0])));
    row1 = fused_multiply_add(column.weight1, T(widen(*corner[3])),
                              column.weight0 * T(widen(*corner[2])));
    skip(1);
  }
};

template <typename Element, typename Pixels>
__device__ __forceinline__ Corners<Element> corners_in_map(const UpsampleInput<Element>& input,
                                                           int b, const Pixels& pixels) {
  const Element* image = input.logits + b * input.strides.batch;
  const Element* row0 = image + pixels.row0 * input.strides.row;
  const Element* row1 = image + pixels.row1 * input.strides.row;
  const int64_t left = pixels.column.index0 * input.strides.column;
  const int64_t right = pixels.column.index1 * input.strides.column;
  return {{row0 + left, row0 + right, row1 + left, row1 + right}, input.strides.channel};
}

// The logits around a tile in shared memory: [class][row][column].
template <typename T>
class Patch {
 public:
  template <typename Element>
  __device__ Patch(const UpsampleInput<Element>& input, const Tile& tile, T* values)
      : values_(values) {
    const int last_cell = input.y_axis.in_size - 1, last_x = input.x_axis.out_size - 1;
    const int last_band = tile.first_band + kTileBands - 1;
    row_ = max(tile.first_band / input.bands_per_cell - 1, 0);
    rows_ = min(max(last_band / input.bands_per_cell - 1, 0) + 1, last_cell) - row_ + 1;
    column_ = bilinear_tap(input.x_axis, tile.first_x).index0;
    const int end = min(tile.first_x + kTileColumns - 1, last_x);
    columns_ = bilinear_tap(input.x_axis, end).index1 - column_ + 1;
  }

  // Called by all threads, with a barrier before and after: loads classes first .. first + count -
  // 1, and `padding` for more classes up to a multiple of 4.
  template <typename Element>
  __device__ __forceinline__ void fill(const UpsampleInput<Element>& input, int b, int first,
                                       int count, T padding) const {
    const Element* from = input.logits + b * input.strides.batch + first * input.strides.channel +
                          row_ * input.strides.row + column_ * input.strides.column;
    const int area = rows_ * columns_;
    const FastDivisor by_count(count), by_columns(columns_), by_area(area);
    for (int i = static_cast<int>(threadIdx.x); i < count * area; i += kTileThreads) {
      int k, pixel;
      if (input.classes_are_adjacent) {
        pixel = by_count.quotient(i);
        k = i - pixel * count;
      } else {
        k = by_area.quotient(i);
        pixel = i - k * area;
      }
      const int row = by_columns.quotient(pixel), column = pixel - row * columns_;
      values_[k * area + pixel] = widen(from[k * input.strides.channel + row * input.strides.row +
                                             column * input.strides.column]);
    }
#pragma unroll 1
    for (int i = count * area + static_cast<int>(threadIdx.x); i < (count + 3) / 4 * 4 * area;
         i += kTileThreads)
      values_[i] = padding;
  }

  template <typename Pixels>
  __device__ __forceinline__ Corners<T> corners(const Pixels& pixels) const {
    const bool inside = pixels.rows > 0;  // the other threads read some value of the patch
    const T* row0 = values_ + (inside ? pixels.row0 - row_ : 0) * columns_;
    const T* row1 = values_ + (inside ? pixels.row1 - row_ : 0) * columns_;
    const int left = inside ? pixels.column.index0 - column_ : 0;
    const int right = inside ? pixels.column.index1 - column_ : 0;
    return {{row0 + left, row0 + right, row1 + left, row1 + right}, rows_ * columns_};
  }

 private:
  T* values_;
  int row_, rows_, column_, columns_;
};

// ---- host ---------------------------------------------------------------------------------------

template <typename Element>
UpsampleInput<Element> make_upsample_input(const LogitMap& logits, int64_t height, int64_t width,
                                           bool align_corners) {
  using T = Compute<Element>;
  UpsampleInput<Element> input;
  input.logits = static_cast<const Element*>(logits.data);
  input.strides = logits.strides;
  input.classes = static_cast<int>(logits.classes);
  input.y_axis = make_bilinear_axis<T>(logits.height, height, align_corners);
  input.x_axis = make_bilinear_axis<T>(logits.width, width, align_corners);
  input.classes_are_adjacent = logits.strides.channel == 1 && logits.strides.column != 1;
  input.bands_per_cell = 0;
  input.tiles_x = static_cast<int>(ceil_div(width, kTileColumns));
  input.tiles_y = static_cast<int>(ceil_div(height, kTileBands));
  input.patch_classes = 0;

  constexpr int64_t kExactSizes = 1 << 20;  // below this, no cell's border is off by rounding
  if (2 * height < 3 * logits.height || height >= kExactSizes || width >= kExactSizes) return input;
  const double scale = static_cast<double>(input.y_axis.scale);
  const double tallest = scale > 0 ? 1.0 / scale : static_cast<double>(height);
  const bool exact = tallest == static_cast<double>(static_cast<int64_t>(tallest)) &&
                     (static_cast<int64_t>(tallest) & (static_cast<int64_t>(tallest) - 1)) == 0;
  const int64_t rows = static_cast<int64_t>(tallest) + (exact ? 0 : 2);
  const int64_t per_cell = ceil_div(rows, kBandRows);
  const int64_t patch_rows = ceil_div(kTileBands - 1, per_cell) + 2;
  const double patch_columns =
      static_cast<double>(input.x_axis.scale) * static_cast<double>(kTileColumns - 1) + 3;
  const auto area = static_cast<int64_t>(patch_columns) *
                    (patch_rows < logits.height ? patch_rows : logits.height);
  const int64_t room = area > 0 ? kPatchValues / area / 4 * 4 : 0;
  if (room == 0) return input;
  const int64_t chunks = ceil_div(logits.classes, room);
  input.patch_classes = static_cast<int>(ceil_div(ceil_div(logits.classes, chunks), 4) * 4);
  input.bands_per_cell = static_cast<int>(per_cell);
  input.tiles_y = static_cast<int>(ceil_div((logits.height + 1) * per_cell, kTileBands));
  return input;
}

template <typename Element>
int64_t tiles_of(const UpsampleInput<Element>& input, int64_t batch) {
  return batch * input.tiles_y * input.tiles_x;
}

}  // namespace mcibi_fast
