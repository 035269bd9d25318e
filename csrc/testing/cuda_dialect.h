// The CUDA C++ dialect for a plain C++ compiler: force-include this header (-include) and compile a
// .cu file with `g++ -x c++ -std=c++20`. Kernels then run on the CPU, thread by thread, under the
// host executor (executor.cpp). No CUDA toolkit is needed and none of its headers is used.
//
// Kernels stay ordinary CUDA C++, apart from three things found in common/device_intrinsics.cuh:
// mcibi_fast::launch() instead of <<<>>>, MCIBI_SHARED and MCIBI_DYNAMIC_SHARED instead of
// __shared__, and functions instead of inline PTX.
#pragma once

#define MCIBI_HOST_EXECUTOR 1

#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

#include "testing/half.h"
#include "testing/math.h"
#include "testing/runtime.h"
#include "testing/threads.h"
#include "testing/types.h"
