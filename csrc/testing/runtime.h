// The part of the CUDA runtime API that launchers use. Everything runs immediately, on the caller's
// thread, and "device" pointers are ordinary host pointers.
#pragma once

#include <cstring>
#include <new>

#include "testing/threads.h"

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline cudaError_t cudaGetLastError() { return cudaError_t(mcibi_host::take_status()); }
inline cudaError_t cudaPeekAtLastError() { return cudaError_t(mcibi_host::peek_status()); }
inline const char* cudaGetErrorString(cudaError_t) { return mcibi_host::last_error(); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  *value = mcibi_host::device_attribute(attribute);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** address, size_t bytes) {
  *address = ::operator new(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* address) {
  ::operator delete(address);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
template <typename Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return cudaError_t(
      mcibi_host::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), bytes));
}
