// class_rank_attention and its backward for the CPU, as plain kernels (no autograd) in
// torch.ops.mcibi_fast_cpu.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "class_rank_attention/api.h"
#include "common/cpu_binding.h"

namespace mcibi_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (B, N, K) as the map (B, K, 1, N).
MapStrides row_strides(const Tensor& rows) {
  return {rows.stride(0), rows.stride(2), rows.size(1), rows.stride(1)};
}

void check_like_query(const Tensor& tensor, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == query.scalar_type() &&
                      tensor.dim() == 3 && tensor.size(0) == query.size(0) &&
                      tensor.size(1) == query.size(1) && tensor.size(2) == query.size(2),
                  name, ": expected a CPU tensor (B, N, K) like query");
}

ClassRankInput input_of(const Tensor& query, const Tensor& weights, double scale) {
  STD_TORCH_CHECK(query.is_cpu() && query.dim() == 3 && query.numel() > 0,
                  "query: expected a CPU tensor (B, N, K) that is not empty");
  check_like_query(weights, query, "weights");
  ClassRankInput input = {};
  input.kind = float_kind(query, "query");
  input.query = query.const_data_ptr();
  input.query_strides = row_strides(query);
  input.weights = weights.const_data_ptr();
  input.weights_strides = row_strides(weights);
  input.batch = query.size(0);
  input.pixels = query.size(1);
  input.classes = query.size(2);
  input.scale = scale;
  return input;
}

std::tuple<Tensor, Tensor> class_rank_attention(const Tensor& query, const Tensor& weights,
                                                double scale, bool hard) {
  const ClassRankInput input = input_of(query, weights, scale);
  Tensor out = empty_cpu({input.batch, input.pixels, input.classes}, query.scalar_type());
  Tensor lse = empty_cpu({input.batch, input.pixels}, wide_type(query.scalar_type()));
  auto* kernel = hard ? MCIBI_CPU_KERNEL(class_rank_attention_hard_cpu)
                      : MCIBI_CPU_KERNEL(class_rank_attention_cpu);
  kernel(input, out.mutable_data_ptr(), lse.mutable_data_ptr());
  return {out, lse};
}

std::tuple<Tensor, Tensor> class_rank_attention_backward(const Tensor& grad, const Tensor& query,
                                                         const Tensor& weights, const Tensor& out,
                                                         const Tensor& lse, double scale) {
  const ClassRankInput input = input_of(query, weights, scale);
  check_like_query(grad, query, "grad");
  check_like_query(out, query, "out");
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  STD_TORCH_CHECK(lse.is_cpu() && lse.scalar_type() == wide_type(query.scalar_type()) &&
                      lse.is_contiguous() && lse.dim() == 2 && lse.size(0) == input.batch &&
                      lse.size(1) == input.pixels,
                  "lse: expected the statistic that class_rank_attention returned");
  const ClassRankResult result = {out.const_data_ptr(), lse.const_data_ptr(), grad.const_data_ptr(),
                                  row_strides(grad)};
  const std::vector<int64_t> size = {input.batch, input.pixels, input.classes};
  Tensor grad_query = empty_cpu(size, query.scalar_type());
  Tensor grad_weights = empty_cpu(size, query.scalar_type());
  MCIBI_CPU_KERNEL(class_rank_attention_backward_cpu)
  (input, result, grad_query.mutable_data_ptr(), grad_weights.mutable_data_ptr());
  return {grad_query, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mcibi_fast_cpu, m) {
  m.def(cpu_schemas::class_rank_attention);
  m.def(cpu_schemas::class_rank_attention_backward);
}

STABLE_TORCH_LIBRARY_IMPL(mcibi_fast_cpu, CPU, m) {
  m.impl("class_rank_attention", TORCH_BOX(&class_rank_attention));
  m.impl("class_rank_attention_backward", TORCH_BOX(&class_rank_attention_backward));
}

}  // namespace mcibi_fast
