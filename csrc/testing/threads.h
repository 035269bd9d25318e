// Threads, blocks, shared memory, barriers, warp collectives, atomics and launches of the host
// executor. Between synchronisation points a thread runs alone. The seed decides which thread runs
// next and in which order blocks run. Threads of a warp do not run in lockstep.
//
// An error (a barrier or warp collective that some threads do not reach, a shuffle from a lane
// outside the mask, too much shared memory, ...) ends the launch. cudaGetLastError() then returns
// cudaErrorLaunchFailure, and last_error() says what happened, where, and in which thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <tuple>

#include "testing/types.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace mcibi_host {

// ---- sites --------------------------------------------------------------------------------------

// Every synchronisation in the source has a number, by file and line.
enum class Sync : int { kBarrier, kWarp, kFence, kAsyncWait, kCollective };
int register_site(Sync kind, const char* file, int line);
#define MCIBI_SITE(kind)                                                           \
  ([]() __attribute__((no_sanitize("thread"))) -> int {                            \
    static const int site =                                                        \
        ::mcibi_host::register_site(::mcibi_host::Sync::kind, __FILE__, __LINE__); \
    return site;                                                                   \
  }())

// ---- errors and device attributes ---------------------------------------------------------------

[[noreturn]] void fail(const std::string& message);  // from a kernel: ends the launch
const char* last_error();
int take_status();
int peek_status();
int device_attribute(int attribute);
int allow_dynamic_shared(const void* kernel, int bytes);

// ---- shared memory ------------------------------------------------------------------------------

// Each object is an allocation of its own, filled with 0xff (NaN) before each block.
void* static_shared(const void* key, size_t bytes, size_t alignment);
unsigned char* dynamic_shared();
template <typename T, typename Tag>
inline T& shared(Tag) {
  static const char key = 0;  // one per declaration: Tag is the type of its own lambda
  return *static_cast<T*>(static_shared(&key, sizeof(T), alignof(T)));
}
// For ldmatrix: reads 16 bytes at a 16-byte boundary; an error names the lane.
void read_shared_row(void* destination, const void* address, int lane);

// ---- barriers -----------------------------------------------------------------------------------

enum class Vote : int { kNone, kOr, kAnd, kCount };
int sync_threads(int site, Vote vote = Vote::kNone, int predicate = 0);
void sync_warp(int site, unsigned mask = 0xffffffffu);
void thread_fence(int site);

// ---- warp collectives ---------------------------------------------------------------------------

// All lanes of `mask` arrive at one site; the last one calls `complete(mask, operands of the
// lanes)`.
using Complete = void (*)(unsigned mask, void* const* operands);
void collective(int site, unsigned mask, Complete complete, void* operand);
int lane_id();
inline bool in_mask(unsigned mask, int lane) { return mask >> lane & 1; }

template <typename T>
struct Shuffle {
  T value;
  int source;  // the lane to read; an error if it is not in the mask
  T result;
  static void complete(unsigned mask, void* const* operands) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!in_mask(mask, lane)) continue;
      auto* self = static_cast<Shuffle*>(operands[lane]);
      if (!in_mask(mask, self->source))
        fail("shuffle: lane " + std::to_string(lane) + " reads lane " +
             std::to_string(self->source) + ", which is not in the mask");
      self->result = static_cast<Shuffle*>(operands[self->source])->value;
    }
  }
};

template <typename T>
inline T shuffle(int site, unsigned mask, T value, int source) {
  Shuffle<T> operand{value, source, value};
  collective(site, mask, &Shuffle<T>::complete, &operand);
  return operand.result;
}
template <typename T>
inline T shuffle_index(int site, unsigned mask, T value, int source, int width = 32) {
  const int lane = lane_id();
  return shuffle(site, mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
inline T shuffle_xor(int site, unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = lane_id(), source = lane ^ lane_mask;
  return shuffle(site, mask, value, (source | (width - 1)) > (lane | (width - 1)) ? lane : source);
}
template <typename T>
inline T shuffle_down(int site, unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = lane_id(), source = lane + int(delta);
  return shuffle(site, mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <typename T>
inline T shuffle_up(int site, unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = lane_id(), source = lane - int(delta);
  return shuffle(site, mask, value, source < (lane & ~(width - 1)) ? lane : source);
}

// Reduces one value from each lane of the mask to one result for all of them.
template <typename T, typename Fold>
struct Reduce {
  T value;
  T result;
  static void complete(unsigned mask, void* const* operands) {
    T total{};
    bool first = true;
    for (int lane = 0; lane < 32; ++lane) {
      if (!in_mask(mask, lane)) continue;
      const T value = static_cast<Reduce*>(operands[lane])->value;
      total = first ? value : Fold()(total, value);
      first = false;
    }
    for (int lane = 0; lane < 32; ++lane)
      if (in_mask(mask, lane)) static_cast<Reduce*>(operands[lane])->result = total;
  }
};
template <typename Fold, typename T>
inline T reduce(int site, unsigned mask, T value) {
  Reduce<T, Fold> operand{value, value};
  collective(site, mask, &Reduce<T, Fold>::complete, &operand);
  return operand.result;
}
inline unsigned ballot(int site, unsigned mask, int predicate) {
  return reduce<std::bit_or<unsigned>>(site, mask, predicate ? 1u << lane_id() : 0u);
}
struct Minimum {
  template <typename T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Maximum {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
template <typename T>
struct MatchAny {
  T value;
  unsigned result;
  static void complete(unsigned mask, void* const* operands) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!in_mask(mask, lane)) continue;
      auto* self = static_cast<MatchAny*>(operands[lane]);
      self->result = 0;
      for (int other = 0; other < 32; ++other)
        if (in_mask(mask, other) && static_cast<MatchAny*>(operands[other])->value == self->value)
          self->result |= 1u << other;
    }
  }
};
template <typename T>
inline unsigned match_any(int site, unsigned mask, T value) {
  MatchAny<T> operand{value, 0};
  collective(site, mask, &MatchAny<T>::complete, &operand);
  return operand.result;
}

// ---- atomics ------------------------------------------------------------------------------------

// A thread runs alone between synchronisation points, so a plain update is atomic.
void note_atomic(const void* address, size_t bytes);  // for the race checker
template <typename T, typename Update>
__attribute__((no_sanitize("thread"))) inline T atomic(T* address, Update update) {
  note_atomic(address, sizeof(T));
  const T old = *address;
  *address = update(old);
  return old;
}

// ---- asynchronous copies ------------------------------------------------------------------------

// Performed at the wait, so that a read before it sees the old bytes.
void async_copy(void* shared, const void* global, size_t bytes, size_t valid_bytes);
void async_commit();
void async_wait(int site, int groups_in_flight);

// ---- launches -----------------------------------------------------------------------------------

void run(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
         const std::function<void()>& thread);

}  // namespace mcibi_host

#define __syncthreads() ((void)::mcibi_host::sync_threads(MCIBI_SITE(kBarrier)))
#define __syncthreads_or(p) \
  ::mcibi_host::sync_threads(MCIBI_SITE(kBarrier), ::mcibi_host::Vote::kOr, (p))
#define __syncthreads_and(p) \
  ::mcibi_host::sync_threads(MCIBI_SITE(kBarrier), ::mcibi_host::Vote::kAnd, (p))
#define __syncthreads_count(p) \
  ::mcibi_host::sync_threads(MCIBI_SITE(kBarrier), ::mcibi_host::Vote::kCount, (p))
#define __syncwarp(...) ::mcibi_host::sync_warp(MCIBI_SITE(kWarp) __VA_OPT__(, ) __VA_ARGS__)
#define __threadfence() ::mcibi_host::thread_fence(MCIBI_SITE(kFence))
#define __shfl_sync(...) ::mcibi_host::shuffle_index(MCIBI_SITE(kCollective), __VA_ARGS__)
#define __shfl_xor_sync(...) ::mcibi_host::shuffle_xor(MCIBI_SITE(kCollective), __VA_ARGS__)
#define __shfl_down_sync(...) ::mcibi_host::shuffle_down(MCIBI_SITE(kCollective), __VA_ARGS__)
#define __shfl_up_sync(...) ::mcibi_host::shuffle_up(MCIBI_SITE(kCollective), __VA_ARGS__)
#define __ballot_sync(mask, p) ::mcibi_host::ballot(MCIBI_SITE(kCollective), mask, p)
#define __any_sync(mask, p) (::mcibi_host::ballot(MCIBI_SITE(kCollective), mask, p) != 0)
#define __all_sync(mask, p) (::mcibi_host::ballot(MCIBI_SITE(kCollective), mask, !(p)) == 0)
#define __match_any_sync(mask, v) ::mcibi_host::match_any(MCIBI_SITE(kCollective), mask, v)
#define __reduce_add_sync(mask, v) \
  ::mcibi_host::reduce<std::plus<>>(MCIBI_SITE(kCollective), mask, v)
#define __reduce_min_sync(mask, v) \
  ::mcibi_host::reduce<::mcibi_host::Minimum>(MCIBI_SITE(kCollective), mask, v)
#define __reduce_max_sync(mask, v) \
  ::mcibi_host::reduce<::mcibi_host::Maximum>(MCIBI_SITE(kCollective), mask, v)
#define __reduce_or_sync(mask, v) \
  ::mcibi_host::reduce<std::bit_or<>>(MCIBI_SITE(kCollective), mask, v)

template <typename T>
inline T atomicAdd(T* address, T value) {
  return mcibi_host::atomic(address, [=](T old) { return T(old + value); });
}
template <typename T>
inline T atomicExch(T* address, T value) {
  return mcibi_host::atomic(address, [=](T) { return value; });
}
template <typename T>
inline T atomicCAS(T* address, T expected, T value) {
  return mcibi_host::atomic(address, [=](T old) { return old == expected ? value : old; });
}
template <typename T>
inline T atomicMax(T* address, T value) {
  return mcibi_host::atomic(address, [=](T old) { return old < value ? value : old; });
}
template <typename T>
inline T atomicMin(T* address, T value) {
  return mcibi_host::atomic(address, [=](T old) { return value < old ? value : old; });
}
template <typename T>
inline T atomicOr(T* address, T value) {
  return mcibi_host::atomic(address, [=](T old) { return T(old | value); });
}
