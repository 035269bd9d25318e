// What the bindings of the CPU kernels share: allocation.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/binding.h"
#include "common/cpu_dispatch.h"

namespace mcibi_fast {

inline torch::stable::Tensor empty_cpu(const std::vector<int64_t>& size,
                                       torch::headeronly::ScalarType dtype,
                                       bool channels_last = false) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(
      size, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace mcibi_fast
