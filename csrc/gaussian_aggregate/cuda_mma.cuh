// What the tensor-core kernels (bfloat16, float16) share.
//
// A warp works alone on 32 neighbouring pixels of one image. With the lane's group (lane / 4) and
// pair (lane % 4) of the fragment layouts of mma.m16n8k16, a thread holds four pixels ("slots"),
//   contiguous     pixel 4 group + slot: 8-byte loads along a row of pixels
//   channels_last  pixel 8 slot + group: loads along the channels of a pixel
// and of every 16 channels (classes in the forward, z in the backward) a quad, from 4 pair on.
//
// The 16 inner indices of an mma may have any order, as long as it is the same in both operands, so
// these words are operands without rearrangement. The order of its rows and columns is free too,
// and chosen such that a thread's results are runs of 8 neighbours, 16 bytes of output. So the
// table is the only operand that goes through shared memory. A launch of its own writes it once, in
// the order of the fragments, and every block copies what it needs.
#pragma once

#include "gaussian_aggregate/cuda_common.cuh"

namespace mcibi_fast {

inline constexpr int kMmaWarps = 8;  // in a block
inline constexpr int kTilePixels = 32;
// Each kernel has two sizes, by the number of steps of 16 classes in registers. Few classes are one
// chunk.
inline constexpr int kFewSteps = 2, kForwardSteps = 12, kBackwardSteps = 10;

// Two 16-bit floats in one 32-bit register.
template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  }
};
template <>
struct Pair<__half> {
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return bit_cast<uint32_t>(__floats2half2_rn(low, high));
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(bits))),
                       __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16))));
  }
};

// Begins to copy `count` elements (a multiple of 8) of the table's fragments into shared memory.
template <typename T>
__device__ __forceinline__ void begin_copy(T* to, const T* from, int count) {
  for (int i = 8 * threadIdx.x; i < count; i += 8 * blockDim.x) cp_async_16(to + i, from + i);
}
// Called by all threads: ends what begin_copy() began.
__device__ __forceinline__ void finish_copy() {
  cp_async_commit();
  MCIBI_CP_ASYNC_WAIT(0);
  __syncthreads();
}

template <typename T>
__device__ __forceinline__ uint4 pack8(const float (&v)[8]) {
  return make_uint4(Pair<T>::pack(v[0], v[1]), Pair<T>::pack(v[2], v[3]), Pair<T>::pack(v[4], v[5]),
                    Pair<T>::pack(v[6], v[7]));
}

// A thread's place in its warp, and the warp's 32 pixels; none if no tile is left.
template <bool kChannelsLast>
struct WarpTile {
  int group, pair, batch, first, pixels, end;

  __device__ WarpTile(int tile, int batches, int pixels_) : pixels(pixels_) {
    const int lane = threadIdx.x % 32, per_image = ceil_div(pixels, kTilePixels);
    group = lane / 4;
    pair = lane % 4;
    batch = tile / per_image;
    first = tile % per_image * kTilePixels;
    end = pixels;
    if (batch >= batches) batch = first = end = 0;
  }
  __device__ int pixel(int slot) const {
    return first + (kChannelsLast ? 8 * slot + group : 4 * group + slot);
  }
  __device__ bool holds(int pixel) const { return pixel < end; }
  __device__ bool empty() const { return end == 0; }
};

// A warp's own 16 x 32 block in shared memory, for maps that are read or written element by
// element. Rows start at multiples of 8 bytes and are spread over the banks.
inline constexpr int kPlaneStride = 40;  // contiguous: 16 rows of 32 pixels
inline constexpr int kPixelStride = 20;  // channels_last: 32 rows of 16 channels
inline constexpr int kStageElements = 16 * kPlaneStride;
static_assert(kStageElements == 32 * kPixelStride, "one buffer for both");

// Reads quads of a map: four neighbouring channels, as two words, for each slot.
template <typename T, bool kChannelsLast>
class QuadReader {
 public:
  // run: the number of neighbours in one load: 4 (channels of a pixel, or pixels of a channel), 2
  // (channels of a pixel) or 1.
  __device__ QuadReader(const void* data, const MapAddress& map, int channels, int run,
                        const WarpTile<kChannelsLast>& tile, T* stage)
      : map_(map), tile_(tile), channels_(channels), run_(run), stage_(stage) {
    data_ = static_cast<const T*>(data);
    start_ = data_ + map.pixel(tile.batch, tile.first);
  }

  // Loads the quad from 4 pair on of the channels c .. c + 15. Only loads, so that many can be in
  // flight; arrange() then sorts them by slot. All lanes of the warp call it.
  template <int kInFlight = 8>
  __device__ __forceinline__ void fetch(int c, uint32_t fill, uint32_t (&words)[4][2]) const {
    if (run_ == 1) return fetch_through_stage<kInFlight>(c, fill, words);
    c += 4 * tile_.pair;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i][0] = words[i][1] = fill;
      const int channel = kChannelsLast ? c : c + i;
      if (!tile_.holds(tile_.pixel(kChannelsLast ? i : 0)) || channel >= channels_) continue;
      const T* from = kChannelsLast ? start_ + (8 * i + tile_.group) * map_.strides.column + c
                                    : plane(channel) + 4 * tile_.group;
      if (!kChannelsLast || run_ == 4) {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        words[i][0] = v.x;
        words[i][1] = v.y;
      } else {
        words[i][0] = *reinterpret_cast<const uint32_t*>(from);
        if (c + 2 < channels_) words[i][1] = *reinterpret_cast<const uint32_t*>(from + 2);
      }
    }
  }

  static __device__ __forceinline__ void arrange(uint32_t (&words)[4][2]) {
    if (kChannelsLast) return;
    uint32_t rows[4][2];
    memcpy(rows, words, sizeof(rows));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t low = rows[2 * h][i / 2], high = rows[2 * h + 1][i / 2];
        words[i][h] = i % 2 == 0 ? (low & 0xffffu) | (high << 16) : (low >> 16) | (high & ~0xffffu);
      }
    }
  }

  // The address of a channel at the tile's first pixel.
  __device__ __forceinline__ const T* plane(int channel) const {
    return start_ + channel * map_.strides.channel;
  }

  // Loads channels c .. c + 15 of the tile's pixels into `stage`. A __syncwarp() must come before
  // they are read.
  template <int kInFlight>
  __device__ __forceinline__ void fill_stage(int c, uint32_t fill) const {
    // contiguous: the lanes are pixels of one channel; else 16 lanes are channels of one pixel
    const int lane = threadIdx.x % 32, along = kChannelsLast ? lane % 16 : lane;
    const int across = kChannelsLast ? lane / 16 : 0;
    int channel = kChannelsLast ? c + along : c;
    int pixel = tile_.first + (kChannelsLast ? across : along);
    int x = pixel % map_.width;
    const T* from = data_ + map_.pixel(tile_.batch, pixel) + channel * map_.strides.channel;
    T* to = stage_ + (kChannelsLast ? kPixelStride : kPlaneStride) * across + along;
#pragma unroll 1
    for (int i = 0; i < 16; i += kInFlight) {
      T values[kInFlight];
#pragma unroll
      for (T& value : values) {
        memcpy(&value, &fill, sizeof(T));
        if (tile_.holds(pixel) && channel < channels_) value = *from;
        if (!kChannelsLast) {
          ++channel;
          from += map_.strides.channel;
        } else {
          pixel += 2;
          x += 2;
          from += 2 * map_.strides.column;
          if (x >= map_.width) {  // a row has two pixels or more
            x -= map_.width;
            from += map_.strides.row - map_.width * map_.strides.column;
          }
        }
      }
#pragma unroll
      for (T value : values) {
        *to = value;
        to += kChannelsLast ? 2 * kPixelStride : kPlaneStride;
      }
    }
  }

 private:
  template <int kInFlight>
  __device__ __forceinline__ void fetch_through_stage(int c, uint32_t fill,
                                                      uint32_t (&words)[4][2]) const {
    fill_stage<kInFlight>(c, fill);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* from = kChannelsLast
                          ? stage_ + (8 * i + tile_.group) * kPixelStride + 4 * tile_.pair
                          : stage_ + (4 * tile_.pair + i) * kPlaneStride + 4 * tile_.group;
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      words[i][0] = v.x;
      words[i][1] = v.y;
    }
    __syncwarp();
  }

  const MapAddress& map_;
  const WarpTile<kChannelsLast>& tile_;
  const int channels_, run_;
  T* const stage_;
  const T *data_, *start_;
};

// The longest run that one load of this map may have.
template <bool kChannelsLast>
inline int longest_run(const void* data, const MapAddress& map, int channels, int pixels) {
  const MapStrides& s = map.strides;
  if (map.width != pixels) return 1;
  const int64_t address = int64_t(reinterpret_cast<uintptr_t>(data)) / 2;
  const auto even = [&](int run, int64_t a, int64_t b, int64_t c) {
    return address % run == 0 && a % run == 0 && b % run == 0 && c % run == 0;
  };
  if (kChannelsLast) {
    if (s.channel != 1) return 1;
    if (even(4, channels, s.batch, s.column)) return 4;
    return even(2, channels, s.batch, s.column) ? 2 : 1;
  }
  return s.column == 1 && even(4, pixels, s.batch, s.channel) ? 4 : 1;
}

}  // namespace mcibi_fast
