// Label maps as the kernels see them, and where they report a label that is none.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace mcibi_fast {

// GT: (B, H, W); values in [0, num_classes) that are not ignore_index are classes. Strides in
// elements.
struct LabelMap {
  const void* data;
  LabelKind kind;
  int64_t height, width;
  int64_t stride_b, stride_y, stride_x;
  int64_t num_classes, ignore_index;
};

// The first label, in memory order, that is neither a class nor ignore_index (CPU kernels).
struct BadLabel {
  bool found;
  int64_t b, y, x, value;
};

// Where CUDA kernels count bad labels: int64 (count, first value, op). A null flag counts nothing.
struct LabelFlag {
  int64_t* flag;
  int64_t op;
};

// The ops by number, as in mcibi_fast/ops/labels.py.
inline constexpr int64_t kOpClassFeatureSums = 0;
inline constexpr int64_t kOpClassFeatureSumsBackward = 1;
inline constexpr int64_t kOpMemoryUpdate = 2;
inline constexpr int64_t kOpUpsampleCrossEntropy = 3;
inline constexpr int64_t kOpUpsampleConfusion = 4;

}  // namespace mcibi_fast
