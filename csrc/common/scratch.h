// Working memory of the CPU kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/numbers.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

// Memory for one thread's tiles or for a packed operand, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(std::aligned_alloc(64, static_cast<size_t>(ceil_div(bytes + 1, 64) * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
