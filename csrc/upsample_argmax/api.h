// Launch declarations of upsample_argmax and upsample_confusion, free of torch: raw pointers,
// sizes, strides in elements.
//
// Let U be the bilinear upsampling. The class of a pixel is the first one with the largest value in
// U logits, where NaN is larger than any number. U logits, K times the size of the result, is never
// stored.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtypes.h"
#include "common/labels.h"
#include "common/logit_map.h"

namespace mcibi_fast {

// ---- CPU ----------------------------------------------------------------------------------------

// out: (B, H, W) contiguous.
MCIBI_DECLARE_CPU_KERNEL(upsample_argmax_cpu, (const LogitMap& logits, int64_t out_height,
                                               int64_t out_width, bool align_corners, int64_t* out))

// Overwrites counts, (K, K) contiguous: rows are labels, columns predictions.
MCIBI_DECLARE_CPU_KERNEL(upsample_confusion_cpu,
                         (const LogitMap& logits, const LabelMap& labels, bool align_corners,
                          int64_t* counts, BadLabel* bad))

// ---- CUDA ---------------------------------------------------------------------------------------

// Launchers take pointers to device memory. They neither wait for the device nor allocate, so that
// a CUDA graph can capture them. They return null, or the message of the CUDA runtime.

// prediction: (B, height, width) contiguous.
const char* upsample_argmax_cuda(const LogitMap& logits, int64_t height, int64_t width,
                                 bool align_corners, int64_t* prediction, CudaStream stream);

// Overwrites confusion, (K, K) contiguous: rows are labels, columns predictions. Pixels with an
// ignored or a bad label do not count.
const char* upsample_confusion_cuda(const LogitMap& logits, const LabelMap& labels,
                                    bool align_corners, int64_t* confusion, LabelFlag flag,
                                    CudaStream stream);

}  // namespace mcibi_fast
