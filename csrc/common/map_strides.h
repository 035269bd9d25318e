#pragma once

#include <cstdint>

namespace mcibi_fast {

// Strides of a (B, C, h, w) tensor, in elements.
struct MapStrides {
  int64_t batch, channel, row, column;
};

}  // namespace mcibi_fast
