// What the tests of the ops' CUDA kernels share. They run the kernels under AddressSanitizer and
// UBSan, on buffers of exactly the size needed.
#pragma once

#include "testing/cuda_dialect.h"

// after the dialect
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "common/labels.h"
#include "common/map_strides.h"
#include "testing/controls.h"
#include "testing/expect.h"
#include "testing/poisoned.h"

namespace mcibi_fast {

template <typename Element>
constexpr FloatKind kKind = FloatKind::kFloat32;
template <>
constexpr FloatKind kKind<double> = FloatKind::kFloat64;
template <>
constexpr FloatKind kKind<__nv_bfloat16> = FloatKind::kBFloat16;
template <>
constexpr FloatKind kKind<__half> = FloatKind::kFloat16;

inline double as_double(double x) { return x; }
inline double as_double(float x) { return x; }
inline double as_double(__half x) { return float(x); }
inline double as_double(__nv_bfloat16 x) { return float(x); }

inline MapStrides strides_of(int64_t channels, int64_t height, int64_t width, bool channels_last) {
  const int64_t plane = height * width, image = channels * plane;
  return channels_last ? MapStrides{image, 1, channels * width, channels}
                       : MapStrides{image, plane, width, 1};
}

// Draws classes, ignored labels and a few that are neither; returns the number of the latter.
template <typename Label>
int draw_labels(std::vector<Label>& labels, int classes, Label ignored, Label bad,
                std::mt19937& bits) {
  int count = 0;
  for (Label& label : labels) {
    label = Label(bits() % unsigned(classes + 1));
    if (label == classes) label = bits() % 8 == 0 ? bad : ignored;
    count += label == bad;
  }
  return count;
}

template <typename Label>
LabelMap label_map_of(const std::vector<Label>& labels, LabelKind kind, int64_t height,
                      int64_t width, int classes, Label ignored) {
  return {labels.data(), kind, height, width, height * width, width, 1, classes, ignored};
}

// Calls f(Element(), the type's name) for every type of elements.
template <typename F>
void for_element_types(const F& f) {
  f(float(), std::string("float32"));
  f(double(), std::string("float64"));
  f(__nv_bfloat16(), std::string("bfloat16"));
  f(__half(), std::string("float16"));
}

inline void expect_success(const char* error, const std::string& what) {
  expect(error == nullptr, what + ": " + (error ? error : ""));
}

}  // namespace mcibi_fast
