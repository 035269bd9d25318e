// The launchers of upsample_argmax and upsample_confusion for ctypes
// (tests/csrc/test_upsample_argmax_cuda_host.py).
#include "testing/controls.h"
#include "upsample_argmax/api.h"

using namespace mcibi_fast;

MCIBI_EXPORT const char* host_upsample_argmax(const LogitMap* logits, int64_t height, int64_t width,
                                              bool align_corners, int64_t* prediction) {
  return upsample_argmax_cuda(*logits, height, width, align_corners, prediction, nullptr);
}

MCIBI_EXPORT const char* host_upsample_confusion(const LogitMap* logits, const LabelMap* labels,
                                                 bool align_corners, int64_t* confusion,
                                                 const LabelFlag* flag) {
  return upsample_confusion_cuda(*logits, *labels, align_corners, confusion, *flag, nullptr);
}
