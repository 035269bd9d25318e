// Tests the host executor itself: what it computes and what it refuses. Exit status 1 on failure.
// With an argument it writes outside shared memory, and AddressSanitizer must end it.
#include "testing/cuda_dialect.h"

// after the dialect
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/device_intrinsics.cuh"
#include "common/launch.cuh"
#include "testing/controls.h"
#include "testing/expect.h"

namespace {

using mcibi_fast::launch;

constexpr unsigned kAll = mcibi_fast::kFullWarp;

template <typename Kernel, typename... Arguments>
cudaError_t run(Kernel* kernel, int threads, size_t shared, Arguments... arguments) {
  return launch(kernel, dim3(1), dim3(unsigned(threads)), shared, cudaStream_t{}, arguments...);
}

void expect_error(cudaError_t status, const char* part) {
  const std::string error = mcibi_host::last_error();
  expect(status == cudaErrorLaunchFailure && error.find(part) != std::string::npos,
         std::string("an error about \"") + part + "\", got: " + error);
}

// ---- synchronisation ----------------------------------------------------------------------------

__global__ void reverse_kernel(const int* in, int* out) {
  MCIBI_SHARED(values, int[64]);
  values[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = values[63 - threadIdx.x];
}
__global__ void divergent_kernel() {
  if (threadIdx.x < 33) __syncthreads();
  if (threadIdx.x >= 33) __syncthreads();
}
__global__ void unreached_kernel() {
  MCIBI_SHARED(stop, int);
  if (threadIdx.x == 0) stop = 1;
  __syncthreads();
  if (threadIdx.x != 5) __syncthreads();
  if (threadIdx.x == 5) __syncwarp();
}
__global__ void early_exit_kernel(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void missing_lane_kernel() {
  if (threadIdx.x % 32 != 7) __syncwarp();
}
__global__ void full_mask_kernel() { __syncwarp(); }
__global__ void two_masks_kernel() { __syncwarp(threadIdx.x < 16 ? 0x0001ffffu : kAll); }
__global__ void not_in_mask_kernel() { __shfl_sync(0x0000ffffu, 1, 0); }
__global__ void outside_source_kernel() {
  if (threadIdx.x < 16) __shfl_sync(0x0000ffffu, 1, 20);
}
__global__ void vote_kernel(int* out) {
  const int x = int(threadIdx.x);
  out[x] = __syncthreads_count(x % 3 == 0);
  out[64 + x] = __syncthreads_or(x == 63) + 2 * __syncthreads_and(x < 63);
}

void test_synchronisation() {
  for (int seed = 0; seed < 6; ++seed) {
    host_set_seed(uint64_t(seed));
    std::vector<int> in(256), out(256, -1);
    for (int i = 0; i < 256; ++i) in[size_t(i)] = i;
    const cudaError_t status =
        launch(reverse_kernel, dim3(4), dim3(64), 0, cudaStream_t{}, in.data(), out.data());
    bool right = status == cudaSuccess;
    for (int i = 0; i < 256; ++i) right &= out[size_t(i)] == i / 64 * 64 + 63 - i % 64;
    expect(right, "blocks reverse their part");
    expect_error(run(divergent_kernel, 64, 0), "is at the barrier");
    expect_error(run(unreached_kernel, 64, 0), "executor_test.cpp");
    expect_error(run(missing_lane_kernel, 64, 0), "waits");
    expect_error(run(two_masks_kernel, 32, 0), "mask");
    expect_error(run(not_in_mask_kernel, 32, 0), "not in its own mask");
    expect_error(run(outside_source_kernel, 32, 0), "not in the mask");
    expect_error(run(full_mask_kernel, 40, 0), "never were");
    std::vector<int> ones(64, 0), votes(128, -1);
    expect(run(early_exit_kernel, 64, 0, ones.data()) == cudaSuccess && ones[39] == 1,
           "a barrier waits only for threads that have not exited");
    expect(run(vote_kernel, 64, 0, votes.data()) == cudaSuccess && votes[0] == 22 &&
               votes[63] == 22 && votes[64] == 1 && votes[127] == 1,
           "votes");
  }
  host_set_seed(0);
}

// ---- warp collectives and atomics ---------------------------------------------------------------

__global__ void shuffle_kernel(int* out) {
  const int x = int(threadIdx.x);
  out[x] = __shfl_sync(kAll, x, x + 1);
  out[32 + x] = __shfl_xor_sync(kAll, x, 5);
  out[64 + x] = __shfl_down_sync(kAll, x, 3, 8);
  out[96 + x] = __shfl_up_sync(kAll, x, 3, 8);
  out[128 + x] = int(__ballot_sync(kAll, x % 2 == 0));
  out[160 + x] = int(__match_any_sync(kAll, x / 8));
  out[192 + x] = __reduce_max_sync(kAll, x ^ 9);
}
__global__ void atomic_kernel(int* sum, unsigned* largest, float* total, int* swapped) {
  atomicAdd(sum, 1);
  atomicMax(largest, blockIdx.x * 100 + threadIdx.x);
  atomicAdd(total, 0.5f);
  if (atomicCAS(swapped, 0, 1) == 0) atomicExch(swapped, 7);
}

void test_collectives() {
  std::vector<int> out(224, -1);
  expect(run(shuffle_kernel, 32, 0, out.data()) == cudaSuccess, "shuffles run");
  for (int x = 0; x < 32; ++x) {
    const auto at = [&](int row) { return out[size_t(32 * row + x)]; };
    expect(at(0) == (x + 1) % 32 && at(1) == (x ^ 5), "shfl and shfl_xor");
    expect(at(2) == (x % 8 < 5 ? x + 3 : x) && at(3) == (x % 8 >= 3 ? x - 3 : x),
           "shfl_down and shfl_up of width 8");
    expect(unsigned(at(4)) == 0x55555555u && unsigned(at(5)) == 0xffu << (x / 8 * 8) && at(6) == 31,
           "ballot, match_any, reduce_max");
  }
  int sum = 0, swapped = 0;
  unsigned largest = 0;
  float total = 0;
  launch(atomic_kernel, dim3(3), dim3(96), 0, cudaStream_t{}, &sum, &largest, &total, &swapped);
  expect(sum == 288 && largest == 295 && total == 144.0f && swapped == 7, "atomics");
}

// ---- shared memory ------------------------------------------------------------------------------

__global__ void poison_kernel(int* nans) {
  MCIBI_SHARED(fixed, float[4]);
  MCIBI_DYNAMIC_SHARED(bytes);
  auto* flexible = reinterpret_cast<double*>(bytes);
  atomicAdd(nans, int(std::isnan(fixed[threadIdx.x])) + int(std::isnan(flexible[threadIdx.x])));
  fixed[threadIdx.x] = 1.0f;
  flexible[threadIdx.x] = 1.0;
}
__global__ void large_kernel() {
  MCIBI_SHARED(large, char[50000]);
  large[0] = 1;
}
__global__ void no_dynamic_kernel() {
  MCIBI_DYNAMIC_SHARED(bytes);
  bytes[0] = 1;
}
__global__ void overflow_kernel(int index, int dynamic) {
  MCIBI_SHARED(fixed, int[8]);
  MCIBI_DYNAMIC_SHARED(bytes);
  if (dynamic)
    bytes[index] = 1;
  else
    *(&fixed[0] + index) = 1;
}

void test_shared_memory() {
  int nans = 0;
  launch(poison_kernel, dim3(3), dim3(4), 4 * sizeof(double), cudaStream_t{}, &nans);
  expect(nans == 24, "shared memory starts as NaN in every block");
  expect_error(run(large_kernel, 1, 0), "above the limits");
  expect_error(run(no_dynamic_kernel, 1, 0), "no dynamic shared memory");
  expect(run(no_dynamic_kernel, 1, 150 * 1024) == cudaSuccess, "launch() asks for consent");
  expect(run(no_dynamic_kernel, 1, 164 * 1024) == cudaErrorInvalidValue, "the device's limit");
  expect(run(no_dynamic_kernel, 1025, 16) == cudaErrorInvalidConfiguration, "1025 threads");
}

// ---- intrinsics; what they compute is in intrinsics_test.cpp ------------------------------------

__global__ void misaligned_rows_kernel() {
  MCIBI_SHARED(rows, float4[32]);
  uint32_t out[1];
  mcibi_fast::ldmatrix(out, reinterpret_cast<char*>(&rows[threadIdx.x]) + 4);
}

// ---- 16-bit floats ------------------------------------------------------------------------------

void test_halves() {
  bool round_trip = true;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = __ushort_as_half(uint16_t(bits));
    const auto brain = __ushort_as_bfloat16(uint16_t(bits));
    if (!std::isnan(float(half)))
      round_trip &= __half_as_ushort(__float2half_rn(float(half))) == bits;
    if (!std::isnan(float(brain)))
      round_trip &= __bfloat16_as_ushort(__float2bfloat16_rn(float(brain))) == bits &&
                    __float_as_uint(float(brain)) == bits << 16;
  }
  expect(round_trip, "16-bit floats survive float");
  const auto half_of = [](float x) { return float(__float2half_rn(x)); };
  expect(half_of(2049.0f) == 2048.0f && half_of(2051.0f) == 2052.0f, "half: ties to even");
  expect(std::isinf(half_of(65520.0f)) && half_of(65519.0f) == 65504.0f, "half: overflow");
  expect(half_of(0x1.8p-24f) == 0x1p-23f && half_of(0x1p-25f) == 0.0f &&
             half_of(0x1.01p-25f) == 0x1p-24f && half_of(-0x1.ffep-15f) == -0x1p-14f,
         "half: subnormal");
  expect(float(__float2bfloat16_rn(0x1.01p0f)) == 1.0f &&
             float(__float2bfloat16_rn(0x1.03p0f)) == 0x1.04p0f,
         "bfloat16: ties to even");
  expect(std::isnan(half_of(std::numeric_limits<float>::quiet_NaN())), "half: NaN");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    const bool dynamic = std::strcmp(argv[1], "dynamic") == 0;
    run(overflow_kernel, 1, 64, dynamic ? 64 : 8, int(dynamic));
    return 0;  // not reached under AddressSanitizer
  }
  test_synchronisation();
  test_collectives();
  test_shared_memory();
  expect_error(run(misaligned_rows_kernel, 32, 0), "16-byte aligned");
  test_halves();
  return report("host_executor_test");
}
