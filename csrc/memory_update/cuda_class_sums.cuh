// sums[c, z] = sum_j A[j, c] R[j, z] over one slice of a group's tiles and 64 channels in each
// block, added to what the slice of the same number had in the groups before.
//
// In shared memory a tile of R is 64 rows of channels, whatever its layout in global memory. Four
// threads share a channel and take turns at its pixels, 16 bytes at a time. Meanwhile the next
// tiles are loaded: by cp.async where a channel's pixels are contiguous (NCHW), else through
// registers. Only one thread adds to a channel's sums, in the order of the tiles, so that all runs
// give the same bits.
#pragma once

#include <type_traits>

#include "memory_update/cuda_common.cuh"

namespace mcibi_fast {

// How the features are laid out in global memory.
enum class Fill {
  kPixelVectors,    // 16-byte vectors of neighbouring pixels
  kPixelHalves,     // 8-byte halves of such vectors
  kChannelVectors,  // 16-byte vectors of neighbouring channels
  kElements,        // any other layout; fastest if neighbouring pixels are neighbours in memory
};

inline constexpr int kStagedSlots = 16;  // slots of a tile that are loaded in advance

template <typename Element>
struct Features {
  const Element* data;
  int64_t stride_b, stride_z, stride_y, stride_x;
  int channels;
};

template <typename Element, typename T>
struct SumsInput {
  Features<Element> features;
  ClassWeights<T> a;
  PartialSums<T> out;
  TileGrid grid;
  int tiles;        // of the group
  int class_chunk;  // classes that one block sums
};

// Whether the tiles are loaded by cp.async.
constexpr bool is_async(Fill fill) {
  return fill == Fill::kPixelVectors || fill == Fill::kPixelHalves;
}

template <typename Element, typename T, Fill kFill>
struct SumsShared {
  static constexpr int kStages = is_async(kFill) && sizeof(Element) == 2 ? 3 : 2;
  struct Stage {
    alignas(16) Element features[kChannelChunk][kTile];  // rows swizzled, see place()
    alignas(16) T weights[kStagedSlots][kTile];
    Slot slots[kStagedSlots];
  };
  Stage stages[kStages];
  // Followed by int64 counts[class_chunk] and T sums[class_chunk][kChannelChunk].
  static size_t bytes(int64_t class_chunk) {
    return sizeof(SumsShared) +
           static_cast<size_t>(class_chunk) * (sizeof(int64_t) + sizeof(T) * kChannelChunk);
  }
};

// The position of 16-byte vector `vector` in a channel's row, such that threads that read or write
// at the same time use different banks.
__device__ __forceinline__ int place(int channel, int vector) {
  return vector ^ ((channel & 1) << 2) ^ (channel >> 3 & 7);
}

// Loads one tile of features into shared memory. Pixels outside the image and channels after the
// last become zeros: their weight is zero, but zero times an old value could be NaN.
template <typename Element, Fill kFill>
class TileFill {
 public:
  using Row = Element[kTile];

  __device__ void begin(const Features<Element>& features, const PixelTile& tile, int z0,
                        Row* rows) {
    const Element* const image = features.data + tile.image * features.stride_b;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int channel = channel_of(i), pixel = pixel_of(i), z = z0 + channel;
      const bool real = tile.has(pixel) && z < features.channels;
      const Element* from = features.data;
      if (real)
        from = image + z * features.stride_z + tile.y(pixel) * features.stride_y +
               tile.x(pixel) * features.stride_x;
      if constexpr (is_async(kFill)) {
        Element* const to =
            &rows[channel][place(channel, pixel / kVector) * kVector + pixel % kVector];
        if constexpr (kFill == Fill::kPixelVectors)
          cp_async_16(to, from, real);
        else
          cp_async_8(to, from, real);
      } else if constexpr (kFill == Fill::kChannelVectors) {
        held_[i] = real ? *reinterpret_cast<const Vector<Element>*>(from) : Vector<Element>{};
      } else {
        held_[i] = real ? *from : Element(0.0f);
      }
    }
  }

  // Stores what begin() has loaded into registers.
  __device__ void end(Row* rows) const {
    if constexpr (!is_async(kFill)) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if constexpr (kFill == Fill::kElements) {
          put(rows, channel_of(i), pixel_of(i), held_[i]);
        } else {
#pragma unroll
          for (int j = 0; j < kVector; ++j)
            put(rows, channel_of(i) + j, pixel_of(i), held_[i].values[j]);
        }
      }
    }
  }

 private:
  static constexpr int kVector = Vector<Element>::kSize;
  static constexpr bool kPixelsFirst = kFill != Fill::kChannelVectors;
  static constexpr int kPixelStep = kFill == Fill::kPixelVectors  ? kVector
                                    : kFill == Fill::kPixelHalves ? kVector / 2
                                                                  : 1;
  static constexpr int kChannelStep = kFill == Fill::kChannelVectors ? kVector : 1;
  // Threads along the faster axis, and along the other.
  static constexpr int kAlong = kPixelsFirst ? kTile / kPixelStep : kChannelChunk / kChannelStep;
  static constexpr int kAcross = kUpdateThreads / kAlong;
  static constexpr int kItems = kChannelChunk * kTile / kPixelStep / kChannelStep / kUpdateThreads;

  __device__ static int channel_of(int i) {
    const int thread = static_cast<int>(threadIdx.x);
    return kPixelsFirst ? thread / kAlong + i * kAcross : thread % kAlong * kChannelStep;
  }
  __device__ static int pixel_of(int i) {
    const int thread = static_cast<int>(threadIdx.x);
    return kPixelsFirst ? thread % kAlong * kPixelStep : thread / kAlong + i * kAcross;
  }
  __device__ static void put(Row* rows, int channel, int pixel, Element value) {
    rows[channel][place(channel, pixel / kVector) * kVector + pixel % kVector] = value;
  }

  std::conditional_t<kFill == Fill::kChannelVectors, Vector<Element>, Element>
      held_[is_async(kFill) ? 1 : kItems];
};

// Loads `count` slots of a tile, from `first` on, with their weights.
template <typename T>
__device__ void fetch_slots(const ClassWeights<T>& a, int tile, int first, int count, Slot* slots,
                            T (*weights)[kTile]) {
  constexpr int kVector = Vector<T>::kSize, kPerRow = kTile / kVector;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < count) cp_async_8(&slots[thread], a.slot(tile, first + thread));
  const T* rows = a.weight_row(tile, first);
#pragma unroll
  for (int i = thread; i < kStagedSlots * kPerRow; i += kUpdateThreads)
    if (i < count * kPerRow) cp_async_16(&weights[0][0] + i * kVector, rows + i * kVector);
}

// A thread's quarter of the pixels of its channel, every fourth 16-byte vector, in registers for
// all slots of a tile.
template <typename Element, typename T>
class HeldFeatures {
 public:
  __device__ __forceinline__ void load(const Element (&row)[kTile], int channel) {
    T zero = T(0);  // NaN if one is not finite
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const auto features = *reinterpret_cast<const Vector<Element>*>(
          &row[place(channel, vector_of(step)) * kVector]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values_[step][i] = widen(features.values[i]);
        zero += values_[step][i] * T(0);
      }
    }
    finite_ = __all_sync(kFullWarp, zero == T(0));  // one way for the warp
  }

  // The sum of weight * feature over the tile's pixels, for all four threads of the channel.
  __device__ __forceinline__ T dot(const T (&weights)[kTile]) const {
    T sum = finite_ ? quarter<true>(weights) : quarter<false>(weights);
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    return sum;
  }

 private:
  static constexpr int kVector = Vector<Element>::kSize, kSteps = kTile / kVector / 4;

  __device__ static int vector_of(int step) { return 4 * step + static_cast<int>(threadIdx.x) % 4; }

  // The sum over this thread's pixels.
  template <bool kFinite>
  __device__ __forceinline__ T quarter(const T (&weights)[kTile]) const {
    T even = T(0), odd = T(0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const T* const from = weights + vector_of(step) * kVector;
#pragma unroll
      for (int i = 0; i < kVector; i += Vector<T>::kSize) {
        const auto w = *reinterpret_cast<const Vector<T>*>(from + i);
#pragma unroll
        for (int j = 0; j < Vector<T>::kSize; j += 2) {
          // An infinite feature must not reach the classes that give it no weight.
          if (kFinite || w.values[j] != T(0)) even += w.values[j] * values_[step][i + j];
          if (kFinite || w.values[j + 1] != T(0)) odd += w.values[j + 1] * values_[step][i + j + 1];
        }
      }
    }
    return even + odd;
  }

  T values_[kSteps][kVector];
  bool finite_;
};

// Grid: (slices, channel chunks, class chunks).
template <typename Element, typename T, Fill kFill>
__global__ void __launch_bounds__(kUpdateThreads, sizeof(T) == 8 ? 1 : 2)
    class_sums_kernel(SumsInput<Element, T> input) {
  using Shared = SumsShared<Element, T, kFill>;
  constexpr int kStages = Shared::kStages;
  MCIBI_DYNAMIC_SHARED(bytes);
  auto& shared = *reinterpret_cast<Shared*>(bytes);
  auto* counts = reinterpret_cast<int64_t*>(bytes + sizeof(Shared));
  auto* sums = reinterpret_cast<T(*)[kChannelChunk]>(counts + input.class_chunk);

  const int thread = static_cast<int>(threadIdx.x), channel = thread / 4;
  const int z0 = static_cast<int>(blockIdx.y) * kChannelChunk;
  const int class0 = static_cast<int>(blockIdx.z) * input.class_chunk;
  const int classes = min(input.class_chunk, input.a.classes - class0);
  const int64_t slice = blockIdx.x, slices = input.out.slices;
  const int first = static_cast<int>(slice * input.tiles / slices);
  const int last = static_cast<int>((slice + 1) * input.tiles / slices);

  // Only the blocks of the first channels add counts up: the others may read them later than those
  // write them.
  const bool go_on = input.a.first_tile > 0;
  const auto row_of = [&](int k) { return slice * input.a.classes + k; };
  for (int i = thread; i < classes; i += kUpdateThreads)
    counts[i] = go_on && blockIdx.y == 0 ? input.out.counts[row_of(class0 + i)] : -1;
  for (int i = thread; i < classes * kChannelChunk; i += kUpdateThreads) {
    const int row = i / kChannelChunk, z = z0 + i % kChannelChunk;
    sums[row][i % kChannelChunk] =
        go_on && z < input.features.channels
            ? input.out.sums[row_of(class0 + row) * input.features.channels + z]
            : T(0);
  }

  TileFill<Element, kFill> fill;
  const auto begin_fill = [&](int tile, int slots) {
    auto& stage = shared.stages[tile % kStages];
    fill.begin(input.features, input.grid.tile(input.a.first_tile + tile), z0, stage.features);
    fetch_slots(input.a, tile, 0, min(slots, kStagedSlots), stage.slots, stage.weights);
  };
  const auto slots_of = [&](int tile) { return tile < last ? input.a.slot_counts[tile] : 0; };

  int slots_ahead = slots_of(first);
  for (int tile = first - (kStages - 1); tile < last; ++tile) {
    const int ahead = tile + kStages - 1;
    if (tile >= first) {
      MCIBI_CP_ASYNC_WAIT(kStages - 2);
      __syncthreads();  // the tile has arrived, and the stage of the previous tile is free
    }
    if (ahead < last) begin_fill(ahead, slots_ahead);
    cp_async_commit();
    slots_ahead = slots_of(ahead + 1);
    auto& stage = shared.stages[(tile + kStages) % kStages];
    const int slots = tile >= first ? input.a.slot_counts[tile] : 0;
    HeldFeatures<Element, T> held;
    if (slots > 0) held.load(stage.features[channel], channel);
    for (int staged = 0; staged < slots; staged += kStagedSlots) {
      const int here = min(kStagedSlots, slots - staged);
      if (staged > 0) {
        __syncthreads();  // the previous slots have been used
        fetch_slots(input.a, tile, staged, here, stage.slots, stage.weights);
        cp_async_commit();
        MCIBI_CP_ASYNC_WAIT(0);
        __syncthreads();  // these slots have arrived
      }
      for (int i = 0; i < here; ++i) {
        const Slot& slot = stage.slots[i];
        const int row = slot.label - class0;
        if (row < 0 || row >= classes) continue;
        const T sum = held.dot(stage.weights[i]);
        if (thread % 4 == 0) sums[row][channel] += sum;
        if (thread == 0) counts[row] = max(counts[row], int64_t(0)) + slot.count;
      }
    }
    if (ahead < last) fill.end(shared.stages[ahead % kStages].features);
  }
  __syncthreads();                                    // sums and counts are complete
  const int z = opaque(z0) + thread % kChannelChunk;  // or it would wait in a register
  for (int i = thread / kChannelChunk; i < classes; i += kUpdateThreads / kChannelChunk)
    if ((counts[i] >= 0 || input.out.grouped) && z < input.features.channels)
      input.out.sums[row_of(class0 + i) * input.features.channels + z] =
          sums[i][thread % kChannelChunk];
  if (blockIdx.y == 0)
    for (int i = thread; i < classes; i += kUpdateThreads)
      input.out.counts[row_of(class0 + i)] = counts[i];
}

}  // namespace mcibi_fast
