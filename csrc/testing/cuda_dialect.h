// The CUDA C++ dialect for a plain C++ compiler: with this header force-included (-include),
// `g++ -x c++ -std=c++17` compiles a .cu file. Its kernels then run on the CPU, thread by thread,
// in the host executor (executor.cpp). Neither the CUDA toolkit nor its headers are needed.
//
// Kernels are ordinary CUDA C++ with three exceptions: launch() of common/launch.cuh instead of
// <<<>>>, and from common/device_intrinsics.cuh MCIBI_SHARED and MCIBI_DYNAMIC_SHARED instead of
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
