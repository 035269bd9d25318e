// The launchers of the aggregation for ctypes (tests/csrc/test_gaussian_aggregate_cuda_host.py).
#include "gaussian_aggregate/api.h"
#include "testing/controls.h"

using namespace mcibi_fast;

MCIBI_EXPORT const char* host_gaussian_table(const GaussianTableCudaInput* input, void* table) {
  return gaussian_table_cuda(*input, table, nullptr);
}

MCIBI_EXPORT const char* host_gaussian_aggregate(const GaussianAggregateCudaInput* input, bool hard,
                                                 void* out, void* lse) {
  return gaussian_aggregate_cuda(*input, hard, out, lse, nullptr);
}

MCIBI_EXPORT const char* host_gaussian_aggregate_backward(const GaussianAggregateCudaInput* input,
                                                          const void* lse, const void* grad,
                                                          const MapStrides* grad_strides,
                                                          void* grad_logits) {
  return gaussian_aggregate_backward_cuda(*input, lse, grad, *grad_strides, grad_logits, nullptr);
}
