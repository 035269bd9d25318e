// class_rank_attention: attention (Eq. 13) in which keys and values are the same matrix, the
// weights W of the classes: softmax(scale Q W^T) W. Declarations without torch.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtypes.h"
#include "common/map_strides.h"

namespace mcibi_fast {

// Query and weights are (B, N, K), with the strides of a map (B, K, 1, N).
struct ClassRankInput {
  FloatKind kind;  // of query, weights and out (and of their gradients)
  const void* query;
  MapStrides query_strides;
  const void* weights;
  MapStrides weights_strides;
  int64_t batch, pixels, classes;  // B, N, K
  double scale;
};

// Writes out, (B, N, K) contiguous, and lse, (B, N): the log-sum-exp of the scores over the keys,
// float32 (float64 for float64).
MCIBI_DECLARE_CPU_KERNEL(class_rank_attention_cpu,
                         (const ClassRankInput& input, void* out, void* lse))

// The same with each row of W replaced by the one-hot vector of its first argmax.
MCIBI_DECLARE_CPU_KERNEL(class_rank_attention_hard_cpu,
                         (const ClassRankInput& input, void* out, void* lse))

// What the soft form returned, and the gradient of its out.
struct ClassRankResult {
  const void* out;  // (B, N, K) contiguous
  const void* lse;
  const void* grad;
  MapStrides grad_strides;  // like query_strides
};

// Writes the gradients of query and weights, (B, N, K) contiguous.
MCIBI_DECLARE_CPU_KERNEL(class_rank_attention_backward_cpu,
                         (const ClassRankInput& input, const ClassRankResult& result,
                          void* grad_query, void* grad_weights))

}  // namespace mcibi_fast
