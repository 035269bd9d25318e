// Launching kernels, with nvcc or with the host executor (csrc/testing).
#pragma once

#include "common/device_intrinsics.cuh"
#include "common/dtypes.h"

namespace mcibi_fast {

// Dynamic shared memory that a launch may use without cudaFuncSetAttribute: static arrays take at
// most 32 of the 48 KiB that a block has by default.
inline constexpr size_t kDefaultSharedBytes = 16 * 1024;

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), after raising the kernel's limit of
// dynamic shared memory where needed. Returns the launch's error.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
#ifdef MCIBI_HOST_EXECUTOR
  (void)stream;
  mcibi_host::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                  [=] { kernel(static_cast<Parameters>(arguments)...); });
#else
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  // clang-format on
#endif
  return cudaGetLastError();
}

// A grid of one dimension, the one that may hold the most blocks.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_blocks(void (*kernel)(Parameters...), int64_t blocks, int threads,
                          size_t shared_bytes, CudaStream stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                shared_bytes, stream, arguments...);
}

// What a launcher returns: null for success.
inline const char* launch_message(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Calls f(Element()) with the element type of that kind; f launches and returns a cudaError_t.
template <typename F>
const char* launch_for(FloatKind kind, const F& f) {
  switch (kind) {
    case FloatKind::kFloat32:
      return launch_message(f(float()));
    case FloatKind::kFloat64:
      return launch_message(f(double()));
    case FloatKind::kBFloat16:
      return launch_message(f(__nv_bfloat16()));
    case FloatKind::kFloat16:
      return launch_message(f(__half()));
  }
  return launch_message(cudaErrorInvalidValue);
}

// A figure of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

}  // namespace mcibi_fast
