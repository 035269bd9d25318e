#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace mcibi_fast {

void parallel_for(int64_t count, int64_t grain, RangeFunction function, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { function(begin, end, context); });
}

}  // namespace mcibi_fast
