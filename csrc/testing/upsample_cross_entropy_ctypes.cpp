// The launchers of the cross entropy for ctypes
// (tests/csrc/test_upsample_cross_entropy_cuda_host.py), with scratch memory full of NaN.
#include "testing/controls.h"
#include "testing/poisoned.h"
#include "upsample_cross_entropy/api.h"

using namespace mcibi_fast;

MCIBI_EXPORT const char* host_upsample_cross_entropy(const LogitMap* logits, const LabelMap* labels,
                                                     const CrossEntropyOptions* options,
                                                     void* losses, void* statistic,
                                                     const LabelFlag* flag) {
  return upsample_cross_entropy_cuda(*logits, *labels, *options, losses, statistic, *flag, nullptr);
}

MCIBI_EXPORT int64_t host_upsample_cross_entropy_backward_scratch(const LogitMap* logits,
                                                                  const LabelMap* labels) {
  return static_cast<int64_t>(upsample_cross_entropy_backward_cuda_scratch(*logits, *labels));
}

MCIBI_EXPORT const char* host_upsample_cross_entropy_backward(
    const CrossEntropyCotangent* cotangent, const LogitMap* logits, const LabelMap* labels,
    const CrossEntropyOptions* options, const LogitMap* grad_logits, const LabelFlag* flag) {
  const auto scratch = poisoned(upsample_cross_entropy_backward_cuda_scratch(*logits, *labels));
  return upsample_cross_entropy_backward_cuda(*cotangent, *logits, *labels, *options, *grad_logits,
                                              *flag, scratch.get(), nullptr);
}
