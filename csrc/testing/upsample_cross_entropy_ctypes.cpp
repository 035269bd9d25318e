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

MCIBI_EXPORT int64_t host_upsample_cross_entropy_reduced_sums(const LogitMap* logits,
                                                              const LabelMap* labels) {
  return static_cast<int64_t>(upsample_cross_entropy_reduced_cuda_bytes(*logits, *labels).sums);
}

// sums: as many bytes as host_upsample_cross_entropy_reduced_sums says.
MCIBI_EXPORT const char* host_upsample_cross_entropy_reduced(const LogitMap* logits,
                                                             const LabelMap* labels,
                                                             const CrossEntropyOptions* options,
                                                             int mean, void* loss, void* sums,
                                                             const LabelFlag* flag) {
  const auto workspace =
      poisoned(upsample_cross_entropy_reduced_cuda_bytes(*logits, *labels).workspace);
  return upsample_cross_entropy_reduced_cuda(*logits, *labels, *options, mean != 0, loss, sums,
                                             *flag, workspace.get(), nullptr);
}

MCIBI_EXPORT const char* host_upsample_cross_entropy_gather(const void* grad_loss, const void* sums,
                                                            const LabelMap* labels,
                                                            const LogitMap* grad_logits) {
  return upsample_cross_entropy_gather_cuda(grad_loss, sums, *labels, *grad_logits, nullptr);
}
