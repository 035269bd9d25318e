// The launchers of the aggregation for ctypes (tests/csrc/test_gaussian_aggregate_cuda_host.py),
// with scratch memory full of NaN.
#include "gaussian_aggregate/api.h"
#include "testing/controls.h"
#include "testing/poisoned.h"

using namespace mcibi_fast;

MCIBI_EXPORT const char* host_gaussian_table(const GaussianTableCudaInput* input, void* table) {
  return gaussian_table_cuda(*input, table, nullptr);
}

MCIBI_EXPORT const char* host_gaussian_aggregate(GaussianAggregateCudaInput* input, bool hard,
                                                 void* out, void* lse) {
  const auto scratch = poisoned(gaussian_aggregate_cuda_scratch(*input));
  input->scratch = scratch.get();
  return gaussian_aggregate_cuda(*input, hard, out, lse, nullptr);
}

MCIBI_EXPORT const char* host_gaussian_aggregate_backward(GaussianAggregateCudaInput* input,
                                                          const void* lse, const void* grad,
                                                          const MapStrides* grad_strides,
                                                          void* grad_logits) {
  const auto scratch = poisoned(gaussian_aggregate_cuda_scratch(*input));
  input->scratch = scratch.get();
  return gaussian_aggregate_backward_cuda(*input, lse, grad, *grad_strides, grad_logits, nullptr);
}
