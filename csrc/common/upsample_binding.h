// What the bindings of the upsampling ops share.
#pragma once

#include <initializer_list>

#include "common/binding.h"
#include "common/logit_map.h"

namespace mcibi_fast {

inline LogitMap logit_map(const torch::stable::Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.numel() > 0, name,
                  ": expected (B, K, h, w) with no empty dimension");
  return {t.const_data_ptr(), float_kind(t, name), t.size(0),     t.size(1),
          t.size(2),          t.size(3),           map_strides(t)};
}

inline void check_map_sizes(const char* name, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size > 0 && size < INT32_MAX, name, ": sizes must be at least 1");
  }
}

// The labels of these logits, whose classes they are.
inline LabelMap label_map_of(const torch::stable::Tensor& labels, const LogitMap& logits,
                             int64_t ignore_index) {
  const LabelMap map = label_map(labels, logits.classes, ignore_index);
  STD_TORCH_CHECK(labels.size(0) == logits.batch, "labels: expected the batch size of the logits");
  check_map_sizes("labels", {labels.size(1), labels.size(2)});
  return map;
}

}  // namespace mcibi_fast
