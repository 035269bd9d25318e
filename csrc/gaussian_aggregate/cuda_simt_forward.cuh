// out = W C_dl (Eq. 12) without tensor cores, for float32 (they are less accurate) and float64.
//
// Bytes: B N (K + Z) elements moved once (a second read of the logits hits the cache). Operations:
// 2 K Z per pixel, the limit in float32 from about K = 30 on. A block of 16 x 16 threads computes
// tiles of pixels x channels, kItems x kItems results per thread, from weights and table in shared
// memory.
#pragma once

#include "gaussian_aggregate/cuda_common.cuh"

namespace mcibi_fast {

inline constexpr int kSimtThreads = 256;
inline constexpr int kChunkClasses = 32;

template <typename Scalar>
struct SimtTile {
  static constexpr int kItems = sizeof(Scalar) == 4 ? 8 : 4;
  static constexpr int kSize = 16 * kItems;  // pixels, and channels
  static constexpr int kStride = kSize + 4;  // of a row of weights; spreads rows over the banks

  Scalar weights[kChunkClasses * kStride];
  // Per pixel: the largest logit and 1 / sum; if hard, scale is the first class with that logit.
  Scalar shift[kSize], scale[kSize];
};

struct ForwardSimtPlan {
  int channel_tiles;  // in a block's slice of Z
  bool resident;      // the slice of the table is staged once, not piece by piece for each tile
  bool hard;
};

// Loads kCount neighbours from shared memory aligned to 16 bytes.
template <int kCount, typename Scalar>
__device__ __forceinline__ void load_row(const Scalar* from, Scalar (&to)[kCount]) {
  constexpr int kVector = Vector<Scalar>::kSize;
  static_assert(kCount % kVector == 0, "whole vectors");
#pragma unroll
  for (int i = 0; i < kCount; i += kVector) {
    const auto v = *reinterpret_cast<const Vector<Scalar>*>(from + i);
#pragma unroll
    for (int j = 0; j < kVector; ++j) to[i + j] = v.values[j];
  }
}

// The weights W of a tile of pixels. A warp has an eighth of the pixels, and a lane has every
// kClassLanes-th class of a pixel. Neighbouring lanes are neighbouring pixels, or classes if
// channels_last.
template <typename Scalar, bool kChannelsLast>
class SimtWeights {
 public:
  __device__ SimtWeights(const Scalar* logits, const MapAddress& map, int classes, int batch,
                         int first, int pixels, bool hard, SimtTile<Scalar>& tile)
      : logits_(logits),
        map_(map),
        classes_(classes),
        batch_(batch),
        first_(first),
        pixels_(pixels),
        hard_(hard),
        tile_(tile) {
    const int lane = threadIdx.x % 32;
    class_ = kChannelsLast ? lane % kClassLanes : lane / kPixelLanes;
    pixel_ = threadIdx.x / 32 * (kPixels * kPixelLanes) +
             (kChannelsLast ? lane / kClassLanes : lane % kPixelLanes);
  }

  // Finds the statistics of the softmax and writes them to `lse` (of the tile's first pixel) if
  // that is not null.
  __device__ void normalise(Scalar* lse) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const Scalar* from = pixel_address(i);
      const int64_t stride = map_.strides.channel;
      Scalar largest = -INFINITY, sum = 0;
      int argmax = class_;
      for (int k = class_; k < classes_ && from != nullptr; k += kClassLanes) {
        const Scalar logit = from[k * stride];
        if (!exceeds(logit, largest)) continue;
        argmax = k;
        largest = logit;
      }
#pragma unroll
      for (int d = 1; d < kClassLanes; d *= 2) {
        const Scalar other = __shfl_xor_sync(kFullWarp, largest, d * kLaneStep);
        const int other_class = __shfl_xor_sync(kFullWarp, argmax, d * kLaneStep);
        const bool same = !exceeds(other, largest) && !exceeds(largest, other);
        if (exceeds(other, largest) || (same && other_class < argmax)) argmax = other_class;
        if (exceeds(other, largest)) largest = other;
      }
      const Scalar shift = largest == -INFINITY ? Scalar(0) : largest;  // then 0 / 0, as in torch
      for (int k = class_; k < classes_ && from != nullptr && !hard_; k += kClassLanes)
        sum += exp(from[k * stride] - shift);
#pragma unroll
      for (int d = 1; d < kClassLanes; d *= 2)
        sum += __shfl_xor_sync(kFullWarp, sum, d * kLaneStep);
      if (class_ != 0 || from == nullptr) continue;
      const int pixel = pixel_ + i * kPixelLanes;
      tile_.shift[pixel] = shift;
      tile_.scale[pixel] = hard_ ? Scalar(argmax) : 1 / sum;
      if (lse != nullptr) lse[pixel] = hard_ ? largest : largest + log(sum);
    }
  }

  // Writes the weights of classes k .. k + kChunkClasses - 1; zero after the last class.
  __device__ void form(int k) const {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const Scalar* from = pixel_address(i);
      const int pixel = pixel_ + i * kPixelLanes;
      const Scalar shift = tile_.shift[pixel], scale = tile_.scale[pixel];
      for (int c = class_; c < kChunkClasses; c += kClassLanes) {
        Scalar weight = 0;
        if (k + c < classes_ && from != nullptr)
          weight = hard_ ? Scalar(k + c == int(scale))
                         : exp(from[(k + c) * map_.strides.channel] - shift) * scale;
        tile_.weights[c * SimtTile<Scalar>::kStride + pixel] = weight;
      }
    }
  }

 private:
  static constexpr int kPixelLanes = kChannelsLast ? 8 : SimtTile<Scalar>::kSize / 8;
  static constexpr int kClassLanes = 32 / kPixelLanes;
  static constexpr int kLaneStep = kChannelsLast ? 1 : kPixelLanes;
  static constexpr int kPixels = SimtTile<Scalar>::kSize / 8 / kPixelLanes;

  // Null after the image's last pixel.
  __device__ __forceinline__ const Scalar* pixel_address(int i) const {
    const int pixel = first_ + pixel_ + i * kPixelLanes;
    return pixel < pixels_ ? logits_ + map_.pixel(batch_, pixel) : nullptr;
  }

  const Scalar* const logits_;
  const MapAddress& map_;
  const int classes_, batch_, first_, pixels_;
  const bool hard_;
  SimtTile<Scalar>& tile_;
  int class_, pixel_;
};

// Stages the table's classes k .. k + classes - 1 and `channels` channels from z on, a row per
// class.
template <bool kMany, typename Scalar>
__device__ __forceinline__ void stage_rows(Scalar* to, const GaussianTableCudaInput& input, int k,
                                           int classes, int z, int channels) {
  const int quads = channels / 4;
  const auto quad = [=](int item) { return Quad{k + item / quads, z + 4 * (item % quads)}; };
  const auto place = [=](int item, const Scalar(&c)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[4 * item + i] = c[i];
  };
  GaussianTable(input).for_each<kMany, Scalar>(classes * quads, quad, place);
}

// A block takes the tiles blockIdx.x + gridDim.x i and slice blockIdx.y of the channels. If
// contiguous, a thread's results are pixels tid % 16 + 16 i and channels kItems (tid / 16) + j; if
// channels_last, pixels and channels change places. So neighbouring threads write neighbours.
template <typename Scalar, bool kChannelsLast>
__global__ void __launch_bounds__(kSimtThreads, 2)
    forward_simt_kernel(const __grid_constant__ GaussianAggregateCudaInput input,
                        const __grid_constant__ MapAddress map,
                        const __grid_constant__ ForwardSimtPlan plan, Scalar* out, Scalar* lse) {
  using Tile = SimtTile<Scalar>;
  constexpr int kItems = Tile::kItems, kSize = Tile::kSize;
  MCIBI_DYNAMIC_SHARED(shared);
  Tile& shared_tile = *reinterpret_cast<Tile*>(shared);
  Scalar* const table = reinterpret_cast<Scalar*>(shared + sizeof(Tile));
  const int lane = threadIdx.x % 16, row = threadIdx.x / 16;
  const int classes = int(input.table.classes), channels = int(input.table.channels);
  const int pixels = int(input.height * input.width), per_image = ceil_div(pixels, kSize);
  const int first_z = kSize * plan.channel_tiles * blockIdx.y;
  const int channel_tiles = min(plan.channel_tiles, ceil_div(channels - first_z, kSize));
  const int table_stride = plan.resident ? kSize * channel_tiles : kSize;
  if (plan.resident) stage_rows<true>(table, input.table, 0, classes, first_z, table_stride);

  for (int tile = blockIdx.x; tile < input.batch * per_image; tile += gridDim.x) {
    const int batch = tile / per_image, first = tile % per_image * kSize;
    const int64_t first_of_all = int64_t(batch) * pixels + first;
    SimtWeights<Scalar, kChannelsLast> weights(static_cast<const Scalar*>(input.logits), map,
                                               classes, batch, first, pixels, plan.hard,
                                               shared_tile);
    weights.normalise(blockIdx.y == 0 ? lse + first_of_all : nullptr);
    for (int channel_tile = 0; channel_tile < channel_tiles; ++channel_tile) {
      const int z = first_z + kSize * channel_tile;
      Scalar acc[kItems][kItems] = {};  // [index along lanes][index along rows]
      for (int k = 0; k < classes; k += kChunkClasses) {
        const int chunk = min(classes - k, kChunkClasses);
        const bool form = channel_tile == 0 || classes > kChunkClasses;
        if (form || !plan.resident) {
          __syncthreads();
          if (form) weights.form(k);
          if (!plan.resident) stage_rows<false>(table, input.table, k, chunk, z, kSize);
          __syncthreads();
        }
        const Scalar* w = shared_tile.weights;
        const Scalar* t = table;
        if (plan.resident) t += k * table_stride + kSize * channel_tile;
        const Scalar* along_lanes = (kChannelsLast ? t : w) + lane;
        const Scalar* along_rows = (kChannelsLast ? w : t) + kItems * row;
        const int lanes_stride = kChannelsLast ? table_stride : Tile::kStride;
        const int rows_stride = kChannelsLast ? Tile::kStride : table_stride;
#pragma unroll 2
        for (int c = 0; c < chunk; ++c) {
          Scalar a[kItems], b[kItems];
          load_row(along_rows + c * rows_stride, b);
#pragma unroll
          for (int i = 0; i < kItems; ++i) a[i] = along_lanes[c * lanes_stride + 16 * i];
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
#pragma unroll
            for (int j = 0; j < kItems; ++j) acc[i][j] += a[i] * b[j];
          }
        }
      }
      const int first_a = opaque(lane), first_b = opaque(kItems * row);
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int a = first_a + 16 * i, b = first_b + j;
          const int pixel = kChannelsLast ? b : a, channel = z + (kChannelsLast ? a : b);
          if (first + pixel >= pixels || channel >= channels) continue;
          if (kChannelsLast)
            out[(first_of_all + pixel) * channels + channel] = acc[i][j];
          else
            out[(int64_t(batch) * channels + channel) * pixels + first + pixel] = acc[i][j];
        }
      }
    }
  }
}

}  // namespace mcibi_fast
