// Launch declarations of upsample_cross_entropy, free of torch: raw pointers, sizes, strides in
// elements.
//
// Let U be the bilinear upsampling, l = U logits at one pixel, y its label, lse = log sum_k
// exp(l_k) and s the label smoothing. Then
//
//   loss = (1 - s) w_y (lse - l_y) + s / K sum_k w_k (lse - l_k)
//
// and 0 where the pixel is ignored. U logits, K times the size of the labels, is never stored.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtypes.h"
#include "common/labels.h"
#include "common/logit_map.h"

namespace mcibi_fast {

// ---- CPU ----------------------------------------------------------------------------------------

// For float64 logits, read double for float.

struct CrossEntropyOptions {
  const void* weight;  // (K,) contiguous float, or null
  double label_smoothing;
  bool align_corners;
};

// losses, lse: (B, H, W) contiguous float; undefined where a label is bad.
MCIBI_DECLARE_CPU_KERNEL(upsample_cross_entropy_cpu,
                         (const LogitMap& logits, const LabelMap& labels,
                          const CrossEntropyOptions& options, void* losses, void* lse,
                          BadLabel* bad))

// The sum of the losses over a divisor, which is 1 unless `mean`: then it is the sum of w_y over
// the valid pixels, 1 if there is none, and NaN if it is zero. loss: one float. The order of the
// sum depends only on the sizes. grad_logits, if not null, is the gradient of the loss: a map of
// floats, contiguous or channels_last. Both are undefined where a label is bad.
MCIBI_DECLARE_CPU_KERNEL(upsample_cross_entropy_reduced_cpu,
                         (const LogitMap& logits, const LabelMap& labels,
                          const CrossEntropyOptions& options, bool mean, void* loss,
                          const LogitMap* grad_logits, BadLabel* bad))

// The gradient of that loss times its cotangent, one float: a map like the logits, contiguous or
// channels_last.
MCIBI_DECLARE_CPU_KERNEL(upsample_cross_entropy_reduced_backward_cpu,
                         (const void* grad_loss, const LogitMap& logits, const LabelMap& labels,
                          const CrossEntropyOptions& options, bool mean,
                          const LogitMap& grad_logits, BadLabel* bad))

// The cotangent of the losses, (B, H, W) float with any strides, and the statistic that the forward
// returned beside them, which the CPU does not need. Pixels that are ignored or whose cotangent is
// zero are skipped, whatever their logits.
struct CrossEntropyCotangent {
  const void* grad_losses;
  int64_t stride_b, stride_y, stride_x;
  const void* statistic;
};

// Writes grad_logits, a map like the logits, contiguous or channels_last.
MCIBI_DECLARE_CPU_KERNEL(upsample_cross_entropy_backward_cpu,
                         (const CrossEntropyCotangent& cotangent, const LogitMap& logits,
                          const LabelMap& labels, const CrossEntropyOptions& options,
                          const LogitMap& grad_logits, BadLabel* bad))

// ---- CUDA ---------------------------------------------------------------------------------------

// Launchers take pointers to device memory. They neither wait for the device nor allocate, so that
// a CUDA graph can capture them. They return null, or the message of the CUDA runtime. Maps may be
// as large as memory allows, while H, W, h, w and K fit an int. Each launcher, also the backward's,
// counts the bad labels that it reads.

// losses: (B, H, W) contiguous float, 0 where a pixel is ignored or its label is bad. statistic:
// (2, B, H, W), a bound of the logits of each pixel and sum_k exp(l_k - bound), there 0 and 1;
// their lse, one rounded number, would lose the digits of the softmax where logits are large.
const char* upsample_cross_entropy_cuda(const LogitMap& logits, const LabelMap& labels,
                                        const CrossEntropyOptions& options, void* losses,
                                        void* statistic, LabelFlag flag, CudaStream stream);

// The scratch memory holds sums over tiles of low-resolution pixels, which share their borders:
// B K h w (1 + 1/R)(1 + 1/C) floats for tiles of R x C pixels, with R = 8 and 4 <= C <= 16 at
// output stride 8 (K <= 160). That is 1.2 to 1.4 times a float32 gradient; up to 4 times if the
// output stride is 32 or there are many classes, and R or C is 1.
size_t upsample_cross_entropy_backward_cuda_scratch(const LogitMap& logits, const LabelMap& labels);

// Writes grad_logits, a map like the logits. The order of the sums depends only on the sizes.
const char* upsample_cross_entropy_backward_cuda(const CrossEntropyCotangent& cotangent,
                                                 const LogitMap& logits, const LabelMap& labels,
                                                 const CrossEntropyOptions& options,
                                                 const LogitMap& grad_logits, LabelFlag flag,
                                                 void* scratch, CudaStream stream);

// The reduced loss and its gradient in one pass, for at most 192 classes and not in float64. The
// gradient is kept as sums over tiles, as in the scratch memory above; the workspace is needed no
// longer than the launch. Both sizes are 0 where one pass cannot run.
struct ReducedCudaBytes {
  size_t sums, workspace;
};
ReducedCudaBytes upsample_cross_entropy_reduced_cuda_bytes(const LogitMap& logits,
                                                           const LabelMap& labels);

// loss: one float, as of upsample_cross_entropy_reduced_cpu. The order of all sums depends only on
// the sizes.
const char* upsample_cross_entropy_reduced_cuda(const LogitMap& logits, const LabelMap& labels,
                                                const CrossEntropyOptions& options, bool mean,
                                                void* loss, void* sums, LabelFlag flag,
                                                void* workspace, CudaStream stream);

// Writes grad_logits, a map like the logits: the gradient of the loss times grad_loss, one float.
// It is 0 where the gradient or grad_loss is. Of the labels only the size is used.
const char* upsample_cross_entropy_gather_cuda(const void* grad_loss, const void* sums,
                                               const LabelMap& labels, const LogitMap& grad_logits,
                                               CudaStream stream);

}  // namespace mcibi_fast
