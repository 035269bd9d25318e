// Tests the CUDA kernels of the memory update with every feature type and both layouts, sizes with
// tails, and bad labels, against sums taken label by label in double. Exit status 1 on failure.
#include "testing/kernel_test.h"

// after the dialect
#include "memory_update/cuda.cu"

namespace {

using namespace mcibi_fast;

struct Case {
  int batch, channels, height, width, label_height, label_width, classes;
  bool align_corners, channels_last;
};

template <typename Element>
struct Problem {
  using T = Compute<Element>;
  Case c;
  std::vector<Element> features;
  std::vector<int16_t> labels;
  FeatureMap feature_map;
  LabelMap label_map;
  std::vector<double> sums;  // expected
  std::vector<int64_t> counts;
  int bad = 0;

  explicit Problem(const Case& size) : c(size) {
    std::mt19937 bits(3);
    std::normal_distribution<float> normal;
    features.resize(size_t(c.batch) * c.channels * c.height * c.width);
    for (Element& x : features) x = Element(normal(bits));
    const int64_t plane = int64_t(c.height) * c.width, z = c.channels;
    feature_map = {features.data(), kKind<Element>, c.batch, z,       c.height,
                   c.width,         z * plane,      plane,   c.width, 1};
    if (c.channels_last) {
      feature_map.stride_z = 1;
      feature_map.stride_x = z;
      feature_map.stride_y = z * c.width;
    }
    labels.resize(size_t(c.batch) * c.label_height * c.label_width);
    bad = draw_labels(labels, c.classes, int16_t(-100), int16_t(999), bits);
    label_map = label_map_of(labels, LabelKind::kInt16, c.label_height, c.label_width, c.classes,
                             int16_t(-100));
    expected();
  }

  void expected() {
    sums.resize(size_t(c.classes * c.channels));
    counts.resize(size_t(c.classes));
    const auto axis_y = make_bilinear_axis<T>(c.height, c.label_height, c.align_corners);
    const auto axis_x = make_bilinear_axis<T>(c.width, c.label_width, c.align_corners);
    size_t i = 0;
    for (int b = 0; b < c.batch; ++b) {
      for (int y = 0; y < c.label_height; ++y) {
        for (int x = 0; x < c.label_width; ++x) {
          const int label = labels[i++];
          if (label < 0 || label >= c.classes) continue;
          ++counts[size_t(label)];
          const auto ty = bilinear_tap(axis_y, y);
          const auto tx = bilinear_tap(axis_x, x);
          for (int z = 0; z < c.channels; ++z) {
            const auto at = [&](int yy, int xx) {
              const FeatureMap& f = feature_map;
              return as_double(features[size_t(b * f.stride_b + z * f.stride_z + yy * f.stride_y +
                                               xx * f.stride_x)]);
            };
            sums[size_t(label * c.channels + z)] +=
                double(ty.weight0) * (double(tx.weight0) * at(ty.index0, tx.index0) +
                                      double(tx.weight1) * at(ty.index0, tx.index1)) +
                double(ty.weight1) * (double(tx.weight0) * at(ty.index1, tx.index0) +
                                      double(tx.weight1) * at(ty.index1, tx.index1));
          }
        }
      }
    }
  }
};

template <typename Element>
void test(const Case& c, const std::string& name) {
  using T = typename Problem<Element>::T;
  const Problem<Element> problem(c);
  const double tolerance = std::is_same_v<Element, double> ? 1e-13 : 3e-6;
  std::vector<T> sums(problem.sums.size(), T(NAN)), first;
  std::vector<int64_t> counts(problem.counts.size(), -1);
  const auto scratch =
      poisoned(class_feature_sums_cuda_scratch(problem.feature_map, problem.label_map));
  for (const int seed : {0, 1, 2, 3}) {
    host_set_seed(uint64_t(seed));
    int64_t flag[3] = {};
    const char* error =
        class_feature_sums_cuda(problem.feature_map, problem.label_map, c.align_corners,
                                sums.data(), counts.data(), {flag, 2}, scratch.get(), nullptr);
    expect_success(error, name);
    expect(counts == problem.counts, name + ": counts");
    expect(flag[0] == problem.bad && (problem.bad == 0 || (flag[1] == 999 && flag[2] == 2)),
           name + ": bad labels are counted");
    double error_max = 0, value_max = 0;
    for (size_t i = 0; i < sums.size(); ++i) {
      error_max = std::max(error_max, std::abs(double(sums[i]) - problem.sums[i]));
      value_max = std::max(value_max, std::abs(problem.sums[i]));
      if (std::isnan(sums[i])) error_max = INFINITY;
    }
    expect(error_max <= tolerance * value_max,
           name + ": sums, off by " + std::to_string(error_max / value_max));
    if (first.empty()) first = sums;
    expect(sums == first, name + ": the same bits in any order of threads");
  }
  // The adjoint: <sums(R), G> = <R, backward(G)>, with G = sums scaled to what float16 holds.
  std::vector<T> cotangent = sums;
  for (T& x : cotangent) x = T(x / 1024);
  std::vector<Element> grad(problem.features.size(), Element(float(NAN)));
  FeatureMap grad_map = problem.feature_map;
  const int64_t plane = int64_t(c.height) * c.width;
  grad_map = {grad.data(), grad_map.kind,      c.batch, c.channels, c.height,
              c.width,     c.channels * plane, plane,   c.width,    1};
  const auto backward_scratch =
      poisoned(class_feature_sums_backward_cuda_scratch(grad_map, problem.label_map));
  const char* error =
      class_feature_sums_backward_cuda(cotangent.data(), problem.label_map, c.align_corners,
                                       grad_map, {nullptr, 0}, backward_scratch.get(), nullptr);
  expect_success(error, name);
  double left = 0, right = 0;
  for (const T x : sums) left += double(x) * double(x) / 1024;
  for (int b = 0; b < c.batch; ++b)
    for (int z = 0; z < c.channels; ++z)
      for (int64_t p = 0; p < plane; ++p) {
        const FeatureMap& f = problem.feature_map;
        const int64_t from =
            b * f.stride_b + z * f.stride_z + p / c.width * f.stride_y + p % c.width * f.stride_x;
        right += as_double(problem.features[size_t(from)]) *
                 as_double(grad[size_t((b * c.channels + z) * plane + p)]);
      }
  const double adjoint_tolerance = sizeof(Element) == 2 ? 1e-2 : 10 * tolerance;
  expect(std::abs(left - right) <= adjoint_tolerance * left, name + ": the adjoint");
}

}  // namespace

int main() {
  const std::vector<std::pair<Case, std::string>> cases = {
      {{2, 70, 5, 8, 37, 50, 19, false, false}, "pixel vectors, tail of channels"},
      {{1, 72, 9, 8, 33, 41, 5, true, true}, "channel vectors, align_corners"},
      {{1, 3, 7, 13, 20, 21, 40, false, false}, "elements, many classes"},
      {{2, 6, 9, 20, 31, 45, 7, false, false}, "halves of vectors in 16 bits, tails of tiles"},
      {{2, 66, 5, 22, 31, 45, 7, true, false}, "halves of vectors in 32 bits, tails of tiles"},
      {{1, 5, 3, 67, 3, 67, 3, false, true}, "rows of five tiles, labels of the same size"},
      {{2, 2, 20, 30, 10, 9, 1, false, false}, "labels smaller than the features, one class"},
      {{1, 4, 1, 1, 40, 37, 2, true, false}, "one low-resolution pixel"},
  };
  for (const auto& item : cases)
    for_element_types([&](auto element, const std::string& type) {
      test<decltype(element)>(item.first, item.second + ", " + type);
    });
  return report("memory_update_cuda_test");
}
