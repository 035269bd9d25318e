// Reading label maps of any integer type on the CPU, a row at a time.
#pragma once

#include <cstdint>

#include "common/labels.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {

constexpr int32_t kIgnored = -1;
constexpr int32_t kBad = -2;

// Reads the labels of one row as classes, kIgnored or kBad.
template <typename L>
void read_label_row(const LabelMap& labels, int64_t b, int64_t y, int32_t* classes) {
  const L* row = static_cast<const L*>(labels.data) + b * labels.stride_b + y * labels.stride_y;
  const int64_t stride = labels.stride_x;
  const int64_t num_classes = labels.num_classes, ignore_index = labels.ignore_index;
  const auto read = [&](int64_t x, int64_t value) {
    const bool in_range = value >= 0 && value < num_classes;
    classes[x] = value == ignore_index ? kIgnored : in_range ? static_cast<int32_t>(value) : kBad;
  };
  if (stride == 1) {
    for (int64_t x = 0; x < labels.width; ++x) read(x, row[x]);
  } else {
    for (int64_t x = 0; x < labels.width; ++x) read(x, row[x * stride]);
  }
}

using LabelReader = void (*)(const LabelMap&, int64_t, int64_t, int32_t*);

inline LabelReader label_reader(LabelKind kind) {
  switch (kind) {
    case LabelKind::kUInt8:
      return &read_label_row<uint8_t>;
    case LabelKind::kInt8:
      return &read_label_row<int8_t>;
    case LabelKind::kInt16:
      return &read_label_row<int16_t>;
    case LabelKind::kInt32:
      return &read_label_row<int32_t>;
    default:
      return &read_label_row<int64_t>;
  }
}

}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
