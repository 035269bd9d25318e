// The launchers of the memory update for ctypes (tests/csrc/test_memory_update_cuda_host.py), with
// scratch memory full of NaN.
#include "memory_update/api.h"
#include "testing/controls.h"
#include "testing/poisoned.h"

using namespace mcibi_fast;

MCIBI_EXPORT const char* host_class_feature_sums(const FeatureMap* features, const LabelMap* labels,
                                                 bool align_corners, void* sums, int64_t* counts,
                                                 const LabelFlag* flag) {
  const auto scratch = poisoned(class_feature_sums_cuda_scratch(*features, *labels));
  return class_feature_sums_cuda(*features, *labels, align_corners, sums, counts, *flag,
                                 scratch.get(), nullptr);
}

MCIBI_EXPORT const char* host_memory_update(const FeatureMap* features, const LabelMap* labels,
                                            bool align_corners, const MemoryUpdate* update,
                                            const LabelFlag* flag) {
  const auto scratch = poisoned(memory_update_cuda_scratch(*features, *labels));
  return memory_update_cuda(*features, *labels, align_corners, *update, *flag, scratch.get(),
                            nullptr);
}

MCIBI_EXPORT size_t host_memory_update_scratch(const FeatureMap* features, const LabelMap* labels) {
  return memory_update_cuda_scratch(*features, *labels);
}

MCIBI_EXPORT const char* host_class_feature_sums_backward(const void* grad_sums,
                                                          const LabelMap* labels,
                                                          bool align_corners,
                                                          const FeatureMap* grad_features,
                                                          const LabelFlag* flag) {
  const auto scratch = poisoned(class_feature_sums_backward_cuda_scratch(*grad_features, *labels));
  return class_feature_sums_backward_cuda(grad_sums, *labels, align_corners, *grad_features, *flag,
                                          scratch.get(), nullptr);
}
