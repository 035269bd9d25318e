// The executor's state, shared by executor.cpp (threads, barriers, launches), state.cpp (shared
// memory, errors, controls) and race_checker.cpp.
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
  int site;    // where it waits
  int result;  // of a barrier's vote
  // The warp collective for which it waits.
  unsigned mask;
  Complete complete;
  void* operand;
  // cp.async: the copies of the open group, and of each committed group.
  std::vector<AsyncCopy> open_group;
  std::vector<std::vector<AsyncCopy>> groups;
};

extern Thread* running;  // null in host code
std::string thread_name(const Thread& thread);
// fail() for functions that the compiler assumes not to throw.
[[noreturn]] void fail_without_unwinding(const std::string& message);

// ---- state.cpp ----------------------------------------------------------------------------------

extern uint64_t seed;
extern int skipped_site;
std::string site_name(int site);
void record_error(int code, const std::string& message);  // keeps the first one
bool check_launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes);
void allocate_dynamic_shared(size_t bytes);
void poison_shared();
void free_shared();

// ---- race_checker.cpp ---------------------------------------------------------------------------

void race_begin_launch();
void race_begin_block();
void race_barrier();
void race_warp_sync(int warp);
void race_fence(int thread);
void race_access(const void* address, size_t bytes, bool write, bool atomic);
void race_ignore(const void* begin, size_t bytes);  // the threads' stacks
void race_forget(const void* begin, size_t bytes);  // shared memory at the start of a block

}  // namespace mcibi_host
