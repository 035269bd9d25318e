// Label maps as the kernels see them, and where they report a label that is no class.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/host_device.h"

namespace mcibi_fast {

// GT, (B, H, W). Values in [0, num_classes) other than ignore_index are classes. Strides are in
// elements.
struct LabelMap {
  const void* data;
  LabelKind kind;
  int64_t height, width;
  int64_t stride_b, stride_y, stride_x;
  int64_t num_classes, ignore_index;
};

MCIBI_HOST_DEVICE int64_t label_value(const LabelMap& labels, int64_t b, int64_t y, int64_t x) {
  const int64_t i = b * labels.stride_b + y * labels.stride_y + x * labels.stride_x;
  switch (labels.kind) {
    case LabelKind::kUInt8:
      return static_cast<const uint8_t*>(labels.data)[i];
    case LabelKind::kInt8:
      return static_cast<const int8_t*>(labels.data)[i];
    case LabelKind::kInt16:
      return static_cast<const int16_t*>(labels.data)[i];
    case LabelKind::kInt32:
      return static_cast<const int32_t*>(labels.data)[i];
    default:
      return static_cast<const int64_t*>(labels.data)[i];
  }
}

// The first label, in memory order, that is neither a class nor ignore_index (CPU kernels).
struct BadLabel {
  bool found;
  int64_t b, y, x, value;
};

// Where CUDA kernels count bad labels: int64 (count, first value, op); op is the number of the op
// in mcibi_fast/_schemas.py. A null flag counts nothing.
struct LabelFlag {
  int64_t* flag;
  int64_t op;
};

}  // namespace mcibi_fast
