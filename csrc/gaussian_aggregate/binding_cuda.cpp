// gaussian_table, gaussian_aggregate and gaussian_aggregate_backward for CUDA, as plain kernels (no
// autograd) in torch.ops.mcibi_fast_cuda: cheap checks, allocation, registration. Python checks
// what a user can get wrong (mcibi_fast/ops/gaussian_aggregate/). Nothing here waits for the
// device.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/binding.h"
#include "common/cuda_binding.h"
#include "gaussian_aggregate/api.h"

namespace mcibi_fast {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float32 or float64.
FloatKind wide_kind(const Tensor& tensor, const char* name) {
  const FloatKind kind = float_kind(tensor, name);
  STD_TORCH_CHECK(kind == FloatKind::kFloat32 || kind == FloatKind::kFloat64, name,
                  ": expected float32 or float64");
  return kind;
}

void check_device(const Tensor& tensor, const Tensor& first, const char* name) {
  STD_TORCH_CHECK(tensor.device() == first.device(), name, ": on another device");
}

GaussianTableCudaInput table_input(const Tensor& memory, int64_t channels, const Tensor& noise) {
  STD_TORCH_CHECK(memory.dim() == 2 && memory.size(0) > 0 && memory.size(1) == 2,
                  "memory: expected shape (K, 2) with K > 0");
  STD_TORCH_CHECK(channels > 0, "channels: expected 1 or more, got ", channels);
  STD_TORCH_CHECK(memory.size(0) <= (1 << 20) && channels <= (1 << 20),
                  "memory, channels: the CUDA kernels take up to 2^20 classes and channels");
  check_device(noise, memory, "noise");
  GaussianTableCudaInput input = {};
  input.memory = memory.const_data_ptr();
  input.memory_kind = wide_kind(memory, "memory");
  input.memory_class_stride = memory.stride(0);
  input.memory_column_stride = memory.stride(1);
  input.classes = memory.size(0);
  input.channels = channels;
  if (noise.scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(noise.dim() == 1 && noise.size(0) == 2,
                    "noise: expected a Philox state, int64 of shape (2,): (seed, step)");
    input.kind = FloatKind::kFloat32;
    input.state = static_cast<const int64_t*>(noise.const_data_ptr());
    input.state_stride = noise.stride(0);
    return input;
  }
  STD_TORCH_CHECK(noise.dim() == 2 && noise.size(0) == memory.size(0) && noise.size(1) == channels,
                  "noise: expected shape (K, Z) = (", memory.size(0), ", ", channels, ")");
  input.kind = wide_kind(noise, "noise");
  input.eps = noise.const_data_ptr();
  input.eps_class_stride = noise.stride(0);
  input.eps_channel_stride = noise.stride(1);
  return input;
}

GaussianAggregateCudaInput aggregate_input(const Tensor& logits, const Tensor& memory,
                                           int64_t channels, const Tensor& noise) {
  STD_TORCH_CHECK(logits.dim() == 4, "logits: expected (B, K, h, w)");
  STD_TORCH_CHECK(logits.size(1) == memory.size(0), "logits: ", logits.size(1),
                  " classes, but memory has ", memory.size(0));
  check_device(memory, logits, "memory");
  const int64_t pixels = logits.size(0) * logits.size(2) * logits.size(3);
  // Kernels number the pixels of an image, and the tiles of a batch, by int.
  STD_TORCH_CHECK(pixels > 0 && pixels < (1 << 30),
                  "logits: expected 1 to 2^30 pixels in all, got ", pixels);
  GaussianAggregateCudaInput input = {};
  input.table = table_input(memory, channels, noise);
  input.kind = float_kind(logits, "logits");
  input.logits = logits.const_data_ptr();
  input.logits_strides = map_strides(logits);
  input.batch = logits.size(0);
  input.height = logits.size(2);
  input.width = logits.size(3);
  input.channels_last = is_channels_last(logits);
  return input;
}

// The scratch memory of a launch, whose address the input gets.
Tensor scratch_for(GaussianAggregateCudaInput& input, const OnDeviceOf& device) {
  const auto bytes = static_cast<int64_t>(gaussian_aggregate_cuda_scratch(input));
  Tensor scratch = device.empty({bytes}, ScalarType::Byte);
  input.scratch = scratch.mutable_data_ptr();
  return scratch;
}

// (B, channels, h, w) in the dtype and the layout of the logits.
Tensor empty_map(const Tensor& logits, int64_t channels, bool channels_last) {
  return torch::stable::empty(
      {logits.size(0), channels, logits.size(2), logits.size(3)}, logits.scalar_type(),
      std::nullopt, logits.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor gaussian_table(const Tensor& memory, int64_t channels, const Tensor& noise) {
  const GaussianTableCudaInput input = table_input(memory, channels, noise);
  const OnDeviceOf device(memory);
  Tensor table =
      device.empty({input.classes, channels},
                   input.kind == FloatKind::kFloat64 ? ScalarType::Double : ScalarType::Float);
  check_launch("gaussian_table",
               gaussian_table_cuda(input, table.mutable_data_ptr(), device.stream()));
  return table;
}

std::tuple<Tensor, Tensor> gaussian_aggregate(const Tensor& logits, const Tensor& memory,
                                              int64_t channels, const Tensor& noise, bool hard) {
  GaussianAggregateCudaInput input = aggregate_input(logits, memory, channels, noise);
  const OnDeviceOf device(logits);
  const Tensor scratch = scratch_for(input, device);
  Tensor out = empty_map(logits, channels, input.channels_last);
  Tensor lse =
      device.empty({input.batch, input.height * input.width}, wide_type(logits.scalar_type()));
  check_launch("gaussian_aggregate",
               gaussian_aggregate_cuda(input, hard, out.mutable_data_ptr(), lse.mutable_data_ptr(),
                                       device.stream()));
  return {out, lse};
}

Tensor gaussian_aggregate_backward(const Tensor& grad, const Tensor& logits, const Tensor& lse,
                                   const Tensor& memory, const Tensor& noise) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.scalar_type() == logits.scalar_type(),
                  "grad: expected a tensor (B, Z, h, w) of the dtype of logits");
  GaussianAggregateCudaInput input = aggregate_input(logits, memory, grad.size(1), noise);
  check_device(grad, logits, "grad");
  STD_TORCH_CHECK(
      grad.size(0) == input.batch && grad.size(2) == input.height && grad.size(3) == input.width,
      "grad: expected the batch and the size of logits");
  check_device(lse, logits, "lse");
  STD_TORCH_CHECK(lse.scalar_type() == wide_type(logits.scalar_type()) && lse.is_contiguous() &&
                      lse.dim() == 2 && lse.size(0) == input.batch &&
                      lse.size(1) == input.height * input.width,
                  "lse: expected the statistic that gaussian_aggregate returned");
  const OnDeviceOf device(logits);
  const Tensor scratch = scratch_for(input, device);
  Tensor grad_logits = empty_map(logits, input.table.classes, input.channels_last);
  check_launch("gaussian_aggregate_backward",
               gaussian_aggregate_backward_cuda(input, lse.const_data_ptr(), grad.const_data_ptr(),
                                                map_strides(grad), grad_logits.mutable_data_ptr(),
                                                device.stream()));
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mcibi_fast_cuda, m) {
  m.def(cuda_schemas::gaussian_table);
  m.def(cuda_schemas::gaussian_aggregate);
  m.def(cuda_schemas::gaussian_aggregate_backward);
}

STABLE_TORCH_LIBRARY_IMPL(mcibi_fast_cuda, MCIBI_CUDA_KEY, m) {
  m.impl("gaussian_table", TORCH_BOX(&gaussian_table));
  m.impl("gaussian_aggregate", TORCH_BOX(&gaussian_aggregate));
  m.impl("gaussian_aggregate_backward", TORCH_BOX(&gaussian_aggregate_backward));
}

}  // namespace mcibi_fast
