// Marks a function usable from C++ and from CUDA device code. Each source has a copy of its own:
// they are compiled for different instruction sets, of which the linker must not keep one for all.
#pragma once

#if defined(__CUDACC__)
#define MCIBI_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define MCIBI_HOST_DEVICE static inline
#endif
