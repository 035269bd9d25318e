// upsample_cross_entropy and its backward for the CPU, as plain kernels (no autograd) in
// torch.ops.mcibi_fast_cpu. Python checks what a user can get wrong.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/cpu_binding.h"
#include "common/upsample_binding.h"
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
                        weight->is_contiguous(),
                    "weight: expected (K,) contiguous float32 (float64 for float64 logits)");
  }
  return {weight.has_value() ? weight->const_data_ptr() : nullptr, label_smoothing, align_corners};
}

std::tuple<Tensor, Tensor> upsample_cross_entropy(const Tensor& logits, const Tensor& labels,
                                                  const std::optional<Tensor>& weight,
                                                  int64_t ignore_index, double label_smoothing,
                                                  bool align_corners, const Tensor& report) {
  const LogitMap map = logit_map(logits, "logits");
  const LabelMap label = label_map_of(labels, map, ignore_index);
  const CrossEntropyOptions options = options_of(logits, weight, label_smoothing, align_corners);
  const ScalarType wide = wide_type(logits.scalar_type());
  const std::vector<int64_t> size = {map.batch, label.height, label.width};
  Tensor losses = empty_cpu(size, wide), lse = empty_cpu(size, wide);
  BadLabel bad = {};
  MCIBI_CPU_KERNEL(upsample_cross_entropy_cpu)
  (map, label, options, losses.mutable_data_ptr(), lse.mutable_data_ptr(), &bad);
  report_bad_label(report, bad, label);
  return {losses, lse};
}

std::tuple<Tensor, Tensor> upsample_cross_entropy_reduced(
    const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& weight,
    int64_t ignore_index, double label_smoothing, bool align_corners, bool mean, bool with_grad,
    const Tensor& report) {
  const LogitMap map = logit_map(logits, "logits");
  const LabelMap label = label_map_of(labels, map, ignore_index);
  const CrossEntropyOptions options = options_of(logits, weight, label_smoothing, align_corners);
  const ScalarType wide = wide_type(logits.scalar_type());
  Tensor loss = empty_cpu({}, wide);
  BadLabel bad = {};
  const auto run = [&](const LogitMap* grad) {
    MCIBI_CPU_KERNEL(upsample_cross_entropy_reduced_cpu)
    (map, label, options, mean, loss.mutable_data_ptr(), grad, &bad);
    report_bad_label(report, bad, label);
  };
  if (!with_grad) {
    run(nullptr);
    return {loss, empty_cpu({0, map.classes, map.height, map.width}, wide)};
  }
  Tensor grad =
      empty_cpu({map.batch, map.classes, map.height, map.width}, wide, is_channels_last(logits));
  const LogitMap grad_map = logit_map(grad, "grad_logits");
  run(&grad_map);
  return {loss, grad};
}

Tensor upsample_cross_entropy_reduced_backward(const Tensor& grad_loss, const Tensor& logits,
                                               const Tensor& labels,
                                               const std::optional<Tensor>& weight,
                                               int64_t ignore_index, double label_smoothing,
                                               bool align_corners, bool mean,
                                               const Tensor& report) {
  const LogitMap map = logit_map(logits, "logits");
  const LabelMap label = label_map_of(labels, map, ignore_index);
  const CrossEntropyOptions options = options_of(logits, weight, label_smoothing, align_corners);
  STD_TORCH_CHECK(
      grad_loss.scalar_type() == wide_type(logits.scalar_type()) && grad_loss.dim() == 0,
      "grad_loss: expected a scalar like the loss");
  Tensor grad = empty_cpu({map.batch, map.classes, map.height, map.width}, logits.scalar_type(),
                          is_channels_last(logits));
  BadLabel bad = {};
  MCIBI_CPU_KERNEL(upsample_cross_entropy_reduced_backward_cpu)
  (grad_loss.const_data_ptr(), map, label, options, mean, logit_map(grad, "grad_logits"), &bad);
  report_bad_label(report, bad, label);
  return grad;
}

Tensor upsample_cross_entropy_backward(const Tensor& grad_losses, const Tensor& logits,
                                       const Tensor& labels, const Tensor& lse,
                                       const std::optional<Tensor>& weight, int64_t ignore_index,
                                       double label_smoothing, bool align_corners,
                                       const Tensor& report) {
  const LogitMap map = logit_map(logits, "logits");
  const LabelMap label = label_map_of(labels, map, ignore_index);
  const CrossEntropyOptions options = options_of(logits, weight, label_smoothing, align_corners);
  const ScalarType wide = wide_type(logits.scalar_type());
  for (const Tensor& t : {grad_losses, lse}) {
    STD_TORCH_CHECK(t.scalar_type() == wide && t.dim() == 3 && t.size(0) == map.batch &&
                        t.size(1) == label.height && t.size(2) == label.width,
                    "grad_losses, lse: expected (B, H, W) like the losses");
  }
  STD_TORCH_CHECK(lse.is_contiguous(), "lse: expected what upsample_cross_entropy returned");
  const CrossEntropyCotangent cotangent = {grad_losses.const_data_ptr(), grad_losses.stride(0),
                                           grad_losses.stride(1), grad_losses.stride(2),
                                           lse.const_data_ptr()};
  Tensor grad = empty_cpu({map.batch, map.classes, map.height, map.width}, logits.scalar_type(),
                          is_channels_last(logits));
  BadLabel bad = {};
  MCIBI_CPU_KERNEL(upsample_cross_entropy_backward_cpu)
  (cotangent, map, label, options, logit_map(grad, "grad_logits"), &bad);
  report_bad_label(report, bad, label);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mcibi_fast_cpu, m) {
  m.def(cpu_schemas::upsample_cross_entropy);
  m.def(cpu_schemas::upsample_cross_entropy_reduced);
  m.def(cpu_schemas::upsample_cross_entropy_reduced_backward);
  m.def(cpu_schemas::upsample_cross_entropy_backward);
}

STABLE_TORCH_LIBRARY_IMPL(mcibi_fast_cpu, CPU, m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&upsample_cross_entropy));
  m.impl("upsample_cross_entropy_reduced", TORCH_BOX(&upsample_cross_entropy_reduced));
  m.impl("upsample_cross_entropy_reduced_backward",
         TORCH_BOX(&upsample_cross_entropy_reduced_backward));
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&upsample_cross_entropy_backward));
}

}  // namespace mcibi_fast
