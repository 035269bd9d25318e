// What the bindings of the memory update for the CPU and for CUDA share.
#pragma once

#include "common/binding.h"
#include "memory_update/api.h"

namespace mcibi_fast {

inline FeatureMap feature_map(const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "features: expected (B, Z, h, w)");
  return {t.const_data_ptr(), float_kind(t, "features"),
          t.size(0),          t.size(1),
          t.size(2),          t.size(3),
          t.stride(0),        t.stride(1),
          t.stride(2),        t.stride(3)};
}

}  // namespace mcibi_fast
