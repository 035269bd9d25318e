// What kernels need beyond portable CUDA C++, once for nvcc (inline PTX) and once for the host
// executor (csrc/testing), with the fragment layouts of mma and ldmatrix from the PTX ISA; and the
// conversions of elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/numbers.h"

#ifdef MCIBI_HOST_EXECUTOR
#include "testing/mma.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace mcibi_fast {

template <typename T>
struct TypeIdentity {
  using Type = T;
};

inline constexpr unsigned kFullWarp = 0xffffffffu;  // all lanes

// An element in the type in which it is computed.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// The element nearest to a computed value.
template <typename Element, typename T>
__device__ __forceinline__ Element narrow(T value) {
  return static_cast<Element>(value);
}
template <>
__device__ __forceinline__ __half narrow<__half, float>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float value) {
  return __float2bfloat16_rn(value);
}

// 16 bytes of neighbouring elements, loaded and stored at once.
template <typename Element>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(Element);
  Element values[kSize];
};

// Whether Vectors may be loaded and stored there.
MCIBI_HOST_DEVICE bool aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

}  // namespace mcibi_fast

// MCIBI_SHARED(tile, float[4][32]): a block's static shared array `tile`.
// MCIBI_DYNAMIC_SHARED(bytes): the block's dynamic shared memory as `unsigned char* bytes`, aligned
// to 128 bytes.
#ifdef MCIBI_HOST_EXECUTOR
#define MCIBI_SHARED(name, ...) \
  auto& name = ::mcibi_host::shared<typename ::mcibi_fast::TypeIdentity<__VA_ARGS__>::Type>([] {})
#define MCIBI_DYNAMIC_SHARED(name) unsigned char* const name = ::mcibi_host::dynamic_shared()
#else
#define MCIBI_SHARED(name, ...) \
  __shared__ typename ::mcibi_fast::TypeIdentity<__VA_ARGS__>::Type name
#define MCIBI_DYNAMIC_SHARED(name)                                       \
  extern __shared__ __align__(128) unsigned char mcibi_dynamic_shared[]; \
  unsigned char* const name = mcibi_dynamic_shared
#endif

namespace mcibi_fast {

#ifdef MCIBI_HOST_EXECUTOR

template <typename T>
inline void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mcibi_host::mma_m16n8k16<T>(acc, a, b);
}
inline void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mcibi_host::mma_m16n8k8_tf32(acc, a, b);
}
template <int kCount>
inline void ldmatrix(uint32_t (&out)[kCount], const void* row) {
  mcibi_host::ldmatrix<kCount, false>(out, row);
}
template <int kCount>
inline void ldmatrix_trans(uint32_t (&out)[kCount], const void* row) {
  mcibi_host::ldmatrix<kCount, true>(out, row);
}
inline void cp_async_16(void* shared, const void* global, bool valid = true) {
  mcibi_host::async_copy(shared, global, 16, valid ? 16 : 0);
}
inline void cp_async_8(void* shared, const void* global, bool valid = true) {
  mcibi_host::async_copy(shared, global, 8, valid ? 8 : 0);
}
inline void cp_async_commit() { mcibi_host::async_commit(); }
inline float exp2_fast(float x) { return exp2f(x); }
inline float maximum_or_nan(float a, float b) { return a != a ? a : b <= a ? a : b; }
inline int opaque(int x) { return x; }
#define MCIBI_CP_ASYNC_WAIT(groups) ::mcibi_host::async_wait(MCIBI_SITE(kAsyncWait), (groups))

#else

// acc += A B for one warp: A is 16x16 row-major, B 16x8 column-major, T __half or __nv_bfloat16.
// With group = lane / 4 and pair = lane % 4, two consecutive columns in each 32-bit register:
//   a[0] A[group][2 pair], a[1] A[group + 8][2 pair], a[2] A[group][2 pair + 8], a[3] both + 8
//   b[0] B[2 pair][group], b[1] B[2 pair + 8][group]
//   acc[0..1] D[group][2 pair..], acc[2..3] D[group + 8][2 pair..]
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&acc)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&acc)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// acc += A B for one warp in TF32: A is 16x8 row-major, B 8x8 column-major, 32-bit floats of which
// the low 13 mantissa bits are ignored.
//   a[0] A[group][pair], a[1] A[group + 8][pair], a[2] A[group][pair + 4], a[3] both
//   b[0] B[pair][group], b[1] B[pair + 4][group]; acc as in m16n8k16
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads kCount (1, 2, 4) 8x8 matrices of 16-bit elements from shared memory. Lane 8 i + r gives the
// address of row r of matrix i (16 bytes, aligned; lanes past 8 kCount are not read). out[i] holds
// elements [lane / 4][2 (lane % 4) ..] of matrix i, or of its transpose.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
template <int kCount>
__device__ __forceinline__ void ldmatrix(uint32_t (&out)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
  const uint32_t address = shared_address(row);
  if constexpr (kCount == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(out[0])
                 : "r"(address)
                 : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}
template <int kCount>
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&out)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
  const uint32_t address = shared_address(row);
  if constexpr (kCount == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(out[0])
                 : "r"(address)
                 : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// Copies 16 or 8 bytes from global to shared memory in the background (zeros where not valid;
// `global` is then not read). cp_async_commit() closes a group; MCIBI_CP_ASYNC_WAIT(n) waits until
// at most n of this thread's groups are in flight (a barrier must follow before other threads
// read).
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 8 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
#define MCIBI_CP_ASYNC_WAIT(groups) asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory")

// 2^x within 2 ulp in one instruction; 0 where the result would be subnormal.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger of the two; NaN if one of them is.
__device__ __forceinline__ float maximum_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// x, hidden from the compiler, so that it does not move what depends on x out of a loop, where it
// would occupy registers for a long time.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

#endif  // MCIBI_HOST_EXECUTOR

}  // namespace mcibi_fast
