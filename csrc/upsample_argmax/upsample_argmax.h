// Launch declarations of upsample_argmax and upsample_confusion, free of torch: raw pointers,
// sizes, strides in elements.
//
// The class of the largest of the bilinearly upsampled logits U l at every pixel, the first on
// ties; NaN is larger than any number, as in torch.argmax. U l, K times the size of the result, is
// never formed.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/labels.h"
#include "common/logit_map.h"

namespace mcibi_fast {

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
