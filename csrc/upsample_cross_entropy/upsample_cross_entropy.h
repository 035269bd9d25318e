// Launch declarations of upsample_cross_entropy, free of torch: raw pointers, sizes, strides in
// elements.
//
// With U the bilinear upsampling, l = U logits at one pixel, y its label, lse = log sum_k exp(l_k)
// and s the label smoothing,
//
//   loss = (1 - s) w_y (lse - l_y) + s / K sum_k w_k (lse - l_k)
//
// and 0 where the pixel is ignored. U logits, K times the size of the labels, is never formed.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/labels.h"
#include "common/logit_map.h"

namespace mcibi_fast {

// --- CPU ----------------------------------------------------------------------------------------
// float stands for double where the logits are float64.

struct CrossEntropyOptions {
  const void* weight;  // (K,) contiguous float, or null
  double label_smoothing;
  bool align_corners;
};

// losses, lse: (B, H, W) contiguous float. Where a label is bad they hold nothing of use.
MCIBI_DECLARE_CPU_KERNEL(upsample_cross_entropy_cpu,
                         (const LogitMap& logits, const LabelMap& labels,
                          const CrossEntropyOptions& options, void* losses, void* lse,
                          BadLabel* bad))

// The cotangent of the losses, (B, H, W) float of any strides, and the forward's lse. Pixels whose
// cotangent is zero are passed over.
struct CrossEntropyCotangent {
  const void* grad_losses;
  int64_t stride_b, stride_y, stride_x;
  const void* lse;
};

// grad_logits: a map like the logits, whose data are written; contiguous or channels_last.
MCIBI_DECLARE_CPU_KERNEL(upsample_cross_entropy_backward_cpu,
                         (const CrossEntropyCotangent& cotangent, const LogitMap& logits,
                          const LabelMap& labels, const CrossEntropyOptions& options,
                          const LogitMap& grad_logits, BadLabel* bad))

// --- CUDA ---------------------------------------------------------------------------------------

}  // namespace mcibi_fast
