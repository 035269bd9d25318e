// Tiles of pixels in the CPU kernels: [channels][kTile] in float32 (float64 for float64), read from
// and written to maps of any strides, and the softmax over classes within a tile.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/map_strides.h"
#include "common/simd.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

constexpr int64_t kTile = 64;  // pixels; the row stride of every tile

// `count` pixels of an image from `first` on.
struct Tile {
  int64_t image, first, count;
};

// Tile `index` of a batch whose images of `pixels` pixels are cut into tiles of `size`.
inline Tile tile_at(int64_t index, int64_t pixels, int64_t size) {
  const int64_t tiles = ceil_div(pixels, size), first = index % tiles * size;
  return {index / tiles, first, pixels - first < size ? pixels - first : size};
}

// ---- reading and writing ------------------------------------------------------------------------

// Channels that are transposed at once: a cache line of float32.
constexpr int64_t kChannelBlock = 16;

// Converts `count` values into a row of kTile; the rest of the row becomes zero.
template <typename S>
MCIBI_SIMD void load_row(const S* source, int64_t count, Compute<S>* row) {
  using C = Compute<S>;
  for (int64_t t = 0; t < kTile; t += kLanes<C>) {
    const int64_t left = count - t;
    store(row + t,
          left >= kLanes<C> ? load(source + t) : load_first(source + t, left > 0 ? left : 0));
  }
}

template <typename S>
MCIBI_SIMD void store_row(const Compute<S>* row, int64_t count, S* out) {
  using C = Compute<S>;
  int64_t t = 0;
  for (; t + kLanes<C> <= count; t += kLanes<C>) store(out + t, load(row + t));
  if (t < count) store_first(out + t, load_first(row + t, count - t), count - t);
}

// Calls f(c) for blocks of kLanes channels that cover all of them; the last block may overlap the
// one before it.
template <typename C, typename F>
MCIBI_SIMD void for_channel_blocks(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes<C> <= channels; c += kLanes<C>) f(c);
  if (c < channels) f(channels - kLanes<C>);
}

// Reads channels that are neighbours in memory, kLanes or more, into tile [channels][kTile].
template <typename S>
void load_channels(const S* image, const int64_t* offsets, int64_t channels, int64_t count,
                   Compute<S>* tile) {
  using C = Compute<S>;
  for_channel_blocks<C>(channels, [&](int64_t c) {
    for (int64_t t = 0; t < kTile; t += kLanes<C>) {
      Vector<C> rows[kLanes<C>] = {};
      for (int64_t i = 0; i < kLanes<C> && t + i < count; ++i) {
        rows[i] = load(image + offsets[t + i] + c);
      }
      transpose<C>(rows);
      for (int64_t i = 0; i < kLanes<C>; ++i) store(tile + (c + i) * kTile + t, rows[i]);
    }
  });
}

// Writes tile [channels][kTile] as rows of neighbouring channels, kLanes or more.
template <typename S>
void store_channels(const Compute<S>* tile, int64_t channels, int64_t count, S* out) {
  using C = Compute<S>;
  for_channel_blocks<C>(channels, [&](int64_t c) {
    for (int64_t t = 0; t < count; t += kLanes<C>) {
      Vector<C> rows[kLanes<C>];
      for (int64_t i = 0; i < kLanes<C>; ++i) rows[i] = load(tile + (c + i) * kTile + t);
      transpose<C>(rows);
      for (int64_t i = 0; i < kLanes<C> && t + i < count; ++i) {
        store(out + (t + i) * channels + c, rows[i]);
      }
    }
  });
}

// Whether the pixels of a channel are neighbours in memory, from the first to the last.
inline bool has_planes(const MapStrides& s, int64_t width) {
  return s.column == 1 && s.row == width;
}

// Where `count` pixels from `first` are in an image.
inline void pixel_offsets(const MapStrides& s, int64_t width, int64_t first, int64_t count,
                          int64_t* offsets) {
  for (int64_t t = 0; t < count; ++t) {
    offsets[t] = (first + t) / width * s.row + (first + t) % width * s.column;
  }
}

// Reads `count` pixels from `first` of one image into tile [channels][kTile].
template <typename S>
void load_tile(const S* image, const MapStrides& s, int64_t width, int64_t channels, int64_t first,
               int64_t count, Compute<S>* tile) {
  if (has_planes(s, width)) {
    for (int64_t c = 0; c < channels; ++c) {
      load_row(image + c * s.channel + first, count, tile + c * kTile);
    }
    return;
  }
  int64_t offsets[kTile];
  pixel_offsets(s, width, first, count, offsets);
  if (s.channel == 1 && channels >= kLanes<Compute<S>>) {
    return load_channels(image, offsets, channels, count, tile);
  }
  S rows[kChannelBlock][kTile];
  for (int64_t c = 0; c < channels; c += kChannelBlock) {
    const int64_t block = channels - c < kChannelBlock ? channels - c : kChannelBlock;
    for (int64_t t = 0; t < count; ++t) {
      const S* pixel = image + offsets[t] + c * s.channel;
      for (int64_t i = 0; i < block; ++i) rows[i][t] = pixel[i * s.channel];
    }
    for (int64_t i = 0; i < block; ++i) load_row(rows[i], count, tile + (c + i) * kTile);
  }
}

// Writes tile [channels][kTile] to an image of `pixels` pixels, contiguous or channels_last.
template <typename S>
void store_tile(const Compute<S>* tile, int64_t channels, int64_t first, int64_t count,
                int64_t pixels, bool channels_last, S* image) {
  if (!channels_last) {
    for (int64_t c = 0; c < channels; ++c) {
      store_row(tile + c * kTile, count, image + c * pixels + first);
    }
    return;
  }
  if (channels >= kLanes<Compute<S>>) {
    return store_channels(tile, channels, count, image + first * channels);
  }
  S rows[kChannelBlock][kTile];
  for (int64_t c = 0; c < channels; c += kChannelBlock) {
    const int64_t block = channels - c < kChannelBlock ? channels - c : kChannelBlock;
    for (int64_t i = 0; i < block; ++i) store_row(tile + (c + i) * kTile, kTile, rows[i]);
    for (int64_t t = 0; t < count; ++t) {
      S* pixel = image + (first + t) * channels + c;
      for (int64_t i = 0; i < block; ++i) pixel[i] = rows[i][t];
    }
  }
}

// ---- softmax ------------------------------------------------------------------------------------

constexpr int64_t kGroup = 4;  // vectors of pixels at a time: independent work for the processor

// The softmax of kVectors vectors of pixels, which begin at `tile` and `lse`.
template <int64_t kVectors, typename C>
void softmax_vectors(C* tile, int64_t classes, C* lse) {
  using V = Vector<C>;
  V largest[kVectors], sum[kVectors], inverse[kVectors];
  for (int j = 0; j < kVectors; ++j) largest[j] = load(tile + j * kLanes<C>);
  for (int64_t k = 1; k < classes; ++k) {
    for (int j = 0; j < kVectors; ++j) {
      largest[j] = maximum(load(tile + k * kTile + j * kLanes<C>), largest[j]);
    }
  }
  for (int j = 0; j < kVectors; ++j) sum[j] = V{};
  for (int64_t k = 0; k < classes; ++k) {
    C* row = tile + k * kTile;
    for (int j = 0; j < kVectors; ++j) {
      const V e = exponential(load(row + j * kLanes<C>) - largest[j]);
      sum[j] += e;
      store(row + j * kLanes<C>, e);
    }
  }
  for (int j = 0; j < kVectors; ++j) inverse[j] = C(1) / sum[j];
  for (int64_t k = 0; k < classes; ++k) {
    C* row = tile + k * kTile;
    for (int j = 0; j < kVectors; ++j) {
      store(row + j * kLanes<C>, load(row + j * kLanes<C>) * inverse[j]);
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    for (int64_t i = 0; i < kLanes<C>; ++i) {
      const C m = largest[j][i];
      lse[j * kLanes<C> + i] = std::isinf(m) ? m : m + std::log(sum[j][i]);
    }
  }
}

// Replaces the logits of the first `count` pixels in tile [K][kTile], and maybe of others, by their
// softmax; lse: log-sum-exp per pixel.
template <typename C>
void softmax_tile(C* tile, int64_t classes, int64_t count, C* lse) {
  if (count <= kLanes<C>) return softmax_vectors<1>(tile, classes, lse);
  for (int64_t first = 0; first < kTile; first += kGroup * kLanes<C>) {
    softmax_vectors<kGroup>(tile + first, classes, lse + first);
  }
}

// The first class with the largest logit, and that logit. NaN counts as the largest, as in
// torch.argmax.
template <typename C>
void argmax_tile(const C* tile, int64_t classes, int64_t* best, C* largest) {
  for (int64_t first = 0; first < kTile; first += kLanes<C>) {
    Vector<C> value = load(tile + first), winner{};  // a class as C: float holds those below 2^24
    for (int64_t k = 1; k < classes; ++k) {
      const Vector<C> next = load(tile + k * kTile + first);
      const auto better = ~(next <= value) & (value == value);
      winner = better ? Vector<C>{} + static_cast<C>(k) : winner;
      value = better ? next : value;
    }
    store(largest + first, value);
    for (int64_t i = 0; i < kLanes<C>; ++i) best[first + i] = static_cast<int64_t>(winner[i]);
  }
}

// Replaces the logits of the first `count` pixels in tile, and maybe of others, by their gradient
// p * (dot - sum_k p dot), with p the softmax and dot its gradient. p = exp(logit - lse) is
// normalised again, because lse is rounded, and coarsely so where logits are large.
template <typename C>
void softmax_adjoint_tile(C* tile, const C* dot, int64_t classes, int64_t count, const C* lse) {
  using V = Vector<C>;
  for (int64_t first = 0; first < count; first += kLanes<C>) {
    const V shift = load(lse + first);
    V sum{}, weighted{};
    for (int64_t k = 0; k < classes; ++k) {
      const V e = exponential(load(tile + k * kTile + first) - shift);
      sum += e;
      weighted += e * load(dot + k * kTile + first);
      store(tile + k * kTile + first, e);
    }
    const V inverse = C(1) / sum;
    const V mean = weighted * inverse;
    for (int64_t k = 0; k < classes; ++k) {
      const V p = load(tile + k * kTile + first) * inverse;
      store(tile + k * kTile + first, p * (load(dot + k * kTile + first) - mean));
    }
  }
}

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
