// Marks a function usable from C++ and from CUDA device code.
#pragma once

#if defined(__CUDACC__)
#define MCIBI_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MCIBI_HOST_DEVICE inline
#endif
