// What the CUDA kernels of this op share: entries of the table, and addresses in (B, C, h, w) maps.
#pragma once

#include "common/device_intrinsics.cuh"
#include "common/launch.cuh"
#include "gaussian_aggregate/api.h"
#include "gaussian_aggregate/math.h"

namespace mcibi_fast {

// Element (b, c, n) of a map, n = y * width + x.
struct MapAddress {
  MapStrides strides;
  int width;

  __device__ int64_t pixel(int b, int n) const {
    return b * strides.batch + (n / width) * strides.row + (n % width) * strides.column;
  }
};

// mean + std * eps (Eq. 11), rounded after the multiplication and after the addition.
__device__ __forceinline__ float table_entry(float mean, float std, float eps) {
  return __fadd_rn(mean, __fmul_rn(std, eps));
}
__device__ __forceinline__ double table_entry(double mean, double std, double eps) {
  return __dadd_rn(mean, __dmul_rn(std, eps));
}

// Channels z .. z + 3 of class k, z a multiple of 4.
struct Quad {
  int k, z;
};

// The table C_dl (Eq. 11) by quads of entries; zero outside the table.
class GaussianTable {
 public:
  __device__ explicit GaussianTable(const GaussianTableCudaInput& input) : input_(input) {
    if (input.eps == nullptr)
      philox_ = philox_state(input.state[0], input.state[input.state_stride]);
  }

  template <typename Scalar>
  __device__ __forceinline__ void entries(Quad q, Scalar (&out)[4]) const {
    if (q.k >= input_.classes) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = Scalar(0);
    } else if (input_.eps == nullptr) {
      float eps[4];
      gaussian_noise4(uint32_t(q.z) / 4, uint32_t(q.k), philox_, eps);
      combine(q, moments<float>(q.k), eps, out);
    } else if (input_.kind == FloatKind::kFloat32) {
      gather<float>(q, out);
    } else {
      gather<double>(q, out);
    }
  }

  // Calls place(item, entries of quad(item)) for the items threadIdx.x + blockDim.x i below count.
  // kMany: loads several at once if rows of eps can be read 16 bytes at a time. Otherwise one at a
  // time, which takes fewer registers.
  template <bool kMany, typename Scalar, typename QuadOf, typename Place>
  __device__ __forceinline__ void for_each(int count, QuadOf quad, Place place) const {
    if (kMany && has_vectors()) return for_each_vector<Scalar>(count, quad, place);
    for (int item = threadIdx.x; item < count; item += blockDim.x) {
      Scalar c[4];
      entries(quad(item), c);
      place(item, c);
    }
  }

 private:
  template <typename Noise>
  struct Moments {
    Noise mean, std;
  };

  template <typename Scalar, typename QuadOf, typename Place>
  __device__ __forceinline__ void for_each_vector(int count, QuadOf quad, Place place) const {
    constexpr int kInFlight = 4;
    for (int first = threadIdx.x; first < count; first += kInFlight * blockDim.x) {
      float eps[kInFlight][4];
      Moments<float> m[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const Quad q = quad(first + i * blockDim.x);
        m[i] = {0, 0};
        float4 v = make_float4(0, 0, 0, 0);
        if (first + i * int(blockDim.x) < count && q.k < input_.classes && q.z < input_.channels) {
          v = *reinterpret_cast<const float4*>(row<float>(q.k) + q.z);
          m[i] = moments<float>(q.k);
        }
        memcpy(eps[i], &v, sizeof(v));
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int item = first + i * blockDim.x;
        if (item >= count) break;
        Scalar c[4];
        combine(quad(item), m[i], eps[i], c);
        place(item, c);
      }
    }
  }

  __device__ bool has_vectors() const {
    return input_.eps != nullptr && input_.kind == FloatKind::kFloat32 &&
           input_.eps_channel_stride == 1 && input_.eps_class_stride % 4 == 0 &&
           input_.channels % 4 == 0 && aligned(input_.eps);
  }

  template <typename Noise>
  __device__ const Noise* row(int k) const {
    return static_cast<const Noise*>(input_.eps) + k * input_.eps_class_stride;
  }

  template <typename Noise, typename Scalar>
  __device__ __forceinline__ void gather(Quad q, Scalar (&out)[4]) const {
    Noise eps[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      eps[i] = q.z + i < input_.channels ? row<Noise>(q.k)[(q.z + i) * input_.eps_channel_stride]
                                         : Noise(0);
    combine(q, moments<Noise>(q.k), eps, out);
  }

  template <typename Noise, typename Scalar>
  __device__ __forceinline__ void combine(Quad q, Moments<Noise> m, const Noise (&eps)[4],
                                          Scalar (&out)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out[i] = q.z + i < input_.channels ? Scalar(table_entry(m.mean, m.std, eps[i])) : Scalar(0);
  }

  template <typename Noise>
  __device__ __forceinline__ Moments<Noise> moments(int k) const {
    const int64_t at = k * input_.memory_class_stride, step = input_.memory_column_stride;
    if (input_.memory_kind == FloatKind::kFloat32) {
      const float* from = static_cast<const float*>(input_.memory) + at;
      return {Noise(from[0]), Noise(from[step])};
    }
    const double* from = static_cast<const double*>(input_.memory) + at;
    return {Noise(from[0]), Noise(from[step])};
  }

  const GaussianTableCudaInput& input_;
  PhiloxState philox_;
};

}  // namespace mcibi_fast
