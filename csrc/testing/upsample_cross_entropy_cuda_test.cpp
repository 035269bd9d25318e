// Tests the CUDA kernels of the cross entropy with every element type and both layouts, and sizes
// with tails, against losses and gradients computed pixel by pixel in double. Exit status 1 on
// failure.
#include "testing/kernel_test.h"

// after the dialect
#include "upsample_cross_entropy/cuda.cu"

namespace {

using namespace mcibi_fast;

struct Case {
  int batch, classes, height, width, label_height, label_width;
  bool align_corners, channels_last;
  double smoothing;
};

template <typename Element>
struct Problem {
  using T = Compute<Element>;
  Case c;
  std::vector<Element> logits;
  std::vector<int16_t> labels;
  std::vector<T> weight, cotangent;
  LogitMap map;
  LabelMap label_map;
  std::vector<double> losses, lse, grad;  // expected
  int bad = 0;

  explicit Problem(const Case& size) : c(size) {
    std::mt19937 bits(3);
    std::normal_distribution<float> normal;
    logits.resize(size_t(c.batch) * c.classes * c.height * c.width);
    for (Element& x : logits) x = Element(3 * normal(bits));
    map = {logits.data(),
           kKind<Element>,
           c.batch,
           c.classes,
           c.height,
           c.width,
           strides_of(c.classes, c.height, c.width, c.channels_last)};
    labels.resize(size_t(c.batch) * c.label_height * c.label_width);
    bad = draw_labels(labels, c.classes, int16_t(-100), int16_t(999), bits);
    for (int i = 0; i < c.classes; ++i) weight.push_back(T(0.25) + T(bits() % 8));
    for (size_t i = 0; i < labels.size(); ++i) cotangent.push_back(T(normal(bits)));
    label_map = label_map_of(labels, LabelKind::kInt16, c.label_height, c.label_width, c.classes,
                             int16_t(-100));
    losses.resize(labels.size());
    lse.resize(labels.size());
    grad.resize(logits.size());
    expected();
  }

  size_t offset(int b, int k, int y, int x) const {
    const MapStrides& s = map.strides;
    return size_t(b * s.batch + k * s.channel + y * s.row + x * s.column);
  }

  void expected() {
    const auto axis_y = make_bilinear_axis<T>(c.height, c.label_height, c.align_corners);
    const auto axis_x = make_bilinear_axis<T>(c.width, c.label_width, c.align_corners);
    size_t i = 0;
    for (int b = 0; b < c.batch; ++b)
      for (int y = 0; y < c.label_height; ++y)
        for (int x = 0; x < c.label_width; ++x, ++i)
          pixel(i, b, bilinear_tap(axis_y, y), bilinear_tap(axis_x, x));
  }

  void pixel(size_t i, int b, const BilinearTap<T>& ty, const BilinearTap<T>& tx) {
    const int label = labels[i];
    if (label < 0 || label >= c.classes) return;
    const struct {
      int y, x;
      double weight;
    } corners[] = {{ty.index0, tx.index0, double(ty.weight0) * double(tx.weight0)},
                   {ty.index0, tx.index1, double(ty.weight0) * double(tx.weight1)},
                   {ty.index1, tx.index0, double(ty.weight1) * double(tx.weight0)},
                   {ty.index1, tx.index1, double(ty.weight1) * double(tx.weight1)}};
    std::vector<double> l(size_t(c.classes), 0.0);
    double sum = 0, largest = -INFINITY, weights = 0, weighted = 0;
    for (int k = 0; k < c.classes; ++k) {
      for (const auto& corner : corners)
        l[size_t(k)] += corner.weight * as_double(logits[offset(b, k, corner.y, corner.x)]);
      largest = std::max(largest, l[size_t(k)]);
      weights += double(weight[size_t(k)]);
      weighted += double(weight[size_t(k)]) * l[size_t(k)];
    }
    for (const double x : l) sum += std::exp(x - largest);
    lse[i] = largest + std::log(sum);
    const double hard = (1 - c.smoothing) * double(weight[size_t(label)]);
    const double soft = c.smoothing / c.classes;
    losses[i] = hard * (lse[i] - l[size_t(label)]) + soft * (weights * lse[i] - weighted);
    for (int k = 0; k < c.classes; ++k) {
      const double d = (hard + soft * weights) * std::exp(l[size_t(k)] - lse[i]) -
                       (k == label ? hard : 0) - soft * double(weight[size_t(k)]);
      for (const auto& corner : corners)
        grad[offset(b, k, corner.y, corner.x)] += corner.weight * double(cotangent[i]) * d;
    }
  }
};

template <typename Value>
void expect_close(const std::vector<Value>& found, const std::vector<double>& right,
                  double tolerance, const std::string& name) {
  double error = 0, largest = 1e-30;
  for (size_t i = 0; i < right.size(); ++i) {
    const double e = std::abs(as_double(found[i]) - right[i]);
    error = std::isnan(e) ? INFINITY : std::max(error, e);
    largest = std::max(largest, std::abs(right[i]));
  }
  expect(error <= tolerance * largest, name + ", off by " + std::to_string(error / largest));
}

template <typename Element>
void test(const Case& c, const std::string& name) {
  using T = typename Problem<Element>::T;
  const Problem<Element> problem(c);
  const double tolerance = sizeof(T) == 8 ? 1e-13 : 2e-6;
  const CrossEntropyOptions options = {problem.weight.data(), c.smoothing, c.align_corners};
  const size_t pixels = problem.labels.size();
  const CrossEntropyCotangent cotangent = {
      problem.cotangent.data(), int64_t(c.label_height) * c.label_width, c.label_width, 1, nullptr};
  const size_t bytes = upsample_cross_entropy_backward_cuda_scratch(problem.map, problem.label_map);
  for (const int seed : {0, 1, 2, 3}) {
    host_set_seed(uint64_t(seed));
    int64_t flag[3] = {};
    std::vector<T> losses(pixels, T(NAN)), lse(pixels), statistic(2 * pixels, T(NAN));
    const char* error =
        upsample_cross_entropy_cuda(problem.map, problem.label_map, options, losses.data(),
                                    statistic.data(), {flag, 3}, nullptr);
    expect_success(error, name);
    expect(flag[0] == problem.bad && (problem.bad == 0 || (flag[1] == 999 && flag[2] == 3)),
           name + ": bad labels are counted");
    expect_close(losses, problem.losses, tolerance, name + ": losses");
    for (size_t i = 0; i < pixels; ++i) lse[i] = statistic[i] + std::log(statistic[pixels + i]);
    expect_close(lse, problem.lse, tolerance, name + ": lse");

    std::vector<Element> grad(problem.logits.size(), Element(float(NAN)));
    const auto scratch = poisoned(bytes);
    LogitMap grad_map = problem.map;
    grad_map.data = grad.data();
    CrossEntropyCotangent given = cotangent;
    given.statistic = statistic.data();
    error = upsample_cross_entropy_backward_cuda(given, problem.map, problem.label_map, options,
                                                 grad_map, {nullptr, 3}, scratch.get(), nullptr);
    expect_success(error, name);
    const double rounding = sizeof(Element) == 2 ? 8e-3 : 2 * tolerance;
    expect_close(grad, problem.grad, rounding, name + ": the gradient");
  }
}

// The sum of the losses and its gradient in one pass, against the losses above and the gradient in
// two passes.
template <typename Element>
void test_one_pass(const Case& c, const std::string& name) {
  using T = typename Problem<Element>::T;
  const Problem<Element> problem(c);
  const ReducedCudaBytes bytes =
      upsample_cross_entropy_reduced_cuda_bytes(problem.map, problem.label_map);
  expect((bytes.sums > 0) == (sizeof(T) == 4 && c.label_height > c.height), name + ": one pass");
  if (bytes.sums == 0) return;
  const CrossEntropyOptions options = {problem.weight.data(), c.smoothing, c.align_corners};
  const size_t pixels = problem.labels.size();
  std::vector<T> losses(pixels), statistic(2 * pixels), ones(pixels, T(1));
  std::vector<Element> right(problem.logits.size()), grad(right.size(), Element(float(NAN)));
  LogitMap map = problem.map;
  expect_success(upsample_cross_entropy_cuda(problem.map, problem.label_map, options, losses.data(),
                                             statistic.data(), {nullptr, 3}, nullptr),
                 name);
  const auto scratch =
      poisoned(upsample_cross_entropy_backward_cuda_scratch(problem.map, problem.label_map));
  map.data = right.data();
  expect_success(
      upsample_cross_entropy_backward_cuda({ones.data(), int64_t(c.label_height) * c.label_width,
                                            c.label_width, 1, statistic.data()},
                                           problem.map, problem.label_map, options, map,
                                           {nullptr, 3}, scratch.get(), nullptr),
      name);

  const auto sums = poisoned(bytes.sums), workspace = poisoned(bytes.workspace);
  int64_t flag[3] = {};
  float loss = NAN;
  const float one = 1;
  expect_success(
      upsample_cross_entropy_reduced_cuda(problem.map, problem.label_map, options, false, &loss,
                                          sums.get(), {flag, 3}, workspace.get(), nullptr),
      name);
  expect(flag[0] == problem.bad, name + ": bad labels are counted");
  map.data = grad.data();
  expect_success(
      upsample_cross_entropy_gather_cuda(&one, sums.get(), problem.label_map, map, nullptr), name);
  double total = 0;
  for (const double x : problem.losses) total += x;
  expect_close(std::vector<float>{loss}, {total}, 2e-6, name + ": the loss in one pass");
  std::vector<double> expected;
  for (const Element x : right) expected.push_back(as_double(x));
  const double rounding = sizeof(Element) == 2 ? 8e-3 : 4e-6;
  expect_close(grad, expected, rounding, name + ": the gradient in one pass");
}

}  // namespace

int main() {
  const std::vector<std::pair<Case, std::string>> cases = {
      {{2, 19, 3, 9, 21, 70, false, false, 0.0}, "tails of tiles"},
      {{1, 33, 5, 3, 33, 41, true, true, 0.1}, "channels_last, align_corners, smoothing"},
      {{1, 129, 2, 10, 9, 65, false, false, 0.0}, "several patches"},
      {{1, 3, 3, 67, 3, 67, false, true, 0.0}, "labels of the same size"},
      {{1, 60, 2, 11, 21, 23, false, true, 0.0}, "walks of 16 lanes"},
      {{2, 2, 20, 30, 10, 9, false, false, 1.0}, "labels smaller than the logits"},
      {{1, 1, 1, 1, 40, 37, true, false, 0.0}, "one class, one low-resolution pixel"},
  };
  for (const auto& item : cases)
    for_element_types([&](auto element, const std::string& type) {
      test<decltype(element)>(item.first, item.second + ", " + type);
      test_one_pass<decltype(element)>(item.first, item.second + ", " + type);
    });
  return report("upsample_cross_entropy_cuda_test");
}
