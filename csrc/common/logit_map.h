#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/map_strides.h"

namespace mcibi_fast {

// Logits as the kernels see them: (B, K, h, w), strides in elements.
struct LogitMap {
  const void* data;
  FloatKind kind;
  int64_t batch, classes, height, width;
  MapStrides strides;
};

}  // namespace mcibi_fast
