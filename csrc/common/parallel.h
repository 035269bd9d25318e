// torch's intra-op threads, without torch's headers.
#pragma once

#include <cstdint>

namespace mcibi_fast {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

void parallel_for(int64_t count, int64_t grain, RangeFunction function, void* context);

// Calls f(begin, end) on ranges that together cover [0, count); if there are several, each has at
// least `grain` items. f must not throw, because torch would replace the message.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<F*>(&f));
}

}  // namespace mcibi_fast
