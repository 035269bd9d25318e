// The last launch of a backward adds up the tiles' sums, in the dtype and layout of the logits.
#pragma once

#include "upsample_cross_entropy/cuda_walk.cuh"

namespace mcibi_fast {

inline constexpr int kGatherSide = 32;  // pixels, and classes, of a block
inline constexpr int kGatherThreads = 256;

template <typename Element>
struct GatherInput {
  using T = Compute<Element>;
  const T* sums;
  const T* factor;  // of the sums, or null for 1
  TilePlan plan;
  Element* grad;
  MapStrides strides;
  int classes, height, width;
  int tiles_k, tiles_x;  // of kGatherSide

  // The sum for a low-resolution pixel. On the upper or left border of its tile, it includes the
  // last row or column of the tiles there.
  __device__ __forceinline__ T sum(int b, int y, int x, int k) const {
    const int tile_y = y / plan.cells, tile_x = x / plan.walks;
    const int64_t row = static_cast<int64_t>(b * plan.tiles_y + tile_y) * (plan.cells + 1) +
                        (y - tile_y * plan.cells);
    const int64_t column =
        static_cast<int64_t>(tile_x) * (plan.walks + 1) + (x - tile_x * plan.walks);
    const int64_t next_column = classes, next_row = next_column * plan.tiles_x * (plan.walks + 1);
    const T* at = sums + row * next_row + column * next_column + k;
    const bool above = y > 0 && y == tile_y * plan.cells;
    const bool left = x > 0 && x == tile_x * plan.walks;
    T total = at[0];
    if (left) total += at[-next_column];
    if (above) total += at[-next_row];
    if (above && left) total += at[-next_row - next_column];
    return total;
  }
};

// Grid: one block for each row, 32 pixels in it and 32 classes.
template <typename Element>
__global__ void __launch_bounds__(kGatherThreads)
    cross_entropy_gather_kernel(GatherInput<Element> input) {
  using T = Compute<Element>;
  MCIBI_SHARED(tile, T[kGatherSide][kGatherSide + 1]);  // [pixel][class]
  const int lane = static_cast<int>(threadIdx.x) % kGatherSide;
  const int across = static_cast<int>(threadIdx.x) / kGatherSide;
  constexpr int kStep = kGatherThreads / kGatherSide;
  int64_t rest = blockIdx.x;
  const int k0 = static_cast<int>(rest % input.tiles_k) * kGatherSide;
  rest /= input.tiles_k;
  const int x0 = static_cast<int>(rest % input.tiles_x) * kGatherSide;
  rest /= input.tiles_x;
  const T factor = input.factor == nullptr ? T(1) : *input.factor;
  const int b = static_cast<int>(rest / input.height), y = static_cast<int>(rest % input.height);
  for (int i = across; i < kGatherSide; i += kStep) {
    if (x0 + i >= input.width || k0 + lane >= input.classes) continue;
    const T sum = input.sum(b, y, x0 + i, k0 + lane);
    // 0 times infinity is 0 here: what does not count has no gradient.
    tile[i][lane] = factor == T(0) || sum == T(0) ? T(0) : sum * factor;
  }
  __syncthreads();  // warps read along classes and may write along pixels
  const bool classes_first = input.strides.channel == 1;
  Element* row = input.grad + b * input.strides.batch + y * input.strides.row;
  for (int i = across; i < kGatherSide; i += kStep) {
    const int pixel = classes_first ? i : lane, k = classes_first ? lane : i;
    if (x0 + pixel < input.width && k0 + k < input.classes)
      row[(x0 + pixel) * input.strides.column + (k0 + k) * input.strides.channel] =
          narrow<Element>(tile[pixel][k]);
  }
}

}  // namespace mcibi_fast
