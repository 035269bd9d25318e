// Finds data races exactly, whatever the schedule. Kernel sources compiled with -fsanitize=thread
// call the __tsan_* functions below on every memory access (this file replaces the sanitizer's
// library, which is not linked), and each access is compared with the earlier ones to the same
// bytes.
//
// Two accesses to a byte, at least one a write and not both atomic, must be ordered:
// - in one block by a __syncthreads() between them, or in one warp by a __syncwarp() of its live
//   lanes (shuffles and votes order nothing, as CUDA says);
// - in two blocks by fence and atomic on the first side, atomic on the same address and fence on
//   the second (the pattern "the last block to finish reduces the others' results").
#include <algorithm>
#include <cstdint>
#include <memory>
#include <unordered_map>

#include "testing/executor.h"

namespace mcibi_host {
namespace {

using Time = uint32_t;  // advances at every barrier, fence and atomic

struct Access {
  uint32_t thread = 0;  // number of the block in running order * 1024 + thread in the block
  Time time = 0;        // 0: none
};
struct Byte {
  Access write;
  bool atomic_write = false;
  Access reads[2];  // by different threads, and of different warps if possible
};
constexpr uintptr_t kPage = 4096;
struct Page {
  Byte bytes[kPage];
};
struct Event {
  Time time;
  uint32_t thread;
  const void* address;  // of an atomic
};
struct BlockHistory {
  std::vector<Time> barriers;
  std::vector<Event> fences, atomics;
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
std::vector<BlockHistory> history;  // of this launch, in running order
Time now = 1, launch_start = 1;
Time warp_syncs[32];
uintptr_t ignored_begin = 0, ignored_end = 0;

uint32_t block_of(uint32_t thread) { return thread / 1024; }
uint32_t warp_of(uint32_t thread) { return thread / 32; }

bool barrier_between(const BlockHistory& block, Time from, Time to) {
  const auto next = std::upper_bound(block.barriers.begin(), block.barriers.end(), from);
  return next != block.barriers.end() && *next < to;
}
// Whether program order and barriers connect two points of a block through a fence.
bool fenced_path(const BlockHistory& block, Access from, Access to) {
  return std::any_of(block.fences.begin(), block.fences.end(), [&](const Event& fence) {
    return from.time < fence.time && fence.time < to.time &&
           (fence.thread == from.thread || barrier_between(block, from.time, fence.time)) &&
           (fence.thread == to.thread || barrier_between(block, fence.time, to.time));
  });
}

bool ordered(Access earlier, Access later) {
  if (earlier.time < launch_start || earlier.thread == later.thread) return true;
  const BlockHistory& first = history[block_of(earlier.thread)];
  const BlockHistory& second = history.back();
  if (block_of(earlier.thread) == block_of(later.thread)) {
    if (!second.barriers.empty() && earlier.time < second.barriers.back()) return true;
    return warp_of(earlier.thread) == warp_of(later.thread) &&
           earlier.time < warp_syncs[later.thread % 1024 / 32];
  }
  for (const Event& release : first.atomics)
    for (const Event& acquire : second.atomics)
      if (release.address == acquire.address &&
          fenced_path(first, earlier, {release.thread, release.time}) &&
          fenced_path(second, {acquire.thread, acquire.time}, later))
        return true;
  return false;
}

Byte& shadow(uintptr_t address) {
  static uintptr_t last_page = 0;
  static Page* last = nullptr;
  if (address / kPage != last_page || !last) {
    auto& page = pages[address / kPage];
    if (!page) page = std::make_unique<Page>();
    last_page = address / kPage;
    last = page.get();
  }
  return last->bytes[address % kPage];
}

void check(Access earlier, Access self, const char* what, const void* address) {
  if (earlier.time == 0 || ordered(earlier, self)) return;
  char place[32];
  std::snprintf(place, sizeof(place), "%p", address);
  fail_without_unwinding(
      std::string("data race: ") + what + " at " + place + " by thread " +
      std::to_string(earlier.thread % 1024) + " of " +
      (block_of(earlier.thread) == block_of(self.thread) ? "its own block" : "another block") +
      ", with no barrier or fence between");
}

void remember_read(Byte& byte, Access self) {
  for (Access& read : byte.reads)
    if (read.thread == self.thread || read.time == 0) {
      read = self;
      return;
    }
  // Two others are known: replace one, such that the two that remain are of different warps if
  // possible.
  const bool same_warp = warp_of(byte.reads[0].thread) == warp_of(self.thread);
  byte.reads[same_warp ? 0 : 1] = self;
}

}  // namespace

void race_begin_launch() {
  history.clear();
  launch_start = ++now;
}
void race_begin_block() {
  history.emplace_back();
  std::fill(std::begin(warp_syncs), std::end(warp_syncs), Time(0));
}
void race_barrier() {
  history.back().barriers.push_back(++now);
  ++now;
}
void race_warp_sync(int warp) {
  warp_syncs[warp] = ++now;
  ++now;
}
void race_fence(int thread) {
  const auto self = uint32_t((history.size() - 1) * 1024) + uint32_t(thread);
  history.back().fences.push_back({++now, self, nullptr});
  ++now;
}
void race_ignore(const void* begin, size_t bytes) {
  ignored_begin = uintptr_t(begin);
  ignored_end = ignored_begin + bytes;
}
void race_forget(const void* begin, size_t bytes) {
  if (pages.empty()) return;  // sources without -fsanitize=thread
  for (size_t i = 0; i < bytes; ++i) shadow(uintptr_t(begin) + i) = {};
}

void race_access(const void* address, size_t bytes, bool write, bool atomic) {
  const uintptr_t begin = uintptr_t(address);
  if (!running || (begin >= ignored_begin && begin < ignored_end)) return;
  if (atomic) ++now;
  const Access self{uint32_t((history.size() - 1) * 1024) + uint32_t(running->linear), now};
  for (size_t i = 0; i < bytes; ++i) {
    Byte& byte = shadow(begin + i);
    if (!(atomic && byte.atomic_write))
      check(byte.write, self, write ? "writes over a write" : "reads a write", address);
    if (write) {
      for (const Access& read : byte.reads) check(read, self, "writes over a read", address);
      byte.write = self;
      byte.atomic_write = atomic;
      byte.reads[0] = byte.reads[1] = {};
    } else {
      remember_read(byte, self);
    }
  }
  if (atomic) {
    history.back().atomics.push_back({now, self.thread, address});
    ++now;
  }
}

}  // namespace mcibi_host

// ---- what the compiler calls --------------------------------------------------------------------

#define MCIBI_TSAN(name, bytes, write)                     \
  extern "C" void __tsan_##name(void* address) {           \
    mcibi_host::race_access(address, bytes, write, false); \
  }
MCIBI_TSAN(read1, 1, false)
MCIBI_TSAN(read2, 2, false)
MCIBI_TSAN(read4, 4, false)
MCIBI_TSAN(read8, 8, false)
MCIBI_TSAN(read16, 16, false)
MCIBI_TSAN(write1, 1, true)
MCIBI_TSAN(write2, 2, true)
MCIBI_TSAN(write4, 4, true)
MCIBI_TSAN(write8, 8, true)
MCIBI_TSAN(write16, 16, true)
MCIBI_TSAN(unaligned_read2, 2, false)
MCIBI_TSAN(unaligned_read4, 4, false)
MCIBI_TSAN(unaligned_read8, 8, false)
MCIBI_TSAN(unaligned_read16, 16, false)
MCIBI_TSAN(unaligned_write2, 2, true)
MCIBI_TSAN(unaligned_write4, 4, true)
MCIBI_TSAN(unaligned_write8, 8, true)
MCIBI_TSAN(unaligned_write16, 16, true)
MCIBI_TSAN(vptr_read, 8, false)
extern "C" void __tsan_vptr_update(void* address, void*) {
  mcibi_host::race_access(address, 8, true, false);
}
extern "C" void __tsan_read_range(void* address, unsigned long bytes) {
  mcibi_host::race_access(address, bytes, false, false);
}
extern "C" void __tsan_write_range(void* address, unsigned long bytes) {
  mcibi_host::race_access(address, bytes, true, false);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
