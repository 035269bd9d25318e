// Reading labels in CUDA kernels, and reporting those that are wrong.
#pragma once

#include "common/device_intrinsics.cuh"
#include "common/labels.h"

namespace mcibi_fast {

// Counts labels that are neither classes nor ignored. The first report also stores its value and
// op.
__device__ inline void report_bad_labels(const LabelFlag& flag, int count, int64_t value) {
  if (count == 0 || flag.flag == nullptr) return;
  auto* total = reinterpret_cast<unsigned long long*>(flag.flag);
  if (atomicAdd(total, static_cast<unsigned long long>(count)) == 0) {
    flag.flag[1] = value;
    flag.flag[2] = flag.op;
  }
}

// One thread's labels, and how many of them are neither classes nor ignored.
class LabelReader {
 public:
  __device__ explicit LabelReader(const LabelMap& labels) : labels_(labels) {}

  // The class, or -1.
  __device__ __forceinline__ int read(int b, int y, int x) {
    const int64_t value = label_value(labels_, b, y, x);
    if (value == labels_.ignore_index) return -1;
    if (value >= 0 && value < labels_.num_classes) return static_cast<int>(value);
    ++bad_;
    bad_value_ = value;
    return -1;
  }

  __device__ void report(const LabelFlag& flag) const { report_bad_labels(flag, bad_, bad_value_); }

 private:
  const LabelMap& labels_;
  int64_t bad_value_ = 0;
  int bad_ = 0;
};

}  // namespace mcibi_fast
