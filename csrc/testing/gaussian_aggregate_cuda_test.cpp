// Tests the CUDA kernels of the aggregation with every type and both layouts, sizes with tails, and
// tables that fit in shared memory or do not, against sums in double. Exit status 1 on failure.
#include "testing/kernel_test.h"
#include "testing/poisoned.h"

// after the dialect
#include "gaussian_aggregate/cuda.cu"

namespace {

using namespace mcibi_fast;

struct Case {
  int batch, classes, height, width, channels;
  int shared_kilobytes;
};

template <typename Element>
constexpr double kTolerance = 3e-6;
template <>
constexpr double kTolerance<double> = 1e-13;
template <>
constexpr double kTolerance<__nv_bfloat16> = 1.5e-2;
template <>
constexpr double kTolerance<__half> = 2e-3;

// The largest error over the largest value; infinite where `found` has a NaN.
template <typename Element>
double error_of(const std::vector<Element>& found, const std::vector<double>& expected) {
  double error = 0, largest = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    error = std::fmax(error, std::abs(as_double(found[i]) - expected[i]));
    largest = std::fmax(largest, std::abs(expected[i]));
    if (std::isnan(as_double(found[i]))) return INFINITY;
  }
  return error / std::fmax(largest, 1e-300);
}

template <typename Element>
struct Problem {
  using Wide = Compute<Element>;

  Case c;
  bool channels_last;
  size_t pixels, images;
  std::vector<double> memory, table, out, lse, grad_logits;  // all but memory: expected
  std::vector<Element> logits, grad;
  int64_t state[2] = {-5, 77};
  GaussianAggregateCudaInput input = {};
  std::unique_ptr<void, void (*)(void*)> scratch = poisoned(0);

  Problem(const Case& size, bool last) : c(size), channels_last(last) {
    std::mt19937 bits(1);
    std::normal_distribution<float> normal;
    pixels = size_t(c.height) * c.width;
    images = size_t(c.batch);
    const size_t k = size_t(c.classes), z = size_t(c.channels);
    for (size_t i = 0; i < 2 * k; ++i) memory.push_back(0.2 + 0.1 * double(i % 7));
    for (size_t i = 0; i < images * k * pixels; ++i) logits.push_back(Element(2 * normal(bits)));
    for (size_t i = 0; i < images * z * pixels; ++i) grad.push_back(Element(normal(bits)));
    input.table = {memory.data(),
                   FloatKind::kFloat64,
                   2,
                   1,
                   c.classes,
                   c.channels,
                   FloatKind::kFloat32,
                   nullptr,
                   0,
                   0,
                   state,
                   1};
    input.kind = kKind<Element>;
    input.logits = logits.data();
    input.logits_strides = strides(c.classes);
    input.batch = c.batch;
    input.height = c.height;
    input.width = c.width;
    input.channels_last = channels_last;
    scratch = poisoned(gaussian_aggregate_cuda_scratch(input));
    input.scratch = scratch.get();
    expect_table();
    expect_results();
  }

  MapStrides strides(int64_t count) const {
    return strides_of(count, c.height, c.width, channels_last);
  }
  size_t at(size_t b, int count, int channel, size_t n) const {
    return b * size_t(count) * pixels +
           (channels_last ? n * size_t(count) + size_t(channel) : size_t(channel) * pixels + n);
  }
  void expect_table() {
    for (int k = 0; k < c.classes; ++k) {
      for (int z = 0; z < c.channels; ++z) {
        float eps[4];
        gaussian_noise4(uint32_t(z) / 4, uint32_t(k), philox_state(state[0], state[1]), eps);
        table.push_back(float(memory[size_t(2 * k)]) +
                        float(memory[size_t(2 * k + 1)]) * eps[z % 4]);
      }
    }
  }
  void expect_results() {
    out.resize(grad.size());
    grad_logits.resize(logits.size());
    for (size_t b = 0; b < images; ++b) {
      for (size_t n = 0; n < pixels; ++n) {
        std::vector<double> p, grad_p;
        double sum = 0, dot = 0;
        for (int k = 0; k < c.classes; ++k) {
          p.push_back(std::exp(as_double(logits[at(b, c.classes, k, n)])));
          sum += p.back();
        }
        lse.push_back(std::log(sum));
        for (int k = 0; k < c.classes; ++k) {
          grad_p.push_back(0);
          p[size_t(k)] /= sum;
          for (int z = 0; z < c.channels; ++z) {
            const size_t i = at(b, c.channels, z, n);
            const double entry = table[size_t(k * c.channels + z)];
            out[i] += p[size_t(k)] * entry;
            grad_p.back() += as_double(grad[i]) * entry;
          }
          dot += p[size_t(k)] * grad_p.back();
        }
        for (int k = 0; k < c.classes; ++k)
          grad_logits[at(b, c.classes, k, n)] = p[size_t(k)] * (grad_p[size_t(k)] - dot);
      }
    }
  }

  void test(const std::string& name) const {
    const auto check = [&](const char* error, const std::string& what, double off, double most) {
      expect_success(error, name + ": " + what);
      expect(off <= most, name + ": " + what + " is off by " + std::to_string(off));
    };
    const double tolerance = kTolerance<Element>;
    std::vector<float> entries(table.size(), NAN);
    const char* error = gaussian_table_cuda(input.table, entries.data(), nullptr);
    check(error, "table", error_of(entries, table), 1e-6);

    std::vector<Element> result(out.size(), Element(float(NAN)));
    std::vector<Wide> statistic(lse.size(), Wide(NAN));
    error = gaussian_aggregate_cuda(input, false, result.data(), statistic.data(), nullptr);
    check(error, "out", error_of(result, out), tolerance);
    check(error, "lse", error_of(statistic, lse), 1e-6);

    std::vector<Element> gradient(grad_logits.size(), Element(float(NAN)));
    error = gaussian_aggregate_backward_cuda(input, statistic.data(), grad.data(),
                                             strides(c.channels), gradient.data(), nullptr);
    check(error, "gradient", error_of(gradient, grad_logits), 2 * tolerance);

    error = gaussian_aggregate_cuda(input, true, result.data(), statistic.data(), nullptr);
    expect_success(error, name + ": hard");
  }
};

template <typename Element>
void test(const Case& c, const std::string& name) {
  for (const bool channels_last : {false, true}) {
    const Problem<Element> problem(c, channels_last);
    host_set_seed(3);
    host_set_device_attribute(cudaDevAttrMultiProcessorCount, 1);
    host_set_device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, c.shared_kilobytes * 1024);
    problem.test(name + (channels_last ? ", channels last" : ", contiguous"));
  }
}

}  // namespace

int main() {
  const std::vector<std::pair<Case, std::string>> cases = {
      {{1, 20, 4, 10, 40, 99}, "vectors"},
      {{2, 19, 3, 7, 13, 99}, "odd sizes"},
      {{1, 1, 1, 1, 1, 99}, "one of all"},
      {{1, 35, 3, 45, 33, 56}, "several tiles"},
  };
  for (const auto& item : cases)
    for_element_types([&](auto element, const std::string& type) {
      test<decltype(element)>(item.first, item.second + ", " + type);
    });
  test<float>({1, 70, 1, 9, 130, 40}, "a table that does not fit, float32");
  test<__nv_bfloat16>({1, 400, 1, 5, 17, 30}, "a table that does not fit, bfloat16");
  return report("gaussian_aggregate_cuda_test");
}
