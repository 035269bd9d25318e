// CUDA operators of upsample_cross_entropy: cheap checks, allocation, registration. Python checks
// what a user can get wrong (mcibi_fast/ops/upsample_cross_entropy/). Nothing here waits for the
// device.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/cuda_binding.h"
#include "common/upsample_cuda_binding.h"
#include "upsample_cross_entropy/api.h"

namespace mcibi_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

CrossEntropyOptions options_of(const Tensor& logits, const std::optional<Tensor>& weight,
                               double label_smoothing, bool align_corners) {
  if (weight.has_value()) {
    STD_TORCH_CHECK(weight->scalar_type() == wide_type(logits.scalar_type()) &&
                        weight->dim() == 1 && weight->size(0) == logits.size(1) &&
                        weight->is_contiguous() &&
                        weight->get_device_index() == logits.get_device_index(),
                    "weight: expected (K,) contiguous float32 (float64 for float64 logits) on the "
                    "logits' device");
  }
  return {weight.has_value() ? weight->const_data_ptr() : nullptr, label_smoothing, align_corners};
}

std::tuple<Tensor, Tensor> upsample_cross_entropy(const Tensor& logits, const Tensor& labels,
                                                  const std::optional<Tensor>& weight,
                                                  int64_t ignore_index, double label_smoothing,
                                                  bool align_corners, const Tensor& flag) {
  const LogitMap map = logit_map(logits, "logits");
  const LabelMap label = cuda_label_map_of(labels, logits, map, ignore_index);
  const CrossEntropyOptions options = options_of(logits, weight, label_smoothing, align_corners);
  const OnDeviceOf device(logits);
  const ScalarType wide = wide_type(logits.scalar_type());
  Tensor losses = device.empty({map.batch, label.height, label.width}, wide);
  Tensor statistic = device.empty({2, map.batch, label.height, label.width}, wide);
  check_launch("upsample_cross_entropy",
               upsample_cross_entropy_cuda(
                   map, label, options, losses.data_ptr(), statistic.data_ptr(),
                   label_flag(flag, labels, label_ops::upsample_cross_entropy), device.stream()));
  return {losses, statistic};
}

Tensor upsample_cross_entropy_backward(const Tensor& grad_losses, const Tensor& logits,
                                       const Tensor& labels, const Tensor& statistic,
                                       const std::optional<Tensor>& weight, int64_t ignore_index,
                                       double label_smoothing, bool align_corners) {
  const LogitMap map = logit_map(logits, "logits");
  const LabelMap label = cuda_label_map_of(labels, logits, map, ignore_index);
  const CrossEntropyOptions options = options_of(logits, weight, label_smoothing, align_corners);
  const auto check = [&](const Tensor& t, std::initializer_list<int64_t> size,
                         const char* message) {
    bool right = t.scalar_type() == wide_type(logits.scalar_type()) &&
                 t.dim() == static_cast<int64_t>(size.size()) &&
                 t.get_device_index() == logits.get_device_index();
    int64_t axis = 0;
    for (const int64_t n : size) right = right && t.size(axis++) == n;
    STD_TORCH_CHECK(right, message);
  };
  check(grad_losses, {map.batch, label.height, label.width},
        "grad_losses: expected (B, H, W) like the losses");
  check(statistic, {2, map.batch, label.height, label.width},
        "statistic: expected what upsample_cross_entropy returned");
  STD_TORCH_CHECK(statistic.is_contiguous(), "statistic: expected it contiguous, as returned");
  const CrossEntropyCotangent cotangent = {grad_losses.const_data_ptr(), grad_losses.stride(0),
                                           grad_losses.stride(1), grad_losses.stride(2),
                                           statistic.const_data_ptr()};
  const OnDeviceOf device(logits);
  const Tensor grad = empty_map_like(logits);
  const Tensor scratch =
      device.empty({static_cast<int64_t>(upsample_cross_entropy_backward_cuda_scratch(map, label))},
                   ScalarType::Byte);
  check_launch("upsample_cross_entropy_backward",
               upsample_cross_entropy_backward_cuda(
                   cotangent, map, label, options, logit_map(grad, "grad_logits"),
                   LabelFlag{},  // the forward has counted the bad labels
                   scratch.data_ptr(), device.stream()));
  return grad;
}

// The loss, and sums of which upsample_cross_entropy_gather makes the gradient.
std::tuple<Tensor, Tensor> upsample_cross_entropy_reduced(
    const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& weight,
    int64_t ignore_index, double label_smoothing, bool align_corners, bool mean, bool with_grad,
    const Tensor& flag) {
  const LogitMap map = logit_map(logits, "logits");
  const LabelMap label = cuda_label_map_of(labels, logits, map, ignore_index);
  const CrossEntropyOptions options = options_of(logits, weight, label_smoothing, align_corners);
  const ReducedCudaBytes bytes = upsample_cross_entropy_reduced_cuda_bytes(map, label);
  STD_TORCH_CHECK(with_grad && bytes.sums > 0, "logits: one pass is for a gradient, ",
                  "maps smaller than the labels, at most 192 classes and no float64");
  const OnDeviceOf device(logits);
  Tensor loss = device.empty({}, ScalarType::Float);
  const auto values = static_cast<int64_t>(bytes.sums / sizeof(float));
  Tensor sums = device.empty({values}, ScalarType::Float);
  const Tensor workspace = device.empty({static_cast<int64_t>(bytes.workspace)}, ScalarType::Byte);
  check_launch("upsample_cross_entropy",
               upsample_cross_entropy_reduced_cuda(
                   map, label, options, mean, loss.data_ptr(), sums.data_ptr(),
                   label_flag(flag, labels, label_ops::upsample_cross_entropy),
                   workspace.data_ptr(), device.stream()));
  return {loss, sums};
}

Tensor upsample_cross_entropy_gather(const Tensor& grad_loss, const Tensor& sums,
                                     const Tensor& logits, int64_t height, int64_t width) {
  const LogitMap map = logit_map(logits, "logits");
  LabelMap size = {};
  size.height = height, size.width = width;
  check_cuda_sizes(map, height, width);
  const size_t bytes = upsample_cross_entropy_reduced_cuda_bytes(map, size).sums;
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float && sums.is_contiguous() && bytes > 0 &&
                      static_cast<size_t>(sums.numel()) * sizeof(float) == bytes &&
                      sums.get_device_index() == logits.get_device_index(),
                  "sums: expected what upsample_cross_entropy_reduced returned");
  STD_TORCH_CHECK(grad_loss.scalar_type() == ScalarType::Float && grad_loss.numel() == 1 &&
                      grad_loss.get_device_index() == logits.get_device_index(),
                  "grad_loss: expected one float32 on the logits' device");
  const OnDeviceOf device(logits);
  const Tensor grad = empty_map_like(logits);
  check_launch(
      "upsample_cross_entropy_backward",
      upsample_cross_entropy_gather_cuda(grad_loss.const_data_ptr(), sums.const_data_ptr(), size,
                                         logit_map(grad, "grad_logits"), device.stream()));
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mcibi_fast_cuda, m) {
  m.def(cuda_schemas::upsample_cross_entropy);
  m.def(cuda_schemas::upsample_cross_entropy_backward);
  m.def(cuda_schemas::upsample_cross_entropy_reduced);
  m.def(cuda_schemas::upsample_cross_entropy_gather);
}

STABLE_TORCH_LIBRARY_IMPL(mcibi_fast_cuda, MCIBI_CUDA_KEY, m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&upsample_cross_entropy));
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&upsample_cross_entropy_backward));
  m.impl("upsample_cross_entropy_reduced", TORCH_BOX(&upsample_cross_entropy_reduced));
  m.impl("upsample_cross_entropy_gather", TORCH_BOX(&upsample_cross_entropy_gather));
}

}  // namespace mcibi_fast
