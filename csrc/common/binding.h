// What the bindings share, on the CPU and on CUDA: tensors as the kernels' torch-free descriptions.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/dtypes.h"
#include "common/labels.h"
#include "common/map_strides.h"
#include "op_schemas.h"  // the build writes it: buildtools/op_header.py

namespace mcibi_fast {

inline FloatKind float_kind(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return FloatKind::kFloat32;
    case ScalarType::Double:
      return FloatKind::kFloat64;
    case ScalarType::BFloat16:
      return FloatKind::kBFloat16;
    case ScalarType::Half:
      return FloatKind::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
}

// The dtype of what is accumulated or kept for the backward: float64 for float64, else float32.
inline torch::headeronly::ScalarType wide_type(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline MapStrides map_strides(const torch::stable::Tensor& map) {
  return {map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

// channels_last in memory, and not contiguous as well (as a map of one class or one pixel is).
inline bool is_channels_last(const torch::stable::Tensor& map) {
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (map.size(dim) != 1 && map.stride(dim) != expected) return false;
    expected *= map.size(dim);
  }
  return !map.is_contiguous();
}

inline LabelKind label_kind(const torch::stable::Tensor& labels) {
  using torch::headeronly::ScalarType;
  switch (labels.scalar_type()) {
    case ScalarType::Byte:
      return LabelKind::kUInt8;
    case ScalarType::Char:
      return LabelKind::kInt8;
    case ScalarType::Short:
      return LabelKind::kInt16;
    case ScalarType::Int:
      return LabelKind::kInt32;
    case ScalarType::Long:
      return LabelKind::kInt64;
    default:
      STD_TORCH_CHECK(false, "labels: expected uint8, int8, int16, int32 or int64");
  }
}

inline LabelMap label_map(const torch::stable::Tensor& labels, int64_t num_classes,
                          int64_t ignore_index) {
  STD_TORCH_CHECK(labels.dim() == 3, "labels: expected (B, H, W)");
  STD_TORCH_CHECK(num_classes > 0 && num_classes < INT32_MAX, "num_classes: out of range");
  return {labels.const_data_ptr(), label_kind(labels), labels.size(1),
          labels.size(2),          labels.stride(0),   labels.stride(1),
          labels.stride(2),        num_classes,        ignore_index};
}

// For CPU ops: the numbers with which mcibi_fast/ops/labels.py raises an error. The report has
// those of the first bad label; it is left alone (zeros) where all labels are good.
inline void report_bad_label(const torch::stable::Tensor& report, const BadLabel& bad,
                             const LabelMap& labels) {
  STD_TORCH_CHECK(report.is_cpu() && report.numel() == 6 && report.is_contiguous() &&
                      report.scalar_type() == torch::headeronly::ScalarType::Long,
                  "report: expected int64 (6,) on the CPU");
  if (!bad.found) return;
  int64_t* numbers = static_cast<int64_t*>(report.data_ptr());
  for (const int64_t number :
       {labels.num_classes, labels.ignore_index, bad.value, bad.b, bad.y, bad.x})
    *numbers++ = number;
}

// For CUDA ops, which nothing waits for: counts over many calls, which labels.py reads later.
inline LabelFlag label_flag(const torch::stable::Tensor& flag, const torch::stable::Tensor& labels,
                            int64_t op) {
  STD_TORCH_CHECK(flag.scalar_type() == torch::headeronly::ScalarType::Long && flag.numel() == 3 &&
                      flag.is_contiguous() && flag.get_device_index() == labels.get_device_index(),
                  "flag: expected int64 (3,) on the labels' device");
  return {static_cast<int64_t*>(flag.data_ptr()), op};
}

}  // namespace mcibi_fast
