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

// Where the rows that are kept are counted, over many calls; ops/finite.py reads it later.
inline int64_t* row_counter(const torch::stable::Tensor& counter,
                            const torch::stable::Tensor& memory) {
  STD_TORCH_CHECK(counter.scalar_type() == torch::headeronly::ScalarType::Long &&
                      counter.numel() == 1 &&
                      counter.get_device_index() == memory.get_device_index(),
                  "kept_rows: expected int64 (1,) on the memory's device");
  return static_cast<int64_t*>(counter.data_ptr());
}

}  // namespace mcibi_fast
