// Tests the matrix instructions, ldmatrix and cp.async of common/device_intrinsics.cuh. It runs in
// the host executor and on a GPU (nvcc -x cu -std=c++17 -arch=native -Icsrc), where it shows that
// the executor has the fragment layouts of the hardware. Exit status 1 on failure.
#ifndef __CUDACC__
#include "testing/cuda_dialect.h"
#endif

// after the dialect
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "common/device_intrinsics.cuh"
#include "common/launch.cuh"
#include "testing/expect.h"

namespace {

// Host memory that the GPU can access too.
template <typename T>
struct Shared {
  T* data = nullptr;
  explicit Shared(size_t count) {
    expect(cudaMallocHost(reinterpret_cast<void**>(&data), count * sizeof(T)) == cudaSuccess,
           "memory");
  }
  ~Shared() { cudaFreeHost(data); }
};

template <typename... Parameters>
void run(const std::string& what, void (*kernel)(Parameters...), int threads,
         Parameters... parameters) {
  const cudaError_t status = mcibi_fast::launch(kernel, dim3(1), dim3(unsigned(threads)), 0,
                                                cudaStream_t{}, parameters...);
  const cudaError_t later = cudaDeviceSynchronize();
  expect(status == cudaSuccess && later == cudaSuccess,
         what + ": " + cudaGetErrorString(status != cudaSuccess ? status : later));
}

// ---- mma.sync -----------------------------------------------------------------------------------

// As in kernels, ldmatrix loads the fragments from rows in shared memory, so that a wrong layout
// only passes if both have the same mistake. The TF32 fragments are loaded element by element.
template <typename T>
struct alignas(16) Row {
  T values[24];  // padded: 48 bytes
};

template <typename T>
__global__ void mma_kernel(const T* a, const T* b, float* d) {
  MCIBI_SHARED(rows_a, Row<T>[16]);
  MCIBI_SHARED(rows_b, Row<T>[16]);
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 256; i += 32) rows_a[i / 16].values[i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) rows_b[i / 8].values[i % 8] = b[i];
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[2];
  mcibi_fast::ldmatrix(fragment_a, &rows_a[lane % 16].values[lane / 16 * 8]);
  mcibi_fast::ldmatrix_trans(fragment_b, &rows_b[lane % 16]);
  float acc[4] = {1, 2, 3, 4};
  mcibi_fast::mma_m16n8k16<T>(acc, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i)
    d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = acc[i] - float(i + 1);
}

__global__ void tf32_kernel(const float* a, const float* b, float* d) {
  const int lane = int(threadIdx.x), group = lane / 4, pair = lane % 4;
  uint32_t fragment_a[4], fragment_b[2];
  for (int i = 0; i < 4; ++i)
    fragment_a[i] = __float_as_uint(a[(group + i % 2 * 8) * 8 + pair + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) fragment_b[i] = __float_as_uint(b[(pair + 4 * i) * 8 + group]);
  float acc[4] = {};
  mcibi_fast::mma_m16n8k8_tf32(acc, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + pair * 2 + i % 2] = acc[i];
}

template <typename T>
void test_product(const std::string& what, void (*kernel)(const T*, const T*, float*), int depth) {
  std::mt19937 bits(7);
  std::uniform_int_distribution<int> small(-8, 8);  // exact in every format
  const Shared<T> a(size_t(16 * depth)), b(size_t(depth * 8));
  const Shared<float> d(16 * 8);
  for (int i = 0; i < 16 * depth; ++i) a.data[i] = T(float(small(bits)));
  for (int i = 0; i < depth * 8; ++i) b.data[i] = T(float(small(bits)));
  for (int i = 0; i < 16 * 8; ++i) d.data[i] = NAN;
  run<const T*, const T*, float*>(what, kernel, 32, a.data, b.data, d.data);
  bool right = true;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0;
      for (int k = 0; k < depth; ++k)
        sum += float(a.data[row * depth + k]) * float(b.data[k * 8 + column]);
      right &= d.data[row * 8 + column] == sum;
    }
  }
  expect(right, what);
}

// ---- ldmatrix -----------------------------------------------------------------------------------

template <int kCount>
__global__ void ldmatrix_kernel(uint32_t* plain, uint32_t* transposed) {
  struct alignas(16) Line {
    uint16_t values[8];
  };
  MCIBI_SHARED(lines, Line[32]);
  const int lane = int(threadIdx.x);
  for (int i = 0; i < 8; ++i) lines[lane].values[i] = uint16_t(lane * 8 + i);
  __syncwarp();
  uint32_t out[kCount];
  mcibi_fast::ldmatrix(out, &lines[lane % (8 * kCount)]);
  for (int i = 0; i < kCount; ++i) plain[lane * kCount + i] = out[i];
  mcibi_fast::ldmatrix_trans(out, &lines[lane % (8 * kCount)]);
  for (int i = 0; i < kCount; ++i) transposed[lane * kCount + i] = out[i];
}

template <int kCount>
void test_ldmatrix() {
  const std::string what = "ldmatrix.x" + std::to_string(kCount);
  const Shared<uint32_t> plain(32 * kCount), transposed(32 * kCount);
  run(what, ldmatrix_kernel<kCount>, 32, plain.data, transposed.data);
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < kCount; ++matrix) {
      const auto element = [matrix](int row, int column) {
        return uint32_t((matrix * 8 + row) * 8 + column);
      };
      const int row = lane / 4, column = lane % 4 * 2, at = lane * kCount + matrix;
      right &= plain.data[at] == (element(row, column) | element(row, column + 1) << 16);
      right &= transposed.data[at] == (element(column, row) | element(column + 1, row) << 16);
    }
  }
  expect(right, what);
}

// ---- cp.async -----------------------------------------------------------------------------------

__global__ void async_kernel(const float4* in, float* out) {
  MCIBI_SHARED(tile, float4[3]);
  tile[2].x = -1;
  for (int i = 0; i < 2; ++i) {
    mcibi_fast::cp_async_16(&tile[i], in + i);
    mcibi_fast::cp_async_commit();
  }
  mcibi_fast::cp_async_16(&tile[2], in, false);
  mcibi_fast::cp_async_commit();
#ifdef MCIBI_HOST_EXECUTOR
  out[3] = tile[0].y;  // too early
#endif
  MCIBI_CP_ASYNC_WAIT(2);
  out[0] = tile[0].y;
  MCIBI_CP_ASYNC_WAIT(0);
  out[1] = tile[1].y;
  out[2] = tile[2].x;
}

void test_async_copies() {
  const Shared<float4> in(2);
  const Shared<float> out(4);
  in.data[0] = {0, 1, 2, 3};
  in.data[1] = {4, 5, 6, 7};
  out.data[3] = NAN;
  run<const float4*, float*>("cp.async", async_kernel, 1, in.data, out.data);
  expect(out.data[0] == 1 && out.data[1] == 5 && out.data[2] == 0 && std::isnan(out.data[3]),
         "cp.async lands at its wait, not before");
}

}  // namespace

int main() {
  test_product<__half>("m16n8k16 with float16", mma_kernel<__half>, 16);
  test_product<__nv_bfloat16>("m16n8k16 with bfloat16", mma_kernel<__nv_bfloat16>, 16);
  test_product<float>("m16n8k8 with TF32", tf32_kernel, 8);
  test_ldmatrix<1>();
  test_ldmatrix<2>();
  test_ldmatrix<4>();
  test_async_copies();
  return report("intrinsics_test");
}
