// Tests the CUDA kernels of upsample_argmax and upsample_confusion with every element type and both
// layouts, and sizes with tails, against logits interpolated pixel by pixel. Exit status 1 on
// failure.
#include "testing/kernel_test.h"

// after the dialect
#include "upsample_argmax/cuda.cu"

namespace {

using namespace mcibi_fast;

struct Case {
  int batch, classes, height, width, label_height, label_width;
  bool align_corners, channels_last;
};

template <typename Element>
struct Problem {
  using T = Compute<Element>;
  Case c;
  std::vector<Element> logits;
  std::vector<uint8_t> labels;
  LogitMap map;
  LabelMap label_map;
  std::vector<int64_t> prediction, confusion;  // expected
  int bad = 0;

  explicit Problem(const Case& size) : c(size) {
    std::mt19937 bits(3);
    logits.resize(size_t(c.batch) * c.classes * c.height * c.width);
    // Small integers and scales that are powers of two: exact in any order of operations, and ties.
    for (Element& x : logits) x = Element(float(int(bits() % 8) - 4));
    map = {logits.data(),
           kKind<Element>,
           c.batch,
           c.classes,
           c.height,
           c.width,
           strides_of(c.classes, c.height, c.width, c.channels_last)};
    labels.resize(size_t(c.batch) * c.label_height * c.label_width);
    bad = draw_labels(labels, c.classes, uint8_t(255), uint8_t(200), bits);
    label_map = label_map_of(labels, LabelKind::kUInt8, c.label_height, c.label_width, c.classes,
                             uint8_t(255));
    expected();
  }

  T at(int b, int k, int y, int x) const {
    const MapStrides& s = map.strides;
    return widen(logits[size_t(b * s.batch + k * s.channel + y * s.row + x * s.column)]);
  }

  void expected() {
    const auto axis_y = make_bilinear_axis<T>(c.height, c.label_height, c.align_corners);
    const auto axis_x = make_bilinear_axis<T>(c.width, c.label_width, c.align_corners);
    confusion.resize(size_t(c.classes) * c.classes);
    for (int b = 0; b < c.batch; ++b)
      for (int y = 0; y < c.label_height; ++y)
        for (int x = 0; x < c.label_width; ++x) {
          const auto ty = bilinear_tap(axis_y, y);
          const auto tx = bilinear_tap(axis_x, x);
          int best = 0;
          T largest = -INFINITY;
          for (int k = 0; k < c.classes; ++k) {
            const T value = ty.weight0 * (tx.weight0 * at(b, k, ty.index0, tx.index0) +
                                          tx.weight1 * at(b, k, ty.index0, tx.index1)) +
                            ty.weight1 * (tx.weight0 * at(b, k, ty.index1, tx.index0) +
                                          tx.weight1 * at(b, k, ty.index1, tx.index1));
            if (value > largest) best = k;
            if (value > largest) largest = value;
          }
          const int label = labels[prediction.size()];
          prediction.push_back(best);
          if (label < c.classes) ++confusion[size_t(label * c.classes + best)];
        }
  }
};

template <typename Element>
void test(const Case& c, const std::string& name) {
  const Problem<Element> problem(c);
  for (const int seed : {0, 1, 2, 3}) {
    host_set_seed(uint64_t(seed));
    std::vector<int64_t> prediction(problem.prediction.size(), -7);
    const char* error = upsample_argmax_cuda(problem.map, c.label_height, c.label_width,
                                             c.align_corners, prediction.data(), nullptr);
    expect_success(error, name);
    expect(prediction == problem.prediction, name + ": predictions");

    int64_t flag[3] = {};
    std::vector<int64_t> confusion(problem.confusion.size(), -7);
    error = upsample_confusion_cuda(problem.map, problem.label_map, c.align_corners,
                                    confusion.data(), {flag, 4}, nullptr);
    expect_success(error, name);
    expect(confusion == problem.confusion, name + ": counts");
    expect(flag[0] == problem.bad && (problem.bad == 0 || (flag[1] == 200 && flag[2] == 4)),
           name + ": bad labels are counted");
  }
}

}  // namespace

int main() {
  const std::vector<std::pair<Case, std::string>> cases = {
      {{2, 19, 3, 9, 24, 72, false, false}, "8x, tails of tiles"},
      {{1, 33, 5, 3, 33, 17, true, true}, "channels_last, align_corners"},
      {{1, 130, 2, 17, 8, 68, false, false}, "several patches"},
      {{1, 3, 3, 67, 3, 67, false, true}, "labels of the same size"},
      {{2, 2, 20, 32, 10, 8, false, false}, "labels smaller than the logits"},
      {{1, 1, 1, 1, 40, 37, true, false}, "one class, one low-resolution pixel"},
      {{1, 2, 16, 64, 64, 256, false, false}, "several tiles to a block"},
  };
  for (const auto& item : cases)
    for_element_types([&](auto element, const std::string& type) {
      test<decltype(element)>(item.first, item.second + ", " + type);
    });
  return report("upsample_argmax_cuda_test");
}
