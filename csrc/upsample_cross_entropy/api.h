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

#include <cstddef>
#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtypes.h"
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
// Launchers: pointers to device memory; nothing waits for the device, so that a CUDA graph can
// capture them, and nothing is allocated. They return null, or what the CUDA runtime said. B H W
// and the sizes of the maps may be as large as memory allows; H, W, h, w and K fit an int. Each
// launcher counts the bad labels it meets, the backward too.

// losses, lse: (B, H, W) contiguous float; both 0 where a pixel is ignored or its label is bad.
const char* upsample_cross_entropy_cuda(const LogitMap& logits, const LabelMap& labels,
                                        const CrossEntropyOptions& options, void* losses, void* lse,
                                        LabelFlag flag, CudaStream stream);

// The scratch memory holds sums over tiles of low-resolution pixels, whose borders neighbours
// share: B K h w (1 + 1/R)(1 + 1/C) floats for tiles of R x C pixels, 4 <= R <= 16 and C = 8 at
// output stride 8 (K <= 160). That is 1.2 to 1.4 times a float32 gradient; where the output stride
// is 32, or the classes are many, and C or R is 1, up to 4 times.
size_t upsample_cross_entropy_backward_cuda_scratch(const LogitMap& logits, const LabelMap& labels);

// grad_logits: a map like the logits, whose data are written. Sums have a fixed order, which
// depends on the sizes alone.
const char* upsample_cross_entropy_backward_cuda(const CrossEntropyCotangent& cotangent,
                                                 const LogitMap& logits, const LabelMap& labels,
                                                 const CrossEntropyOptions& options,
                                                 const LogitMap& grad_logits, LabelFlag flag,
                                                 void* scratch, CudaStream stream);

}  // namespace mcibi_fast
