// The host executor: runs a launch block by block, each block's threads as fibers.
#include "testing/executor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>

#include "testing/runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace mcibi_host {

Thread* running = nullptr;

namespace {

constexpr size_t kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 * 1024;

std::vector<Thread> threads;  // of the block that runs
int live = 0, at_barrier = 0, barrier_site = 0, votes = 0;
struct Warp {
  unsigned ready, live, waiting;  // lanes; waiting: in a collective
};
std::array<Warp, kMaxThreads / 32> warps;
int sticky_warp = 0;
std::mt19937_64 random_bits;
Context scheduler;
const std::function<void()>* thread_body = nullptr;

struct LaunchFailed {};  // thrown by fail() to unwind the thread's frames

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

// ---- scheduling ---------------------------------------------------------------------------------

void make_ready(Thread& t) {
  t.state = State::kReady;
  warps[size_t(t.linear / 32)].ready |= 1u << (t.linear % 32);
}

// Seed 0 runs the lowest ready thread, seed 1 the highest. Larger even seeds draw any ready thread;
// larger odd seeds draw a warp and stay with it as long as it can run.
int pick_ready() {
  const int count_warps = int(threads.size() + 31) / 32;
  const int step = seed == 1 ? count_warps - 1 : 1;
  int warp = seed == 1 ? count_warps - 1 : 0;
  if (seed >= 2)
    warp = seed % 2 && warps[size_t(sticky_warp)].ready
               ? sticky_warp
               : int(random_bits() % unsigned(count_warps));
  for (int i = 0; i < count_warps; ++i, warp = (warp + step) % count_warps) {
    unsigned lanes = warps[size_t(warp)].ready;
    if (lanes == 0) continue;
    sticky_warp = warp;
    if (seed == 1) return warp * 32 + 31 - __builtin_clz(lanes);
    const unsigned count = unsigned(__builtin_popcount(lanes));
    for (unsigned skip = seed == 0 ? 0 : unsigned(random_bits() % count); skip > 0; --skip)
      lanes &= lanes - 1;
    return warp * 32 + __builtin_ctz(lanes);
  }
  return -1;
}

// Switches to the scheduler; returns when this thread is ready again and picked.
void yield() { running->context.switch_to(scheduler); }

void release_barrier() {
  race_barrier();
  at_barrier = 0;
  for (Thread& t : threads)
    if (t.state == State::kBarrier) make_ready(t);
}

void exit_thread(Thread& self) {
  self.state = State::kExited;
  --live;
  Warp& warp = warps[size_t(self.linear / 32)];
  warp.live &= ~(1u << lane_id());
  for (unsigned waiting = warp.waiting; waiting != 0; waiting &= waiting - 1) {
    const Thread& other = threads[size_t(self.linear / 32 * 32 + __builtin_ctz(waiting))];
    if (in_mask(other.mask, lane_id()))
      fail("exits while " + thread_name(other) + " waits for it at " + site_name(other.site));
  }
  if (live > 0 && at_barrier == live) release_barrier();
}

void thread_entry() {
  Context::arrived();
  try {
    (*thread_body)();
    exit_thread(*running);
  } catch (const LaunchFailed&) {
  }
  running->context.switch_to(scheduler, true);
}

void report_deadlock() {
  const auto waiting = std::find_if(threads.begin(), threads.end(),
                                    [](const Thread& t) { return t.state != State::kExited; });
  const auto there = std::count_if(threads.begin(), threads.end(), [&](const Thread& t) {
    return t.state == waiting->state && t.site == waiting->site;
  });
  record_error(cudaErrorLaunchFailure, thread_name(*waiting) + " waits at " +
                                           site_name(waiting->site) + ", reached by " +
                                           std::to_string(there) + " of the block's " +
                                           std::to_string(live) + " live threads");
}

// ---- launches -----------------------------------------------------------------------------------

unsigned char* stacks() {
  static unsigned char* const memory = [] {
    void* all = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) std::abort();
    auto* bytes = static_cast<unsigned char*>(all);
    for (size_t i = 0; i < kMaxThreads; ++i)  // a stack overflow is a segmentation fault
      mprotect(bytes + i * kStackBytes, size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);
    race_ignore(all, kMaxThreads * kStackBytes);
    return bytes;
  }();
  return memory;
}

void run_block(int64_t number) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  blockIdx = {unsigned(number % gridDim.x), unsigned(number / gridDim.x % gridDim.y),
              unsigned(number / gridDim.x / gridDim.y)};
  at_barrier = sticky_warp = 0;
  warps.fill({});
  live = int(threads.size());
  race_begin_block();
  poison_shared();
  for (unsigned i = 0; i < threads.size(); ++i) {
    Thread& t = threads[i];
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    t.linear = int(i);
    t.open_group.clear();
    t.groups.clear();
    t.context.prepare(stacks() + i * kStackBytes + page, kStackBytes - page, thread_entry);
    make_ready(t);
    warps[i / 32].live |= 1u << (i % 32);
  }
  while (live > 0 && peek_status() == cudaSuccess) {
    const int next = pick_ready();
    if (next < 0) return report_deadlock();
    running = &threads[size_t(next)];
    warps[size_t(next / 32)].ready &= ~(1u << (next % 32));
    threadIdx = running->index;
    scheduler.switch_to(running->context);
    running = nullptr;
  }
}

}  // namespace

std::string thread_name(const Thread& t) {
  const auto triple = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
  };
  return "thread " + triple(t.index.x, t.index.y, t.index.z) + " of block " +
         triple(blockIdx.x, blockIdx.y, blockIdx.z);
}

void fail(const std::string& message) {
  record_error(cudaErrorLaunchFailure, thread_name(*running) + " " + message);
  throw LaunchFailed();
}
void fail_without_unwinding(const std::string& message) {
  record_error(cudaErrorLaunchFailure, thread_name(*running) + " " + message);
  running->context.switch_to(scheduler);  // never continued: the launch is over
  std::abort();
}

void run(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
         const std::function<void()>& body) {
  if (peek_status() != cudaSuccess || !check_launch(kernel, grid, block, dynamic_shared_bytes))
    return;
  gridDim = grid;
  blockDim = block;
  thread_body = &body;
  random_bits.seed(seed);
  threads.resize(size_t(block.x) * block.y * block.z);
  allocate_dynamic_shared(dynamic_shared_bytes);
  race_begin_launch();
  std::vector<int64_t> order(size_t(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), int64_t(0));
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed >= 2) std::shuffle(order.begin(), order.end(), random_bits);
  for (size_t i = 0; i < order.size() && peek_status() == cudaSuccess; ++i) run_block(order[i]);
  free_shared();
}

// ---- barriers and collectives -------------------------------------------------------------------

int lane_id() { return running->linear % 32; }

int sync_threads(int site, Vote vote, int predicate) {
  if (site == skipped_site) return predicate != 0;
  Thread& self = *running;
  if (at_barrier == 0) {
    votes = 0;
    barrier_site = site;
  }
  if (site != barrier_site)
    fail("is at the barrier " + site_name(site) + " while other threads of its block are at " +
         site_name(barrier_site));
  self.state = State::kBarrier;
  self.site = site;
  votes += predicate != 0;
  if (++at_barrier == live) {
    const int result = vote == Vote::kCount ? votes
                       : vote == Vote::kAnd ? votes == live
                                            : votes > 0;
    for (Thread& t : threads) t.result = result;
    release_barrier();
  }
  yield();
  return self.result;
}

void collective(int site, unsigned mask, Complete complete, void* operand) {
  Thread& self = *running;
  Warp& warp = warps[size_t(self.linear / 32)];
  if (!in_mask(mask, lane_id())) fail("is not in its own mask at " + site_name(site));
  if ((mask & warp.live) != mask)
    fail("waits at " + site_name(site) + " for lanes " + hex(mask & ~warp.live) +
         ", which have exited or never were");
  self.state = State::kCollective;
  self.site = site;
  self.mask = mask;
  self.complete = complete;
  self.operand = operand;
  warp.waiting |= 1u << lane_id();
  if ((warp.waiting & mask) == mask) {
    Thread* const lanes = &threads[size_t(self.linear / 32 * 32)];
    void* operands[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
      if (!in_mask(mask, lane)) continue;
      const Thread& other = lanes[lane];
      if (other.site != site || other.mask != mask || other.complete != complete)
        fail("is at " + site_name(site) + " with mask " + hex(mask) + " while " +
             thread_name(other) + " is at " + site_name(other.site) + " with mask " +
             hex(other.mask));
      operands[lane] = other.operand;
    }
    complete(mask, operands);
    warp.waiting &= ~mask;
    for (int lane = 0; lane < 32; ++lane)
      if (in_mask(mask, lane)) make_ready(lanes[lane]);
  }
  yield();
}

void sync_warp(int site, unsigned mask) {
  if (site == skipped_site) return;
  // The race checker counts only barriers of all live lanes, so that it never accepts too much.
  const auto complete = [](unsigned lanes, void* const*) {
    const int warp = running->linear / 32;
    if (lanes == warps[size_t(warp)].live) race_warp_sync(warp);
  };
  collective(site, mask, complete, nullptr);
}

void thread_fence(int site) {
  if (site != skipped_site) race_fence(running->linear);
}
void note_atomic(const void* address, size_t bytes) { race_access(address, bytes, true, true); }

}  // namespace mcibi_host
