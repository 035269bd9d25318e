// CPU operators of the memory update: cheap checks, allocation, registration. Python checks what a
// user can get wrong (mcibi_fast/ops/memory_update/).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "memory_update/binding.h"

namespace mcibi_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_shapes(const FeatureMap& features, const Tensor& labels) {
  STD_TORCH_CHECK(features.batch == labels.size(0), "features and labels: different batch sizes");
  for (const int64_t size : {features.height, features.width, labels.size(1), labels.size(2)}) {
    STD_TORCH_CHECK(size > 0 && size < INT32_MAX, "features and labels: no empty dimension");
  }
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::empty(std::vector<int64_t>(sizes), type);
}

struct Sums {
  ClassSums of_classes;
  std::vector<int64_t> counts;
};

Sums compute_sums(const Tensor& features, const Tensor& labels, int64_t num_classes,
                  int64_t ignore_index, bool align_corners, const Tensor& report) {
  const FeatureMap map = feature_map(features);
  const LabelMap label = label_map(labels, num_classes, ignore_index);
  check_shapes(map, labels);
  Sums result = {{}, std::vector<int64_t>(num_classes)};
  BadLabel bad = {};
  MCIBI_CPU_KERNEL(class_feature_sums_cpu)
  (map, label, align_corners, result.of_classes, result.counts.data(), &bad);
  report_bad_label(report, bad, label);
  return result;
}

// Writes all K rows of the sums; those of the classes that do not occur are zeros.
template <typename T>
void write_sums(const ClassSums& sums, int64_t num_classes, int64_t channels, T* out) {
  const double* from = sums.sums.get();
  int64_t next = 0;  // class
  for (int64_t i = 0; i < sums.count; ++i, from += channels) {
    const int64_t c = sums.classes[i];
    std::fill(out + next * channels, out + c * channels, T(0));
    std::copy(from, from + channels, out + c * channels);
    next = c + 1;
  }
  std::fill(out + next * channels, out + num_classes * channels, T(0));
}

std::tuple<Tensor, Tensor> class_feature_sums(const Tensor& features, const Tensor& labels,
                                              int64_t num_classes, int64_t ignore_index,
                                              bool align_corners, const Tensor& report) {
  const Sums result =
      compute_sums(features, labels, num_classes, ignore_index, align_corners, report);
  const bool wide = features.scalar_type() == ScalarType::Double;
  const int64_t channels = features.size(1);
  Tensor sums = empty({num_classes, channels}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor counts = empty({num_classes}, ScalarType::Long);
  if (wide) {
    write_sums(result.of_classes, num_classes, channels, static_cast<double*>(sums.data_ptr()));
  } else {
    write_sums(result.of_classes, num_classes, channels, static_cast<float*>(sums.data_ptr()));
  }
  std::copy(result.counts.begin(), result.counts.end(), static_cast<int64_t*>(counts.data_ptr()));
  return {sums, counts};
}

// The elements of a (rows, columns) float32 or float64 tensor of any strides.
std::vector<double> to_doubles(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(t.dim() == 2 && (type == ScalarType::Float || type == ScalarType::Double), name,
                  ": expected two dimensions of float32 or float64");
  std::vector<double> values;
  values.reserve(t.numel());
  for (int64_t i = 0; i < t.size(0); ++i) {
    for (int64_t j = 0; j < t.size(1); ++j) {
      const int64_t k = i * t.stride(0) + j * t.stride(1);
      values.push_back(type == ScalarType::Double
                           ? static_cast<const double*>(t.const_data_ptr())[k]
                           : static_cast<const float*>(t.const_data_ptr())[k]);
    }
  }
  return values;
}

Tensor class_feature_sums_backward(const Tensor& grad_sums, const Tensor& labels, int64_t height,
                                   int64_t width, int64_t ignore_index, bool align_corners,
                                   ScalarType dtype, const Tensor& report) {
  const std::vector<double> grad = to_doubles(grad_sums, "grad_sums");
  const Tensor grad_features = empty({labels.size(0), grad_sums.size(1), height, width}, dtype);
  const FeatureMap map = feature_map(grad_features);
  const LabelMap label = label_map(labels, grad_sums.size(0), ignore_index);
  check_shapes(map, labels);
  BadLabel bad = {};
  MCIBI_CPU_KERNEL(class_feature_sums_backward_cpu)(grad.data(), label, align_corners, map, &bad);
  report_bad_label(report, bad, label);
  return grad_features;
}

// Stores the next memory. A row that would not be finite there keeps its old values: an overflow in
// one step must not stay in the memory. Returns how many classes with pixels kept their row.
template <typename T>
int64_t store_finite_rows(const std::vector<double>& old, const std::vector<double>& next,
                          const std::vector<int64_t>& counts, T* out) {
  int64_t kept = 0;
  for (size_t k = 0; k < counts.size(); ++k) {
    const T mean = static_cast<T>(next[2 * k]), deviation = static_cast<T>(next[2 * k + 1]);
    const bool finite = std::isfinite(mean) && std::isfinite(deviation);
    out[2 * k] = finite ? mean : static_cast<T>(old[2 * k]);
    out[2 * k + 1] = finite ? deviation : static_cast<T>(old[2 * k + 1]);
    kept += counts[k] > 0 && !finite;
  }
  return kept;
}

Tensor memory_update(const Tensor& memory, const Tensor& features, const Tensor& labels,
                     double momentum, bool unbiased, int64_t ignore_index, bool align_corners,
                     const Tensor& report, const Tensor& kept_rows) {
  STD_TORCH_CHECK(memory.dim() == 2 && memory.size(1) == 2, "memory: expected (K, 2)");
  const int64_t num_classes = memory.size(0);
  const Sums sums =
      compute_sums(features, labels, num_classes, ignore_index, align_corners, report);
  const std::vector<double> old = to_doubles(memory, "memory");
  std::vector<double> next = old;
  MCIBI_CPU_KERNEL(moving_average_cpu)
  (sums.of_classes, sums.counts.data(), features.size(1), momentum, unbiased, next.data());
  Tensor result = empty({num_classes, 2}, memory.scalar_type());
  *row_counter(kept_rows, memory) +=
      memory.scalar_type() == ScalarType::Double
          ? store_finite_rows(old, next, sums.counts, static_cast<double*>(result.data_ptr()))
          : store_finite_rows(old, next, sums.counts, static_cast<float*>(result.data_ptr()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mcibi_fast_cpu, m) {
  m.def(cpu_schemas::class_feature_sums);
  m.def(cpu_schemas::class_feature_sums_backward);
  m.def(cpu_schemas::memory_update);
}

STABLE_TORCH_LIBRARY_IMPL(mcibi_fast_cpu, CPU, m) {
  m.impl("class_feature_sums", TORCH_BOX(&class_feature_sums));
  m.impl("class_feature_sums_backward", TORCH_BOX(&class_feature_sums_backward));
  m.impl("memory_update", TORCH_BOX(&memory_update));
}

}  // namespace mcibi_fast
