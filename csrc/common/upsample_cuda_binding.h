// What the bindings of the upsampling ops' CUDA launchers share.
#pragma once

#include <optional>

#include "common/upsample_binding.h"

namespace mcibi_fast {

inline void check_cuda_sizes(const LogitMap& logits, int64_t height, int64_t width) {
  check_map_sizes("size", {height, width});
  check_map_sizes("logits", {logits.batch, logits.classes, logits.height, logits.width});
}

inline LabelMap cuda_label_map_of(const torch::stable::Tensor& labels,
                                  const torch::stable::Tensor& logits, const LogitMap& map,
                                  int64_t ignore_index) {
  STD_TORCH_CHECK(labels.get_device_index() == logits.get_device_index(),
                  "labels: on another device");
  const LabelMap label = label_map_of(labels, map, ignore_index);
  check_cuda_sizes(map, label.height, label.width);
  return label;
}

// Contiguous, or channels_last where the map is that and not contiguous as well.
inline torch::stable::Tensor empty_map_like(const torch::stable::Tensor& map) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(
      {map.size(0), map.size(1), map.size(2), map.size(3)}, map.scalar_type(), std::nullopt,
      map.device(), std::nullopt,
      is_channels_last(map) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace mcibi_fast
