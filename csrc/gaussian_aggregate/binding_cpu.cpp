// gaussian_table, gaussian_aggregate and gaussian_aggregate_backward for the CPU, as plain kernels
// (no autograd) in torch.ops.mcibi_fast_cpu.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/cpu_binding.h"
#include "gaussian_aggregate/api.h"

namespace mcibi_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
std::vector<double> copy_memory(const Tensor& memory) {
  const T* data = static_cast<const T*>(memory.const_data_ptr());
  std::vector<double> copy;
  for (int64_t k = 0; k < memory.size(0); ++k) {
    for (int64_t i = 0; i < 2; ++i) {
      copy.push_back(static_cast<double>(data[k * memory.stride(0) + i * memory.stride(1)]));
    }
  }
  return copy;
}

// Holds the memory's values for as long as the kernel's input points to them.
struct Table {
  std::vector<double> memory;
  GaussianTableInput input;
};

Table table_of(const Tensor& memory, int64_t channels, const Tensor& noise) {
  STD_TORCH_CHECK(memory.is_cpu() && noise.is_cpu(), "memory and noise: expected CPU tensors");
  STD_TORCH_CHECK(memory.dim() == 2 && memory.size(0) > 0 && memory.size(1) == 2,
                  "memory: expected shape (K, 2) with K > 0");
  STD_TORCH_CHECK(channels > 0, "channels: expected 1 or more, got ", channels);
  const ScalarType memory_dtype = memory.scalar_type();
  STD_TORCH_CHECK(memory_dtype == ScalarType::Float || memory_dtype == ScalarType::Double,
                  "memory: expected float32 or float64");
  Table table;
  table.memory =
      memory_dtype == ScalarType::Double ? copy_memory<double>(memory) : copy_memory<float>(memory);
  table.input = {};
  table.input.memory = table.memory.data();
  table.input.classes = memory.size(0);
  table.input.channels = channels;
  table.input.kind = FloatKind::kFloat32;
  if (noise.scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(noise.dim() == 1 && noise.size(0) == 2,
                    "noise: expected a Philox state, int64 of shape (2,): (seed, step)");
    const int64_t* state = static_cast<const int64_t*>(noise.const_data_ptr());
    table.input.seed = state[0];
    table.input.step = state[noise.stride(0)];
    return table;
  }
  table.input.kind = float_kind(noise, "noise");
  STD_TORCH_CHECK(
      table.input.kind == FloatKind::kFloat32 || table.input.kind == FloatKind::kFloat64,
      "noise: expected float32 or float64");
  STD_TORCH_CHECK(noise.dim() == 2 && noise.size(0) == memory.size(0) && noise.size(1) == channels,
                  "noise: expected shape (K, Z) = (", memory.size(0), ", ", channels, ")");
  table.input.eps = noise.const_data_ptr();
  table.input.eps_class_stride = noise.stride(0);
  table.input.eps_channel_stride = noise.stride(1);
  return table;
}

GaussianAggregateInput input_of(const Tensor& logits, const Table& table) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 4,
                  "logits: expected a CPU tensor (B, K, h, w)");
  STD_TORCH_CHECK(logits.size(1) == table.input.classes, "logits: ", logits.size(1),
                  " classes, but memory has ", table.input.classes);
  GaussianAggregateInput input = {};
  input.table = table.input;
  input.kind = float_kind(logits, "logits");
  input.logits = logits.const_data_ptr();
  input.logits_strides = map_strides(logits);
  input.batch = logits.size(0);
  input.height = logits.size(2);
  input.width = logits.size(3);
  input.channels_last = is_channels_last(logits);
  return input;
}

Tensor gaussian_table(const Tensor& memory, int64_t channels, const Tensor& noise) {
  const Table table = table_of(memory, channels, noise);
  const ScalarType dtype =
      table.input.kind == FloatKind::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor result = empty_cpu({table.input.classes, channels}, dtype, false);
  MCIBI_CPU_KERNEL(gaussian_table_cpu)(table.input, result.mutable_data_ptr());
  return result;
}

std::tuple<Tensor, Tensor> gaussian_aggregate(const Tensor& logits, const Tensor& memory,
                                              int64_t channels, const Tensor& noise, bool hard) {
  const Table table = table_of(memory, channels, noise);
  const GaussianAggregateInput input = input_of(logits, table);
  Tensor out = empty_cpu({input.batch, channels, input.height, input.width}, logits.scalar_type(),
                         input.channels_last);
  Tensor lse =
      empty_cpu({input.batch, input.height * input.width}, wide_type(logits.scalar_type()), false);
  MCIBI_CPU_KERNEL(gaussian_aggregate_cpu)
  (input, hard, out.mutable_data_ptr(), lse.mutable_data_ptr());
  return {out, lse};
}

Tensor gaussian_aggregate_backward(const Tensor& grad, const Tensor& logits, const Tensor& lse,
                                   const Tensor& memory, const Tensor& noise) {
  STD_TORCH_CHECK(grad.is_cpu() && grad.dim() == 4 && grad.scalar_type() == logits.scalar_type(),
                  "grad: expected a CPU tensor (B, Z, h, w) of the dtype of logits");
  const Table table = table_of(memory, grad.size(1), noise);
  const GaussianAggregateInput input = input_of(logits, table);
  STD_TORCH_CHECK(
      grad.size(0) == input.batch && grad.size(2) == input.height && grad.size(3) == input.width,
      "grad: expected the batch and the size of logits");
  STD_TORCH_CHECK(lse.is_cpu() && lse.scalar_type() == wide_type(logits.scalar_type()) &&
                      lse.is_contiguous() && lse.dim() == 2 && lse.size(0) == input.batch &&
                      lse.size(1) == input.height * input.width,
                  "lse: expected the statistic that gaussian_aggregate returned");
  Tensor grad_logits = empty_cpu({input.batch, input.table.classes, input.height, input.width},
                                 logits.scalar_type(), input.channels_last);
  MCIBI_CPU_KERNEL(gaussian_aggregate_backward_cpu)
  (input, lse.const_data_ptr(), grad.const_data_ptr(), map_strides(grad),
   grad_logits.mutable_data_ptr());
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mcibi_fast_cpu, m) {
  m.def(cpu_schemas::gaussian_table);
  m.def(cpu_schemas::gaussian_aggregate);
  m.def(cpu_schemas::gaussian_aggregate_backward);
}

STABLE_TORCH_LIBRARY_IMPL(mcibi_fast_cpu, CPU, m) {
  m.impl("gaussian_table", TORCH_BOX(&gaussian_table));
  m.impl("gaussian_aggregate", TORCH_BOX(&gaussian_aggregate));
  m.impl("gaussian_aggregate_backward", TORCH_BOX(&gaussian_aggregate_backward));
}

}  // namespace mcibi_fast
