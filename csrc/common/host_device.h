// Marks a function that C++ and CUDA device code both use. It has internal linkage, so that every
// source file has its own copy: sources are compiled for different instruction sets, and the linker
// must not keep one copy for all of them.
#pragma once

#if defined(__CUDACC__)
#define MCIBI_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define MCIBI_HOST_DEVICE static inline
#endif
