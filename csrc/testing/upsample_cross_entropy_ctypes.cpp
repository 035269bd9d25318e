// The cross entropy's launchers for ctypes (tests/csrc/test_upsample_cross_entropy_cuda_host.py),
// with scratch memory full of NaN.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "upsample_cross_entropy/api.h"

using namespace mcibi_fast;

extern "C" {

__attribute__((visibility("default"))) const char* host_upsample_cross_entropy(
    const LogitMap* logits, const LabelMap* labels, const CrossEntropyOptions* options,
    void* losses, void* lse, const LabelFlag* flag) {
  return upsample_cross_entropy_cuda(*logits, *labels, *options, losses, lse, *flag, nullptr);
}

__attribute__((visibility("default"))) int64_t
host_upsample_cross_entropy_backward_scratch(const LogitMap* logits, const LabelMap* labels) {
  return static_cast<int64_t>(upsample_cross_entropy_backward_cuda_scratch(*logits, *labels));
}

__attribute__((visibility("default"))) const char* host_upsample_cross_entropy_backward(
    const CrossEntropyCotangent* cotangent, const LogitMap* logits, const LabelMap* labels,
    const CrossEntropyOptions* options, const LogitMap* grad_logits, const LabelFlag* flag) {
  const size_t bytes = upsample_cross_entropy_backward_cuda_scratch(*logits, *labels);
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes) != 0) std::abort();
  const std::unique_ptr<void, void (*)(void*)> scratch(memory, std::free);
  std::memset(memory, 0xff, bytes);
  return upsample_cross_entropy_backward_cuda(*cotangent, *logits, *labels, *options, *grad_logits,
                                              *flag, memory, nullptr);
}
}
