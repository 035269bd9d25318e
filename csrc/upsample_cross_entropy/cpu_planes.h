// The same as cpu_losses.h and cpu_gradient.h on planes (common/planes.h): one vector has the same
// class of neighbouring pixels, where the others have neighbouring classes of one pixel.
#pragma once

#include <algorithm>
#include <vector>

#include "common/label_rows.h"
#include "common/planes.h"
#include "upsample_cross_entropy/cpu_block.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

template <typename C>
class PlanarLossRow {
 public:
  static constexpr int64_t kPixels = kLanes<C>;

  PlanarLossRow(const ClassWeights<C>& weights, const std::vector<BilinearTap<C>>& taps,
                int64_t classes, int64_t stride)
      : weights_(weights),
        taps_(taps),
        classes_(classes),
        stride_(stride),
        width_(static_cast<int64_t>(taps.size())),
        block_(classes * kPixels * static_cast<int64_t>(sizeof(C))) {}

  // 0 where a pixel is ignored.
  void run(const C* planes, const int32_t* labels, C* losses, C* lse) {
    for (int64_t x = 0; x < width_; x += kPixels) {
      run_block<false>(planes, labels, x, losses, lse);
    }
  }

  // The same for a vector of pixels. If `kKeep`, block() then holds e_k = exp(l_k - largest),
  // [K][kPixels], and sums() their sums, unless all of the pixels are ignored (false).
  template <bool kKeep>
  bool run_block(const C* planes, const int32_t* labels, int64_t x, C* losses, C* lse) {
    const int64_t count = std::min(width_ - x, kPixels);
    C valid[kPixels] = {}, of_label[kPixels] = {}, hard[kPixels] = {};
    bool any = false;
    for (int64_t p = 0; p < count; ++p) any |= labels[x + p] != kIgnored;
    Vector<C> loss = {}, log_sum_exp = {};
    if (any) {
      const Vector<C> largest = interpolate_block(planes, x);
      const C* block = block_.template as<C>();
      for (int64_t p = 0; p < count; ++p) {
        const int32_t label = labels[x + p];
        if (label == kIgnored) continue;
        valid[p] = C(1), of_label[p] = block[label * kPixels + p], hard[p] = weights_.hard(label);
      }
      const Vector<C> smoothed = weights_.smoothing != C(0) ? below(largest) : Vector<C>{};
      sums_ = sum_exp<kKeep>(largest);
      const Vector<C> log_sum = log_of(sums_);
      loss = load(hard) * (largest - load(of_label) + log_sum);
      if (weights_.smoothing != C(0)) {
        loss += weights_.smoothing_per_class * smoothed + weights_.soft() * log_sum;
      }
      const auto is_valid = load(valid) != C(0);
      loss = is_valid ? loss : Vector<C>{};
      log_sum_exp = is_valid ? largest + log_sum : Vector<C>{};
    }
    store_up_to(losses + x, loss, count);
    store_up_to(lse + x, log_sum_exp, count);
    return any;
  }

  const C* block() const { return block_.template as<C>(); }
  Vector<C> sums() const { return sums_; }

 private:
  // Writes the logits of a vector of pixels and returns the largest of each.
  Vector<C> interpolate_block(const C* planes, int64_t x) {
    Vector<C> largest = Vector<C>{} - std::numeric_limits<C>::infinity();
    C* block = block_.template as<C>();
    for (int64_t k = 0; k < classes_; ++k) {
      const Vector<C> logits = taps_.at(planes + k * stride_, x);
      store(block + k * kPixels, logits);
      largest = maximum(logits, largest);
    }
    return largest;
  }

  template <bool kKeep>
  Vector<C> sum_exp(Vector<C> largest) {
    C* block = block_.template as<C>();
    Vector<C> sum = {};
    for (int64_t k = 0; k < classes_; ++k) {
      const Vector<C> e = exp_of(load(block + k * kPixels) - largest);
      sum += e;
      if (kKeep) store(block + k * kPixels, e);
    }
    return sum;
  }

  // sum_k w_k (largest - l_k)
  Vector<C> below(Vector<C> largest) const {
    const C* block = block_.template as<C>();
    Vector<C> sum = {};
    for (int64_t k = 0; k < classes_; ++k) {
      sum += weights_.of_class[k] * (largest - load(block + k * kPixels));
    }
    return sum;
  }

  const ClassWeights<C>& weights_;
  PlaneTaps<C> taps_;
  int64_t classes_, stride_, width_;
  Scratch block_;
  Vector<C> sums_ = {};
};

// Losses and gradients of one output row; source rows are planes, [K][pitch].
template <typename S>
class PlanarGradientRow {
 public:
  using C = Compute<S>;

  PlanarGradientRow(const ClassWeights<C>& weights, const LogitMap& logits,
                    const std::vector<BilinearTap<C>>& taps)
      : weights_(weights),
        classes_(logits.classes),
        width_(static_cast<int64_t>(taps.size())),
        pitch_(class_stride<C>(logits.width)),
        source_(logits),
        losses_(weights, taps, logits.classes, source_.stride()),
        adjoint_(taps, logits.width),
        grad_pitch_(class_stride<C>(width_) + adjoint_.padding()),
        grads_(classes_ * grad_pitch_ * static_cast<int64_t>(sizeof(C))) {
    std::fill(grads_.template as<C>(), grads_.template as<C>() + classes_ * grad_pitch_, C(0));
  }

  static int64_t size(const LogitMap& logits) {
    return logits.classes * class_stride<C>(logits.width);
  }

  // Writes the losses of an output row, and adds the gradient of their sum, each times its
  // cotangent, to the two source rows that it is between.
  void run(int64_t image, const BilinearTap<C>& tap, const int32_t* labels, const C* cotangent,
           C* losses, C* lse, C* row0, C* row1) {
    const C* planes = source_.between(image, tap);
    bool any = false;
    for (int64_t x = 0; x < width_; x += kPixels) {
      const bool counts = losses_.template run_block<true>(planes, labels, x, losses, lse);
      gradients(counts, labels, cotangent, x);
      any |= counts;
    }
    if (!any) return;
    const C* grads = grads_.template as<C>();
    for (int64_t k = 0; k < classes_; ++k) {
      for (int64_t x = 0; x < pitch_; x += kPixels) {
        const Vector<C> g = adjoint_.at(grads + k * grad_pitch_, x);
        const int64_t i = k * pitch_ + x;
        store(row0 + i, load(row0 + i) + tap.weight0 * g);
        store(row1 + i, load(row1 + i) + tap.weight1 * g);
      }
    }
  }

  // Writes a source row to row `out` of a map.
  template <typename T>
  static void write(const C* row, const LogitMap& grad, T* out) {
    const int64_t pitch = class_stride<C>(grad.width), step = grad.strides.column;
    for (int64_t k = 0; k < grad.classes; ++k) {
      T* plane = out + k * grad.strides.channel;
      for (int64_t x = 0; x < grad.width; x += kPixels) {
        const int64_t count = std::min(grad.width - x, kPixels);
        const Vector<C> v = load(row + k * pitch + x);
        if (step == 1) {
          store_up_to(plane + x, v, count);
          continue;
        }
        T lanes[kPixels];
        store(lanes, v);
        for (int64_t i = 0; i < count; ++i) plane[(x + i) * step] = lanes[i];
      }
    }
  }

 private:
  static constexpr int64_t kPixels = kLanes<C>;

  // The gradients of a vector of pixels: a / S (t e_k - S t_k), with e and S of PlanarLossRow, t_k
  // the smoothed target, t its sum and a the cotangent.
  void gradients(bool counts, const int32_t* labels, const C* cotangent, int64_t x) {
    C* grads = grads_.template as<C>() + x;
    if (!counts) {
      for (int64_t k = 0; k < classes_; ++k) store(grads + k * grad_pitch_, Vector<C>{});
      return;
    }
    C label[kPixels], hard[kPixels] = {}, scale[kPixels] = {};
    std::fill(label, label + kPixels, C(-1));
    for (int64_t p = 0; p < std::min(width_ - x, kPixels); ++p) {
      if (labels[x + p] == kIgnored) continue;
      label[p] = static_cast<C>(labels[x + p]);  // float holds whole numbers below 2^24
      hard[p] = weights_.hard(labels[x + p]);
      scale[p] = cotangent[x + p];
    }
    const Vector<C> labels_of = load(label), hards = load(hard), sums = losses_.sums();
    const Vector<C> target_sum = hards + weights_.soft(), scales = load(scale) / sums;
    const auto valid = labels_of >= C(0);
    for (int64_t k = 0; k < classes_; ++k) {
      const C soft = weights_.smoothing_per_class * weights_.of_class[k];
      const Vector<C> target = (labels_of == static_cast<C>(k) ? hards : Vector<C>{}) + soft;
      const Vector<C> e = load(losses_.block() + k * kPixels);
      const Vector<C> g = scales * (target_sum * e - sums * target);
      store(grads + k * grad_pitch_, valid ? g : Vector<C>{});
    }
  }

  const ClassWeights<C>& weights_;
  int64_t classes_, width_, pitch_;
  SourcePlanes<S> source_;
  PlanarLossRow<C> losses_;
  PlaneAdjoint<C> adjoint_;
  int64_t grad_pitch_;
  Scratch grads_;
};

}  // namespace
}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
