// Launch declarations of upsample_argmax and upsample_confusion, free of torch: raw pointers,
// sizes, strides in elements.
//
// With U the bilinear upsampling, the class of a pixel is the first with the largest value of U
// logits there (NaN is larger than any number). U logits, K times the size of the result, is never
// formed.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtypes.h"
#include "common/labels.h"
#include "common/logit_map.h"

namespace mcibi_fast {

// --- CPU ----------------------------------------------------------------------------------------

// out: (B, H, W) contiguous.
MCIBI_DECLARE_CPU_KERNEL(upsample_argmax_cpu, (const LogitMap& logits, int64_t out_height,
                                               int64_t out_width, bool align_corners, int64_t* out))

// counts: (K, K) contiguous, rows the label, columns the prediction; overwritten.
MCIBI_DECLARE_CPU_KERNEL(upsample_confusion_cpu,
                         (const LogitMap& logits, const LabelMap& labels, bool align_corners,
                          int64_t* counts, BadLabel* bad))

// --- CUDA ---------------------------------------------------------------------------------------
// Launchers: pointers to device memory; nothing waits for the device, so that a CUDA graph can
// capture them, and nothing is allocated. They return null, or what the CUDA runtime said.

// prediction: (B, height, width) contiguous.
const char* upsample_argmax_cuda(const LogitMap& logits, int64_t height, int64_t width,
                                 bool align_corners, int64_t* prediction, CudaStream stream);

// confusion: (K, K) contiguous, overwritten; row: the label, column: the prediction. Ignored pixels
// and those with a bad label do not count.
const char* upsample_confusion_cuda(const LogitMap& logits, const LabelMap& labels,
                                    bool align_corners, int64_t* confusion, LabelFlag flag,
                                    CudaStream stream);

}  // namespace mcibi_fast
