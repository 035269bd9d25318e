// Scratch memory of exactly the size that a launcher asks for, full of NaN.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

inline std::unique_ptr<void, void (*)(void*)> poisoned(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes) != 0) std::abort();
  std::memset(memory, 0xff, bytes);
  return {memory, std::free};
}
