// The executor's state, shared by executor.cpp (threads, barriers, launches), state.cpp
// (shared memory, errors, controls) and race_checker.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "testing/fiber.h"
#include "testing/threads.h"

namespace mcibi_host {

struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes, valid_bytes;
};

enum class State { kReady, kBarrier, kCollective, kExited };

struct Thread {
  Context context;
  uint3 index;
  int linear;  // in the block; warp = linear / 32
  State state;
  int site;    // waited at
  int result;  // of a barrier's vote
  // the warp collective waited for
  unsigned mask;
  Complete complete;
  void* operand;
  // cp.async: copies of the open group, then of each committed one
  std::vector<AsyncCopy> open_group;
  std::vector<std::vector<AsyncCopy>> groups;
};

extern Thread* running;  // null in host code
std::string thread_name(const Thread& thread);
// fail() for where no exception may pass: calls that the compiler believes not to throw.
[[noreturn]] void fail_without_unwinding(const std::string& message);

// ---- state.cpp --------------------------------------------------------------------------------
extern uint64_t seed;
extern int skipped_site;
std::string site_name(int site);
void record_error(int code, const std::string& message);  // the first one stays
bool check_launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes);
void allocate_dynamic_shared(size_t bytes);
void poison_shared();
void free_shared();

// ---- race_checker.cpp -------------------------------------------------------------------------
void race_begin_launch();
void race_begin_block();
void race_barrier();
void race_warp_sync(int warp);
void race_fence(int thread);
void race_access(const void* address, size_t bytes, bool write, bool atomic);
void race_ignore(const void* begin, size_t bytes);  // the threads' stacks
void race_forget(const void* begin, size_t bytes);  // shared memory at the start of a block

}  // namespace mcibi_host
