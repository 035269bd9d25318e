// Reads the rows of a label map on several threads and keeps the first bad label among them.
#pragma once

#include <cstdint>
#include <mutex>
#include <tuple>

#include "common/label_rows.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

class CheckedLabelRows {
 public:
  explicit CheckedLabelRows(const LabelMap& labels)
      : labels_(labels), read_(label_reader(labels.kind)) {}

  // Reads one row as classes or kIgnored; bad labels become kIgnored too.
  void read(int64_t b, int64_t y, int32_t* classes) {
    read_(labels_, b, y, classes);
    bool any = false;
    for (int64_t x = 0; x < labels_.width; ++x) any |= classes[x] == kBad;
    if (any) note(b, y, classes);
  }

  BadLabel first_bad() const { return first_; }

 private:
  void note(int64_t b, int64_t y, int32_t* classes) {
    for (int64_t x = labels_.width - 1; x >= 0; --x) {
      if (classes[x] != kBad) continue;
      classes[x] = kIgnored;
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!first_.found || std::tie(b, y, x) < std::tie(first_.b, first_.y, first_.x)) {
        first_ = {true, b, y, x, label_value(labels_, b, y, x)};
      }
    }
  }

  const LabelMap& labels_;
  LabelReader read_;
  std::mutex mutex_;
  BadLabel first_ = {};
};

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
