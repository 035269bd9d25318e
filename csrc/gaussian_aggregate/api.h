// gaussian_aggregate: class representations drawn from the memory's Gaussians (Eq. 11, Algorithm 1)
// and their aggregation by the softmax over classes (Eq. 12). Declarations without torch.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtypes.h"
#include "common/map_strides.h"

namespace mcibi_fast {

// ---- CPU ----------------------------------------------------------------------------------------

// The operands of the table (C_dl, Eq. 11): mean[k] + std[k] * eps[k, z] in the dtype of eps.
struct GaussianTableInput {
  const double* memory;  // (K, 2) contiguous, on the host: mean, std
  int64_t classes;       // K
  int64_t channels;      // Z
  FloatKind kind;        // of eps: kFloat32 or kFloat64; kFloat32 for Philox
  const void* eps;       // (K, Z); null: Philox by (seed, step)
  int64_t eps_class_stride, eps_channel_stride;
  int64_t seed, step;
};

struct GaussianAggregateInput {
  GaussianTableInput table;
  FloatKind kind;      // of logits and out (and of their gradients)
  const void* logits;  // (B, K, h, w)
  MapStrides logits_strides;
  int64_t batch, height, width;
  bool channels_last;  // the memory format of the output
};

// Writes the table, (K, Z) contiguous, in table.kind.
MCIBI_DECLARE_CPU_KERNEL(gaussian_table_cpu, (const GaussianTableInput& input, void* table))

// Writes out (B, Z, h, w) and lse (B, h * w), the log-sum-exp of the logits, float32 (float64 for
// float64). With `hard`, out is the first argmax's row of the table, and lse the largest logit.
MCIBI_DECLARE_CPU_KERNEL(gaussian_aggregate_cpu,
                         (const GaussianAggregateInput& input, bool hard, void* out, void* lse))

// Writes grad_logits (B, K, h, w) for grad, the gradient of out.
MCIBI_DECLARE_CPU_KERNEL(gaussian_aggregate_backward_cpu,
                         (const GaussianAggregateInput& input, const void* lse, const void* grad,
                          const MapStrides& grad_strides, void* grad_logits))

// ---- CUDA ---------------------------------------------------------------------------------------

// Launchers take pointers to device memory and do not wait for the device, so that a CUDA graph can
// capture them. They return null, or the message of the CUDA runtime.

struct GaussianTableCudaInput {
  const void* memory;  // (K, 2): mean, std
  FloatKind memory_kind;
  int64_t memory_class_stride, memory_column_stride;
  int64_t classes;   // K
  int64_t channels;  // Z
  FloatKind kind;    // of eps: kFloat32 or kFloat64; kFloat32 for Philox
  const void* eps;   // (K, Z); null: Philox
  int64_t eps_class_stride, eps_channel_stride;
  const int64_t* state;  // Philox: (seed, step)
  int64_t state_stride;
};

struct GaussianAggregateCudaInput {
  GaussianTableCudaInput table;
  FloatKind kind;      // of logits and out (and of their gradients)
  const void* logits;  // (B, K, h, w)
  MapStrides logits_strides;
  int64_t batch, height, width;
  bool channels_last;  // the memory format of the output
  void* scratch;       // gaussian_aggregate_cuda_scratch() bytes, aligned to 16; may be null for 0
};

// Scratch memory of the forward and of the backward: the table once, in the element type of the
// logits, for bfloat16 and float16; otherwise nothing.
size_t gaussian_aggregate_cuda_scratch(const GaussianAggregateCudaInput& input);

// As the CPU kernels with these names.
const char* gaussian_table_cuda(const GaussianTableCudaInput& input, void* table,
                                CudaStream stream);
const char* gaussian_aggregate_cuda(const GaussianAggregateCudaInput& input, bool hard, void* out,
                                    void* lse, CudaStream stream);
const char* gaussian_aggregate_backward_cuda(const GaussianAggregateCudaInput& input,
                                             const void* lse, const void* grad,
                                             const MapStrides& grad_strides, void* grad_logits,
                                             CudaStream stream);

}  // namespace mcibi_fast
