// The sum or mean of the losses and its gradient in one pass, so that each exponential is taken
// once.
//
// The lanes of a walk (cuda_walk.cuh) have all classes of a pixel between them. They go over a cell
// in columns of at most eight pixels: they take the exponentials of a column's pixels, which stay
// in registers, add them up over the lanes, and multiply them by what the sums then say. So nothing
// of the size of pixels times classes is in shared memory, and warps do not wait for each other.
//
// Exponentials are relative to the largest logit of the cell's corners, as in the forward
// (cuda_forward.cuh). Where that does not serve a pixel, the warp does the column again, with each
// pixel's own largest logit.
#pragma once

#include "upsample_cross_entropy/cuda_totals.cuh"
#include "upsample_cross_entropy/cuda_walk.cuh"

namespace mcibi_fast {

inline constexpr int kOnePassThreads = 128;  // at most, in a block
inline constexpr int kMostClassesOfLane = 6;
inline constexpr int kSide = 8;  // pixels of a walk at a time, in both directions
inline constexpr int kHalf = kSide / 2;
inline constexpr float kNoLogit = -1e30f;  // of classes after the last

struct OnePassInput {
  const void* logits;
  FloatKind kind;
  MapStrides strides;
  int classes;
  BilinearAxis<float> y_axis, x_axis;
  const int16_t* targets;  // (B, H, W): the class, or -1
  const Divisor* divisor;
  const float* weight;  // (K,) or null
  float smoothing;
  TilePlan plan;   // with one group and at least kSide lanes
  float* sums;     // see write_tile_sums
  double* losses;  // of the blocks

  __device__ float class_weight(int k) const { return weight == nullptr ? 1.0f : weight[k]; }
};

// What the lanes of a walk share of kSide x kSide pixels, [column][row], or of one column of them.
struct alignas(16) WalkPixels {
  int label[kSide * kSide];     // -1: the pixel does not count
  float hard[kSide * kSide];    // (1 - s) w_y
  float sum[kSide * kSide];     // of exponentials
  float chosen[kSide * kSide];  // the label's logit less the pixel's bound
  float below[kSide * kSide];   // sum_k w_k (bound - l_k), with smoothing
  float far[kSide];             // weights of the lower row
  float right[kSide];           // weights of the right column
  // d l_k = scale (e_k - share [k = y] - spread w_k), of the pixels of one column
  float scale[kSide], far_scale[kSide], share[kSide], spread[kSide];
};

// Folds the values of a column's rows over the lanes of a walk; returns that of row lane % kSide.
template <typename Fold>
__device__ __forceinline__ float over_lanes(float (&values)[kSide], int lane, int lanes,
                                            const Fold& fold) {
#pragma unroll
  for (int half = kHalf; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const float sent = upper ? values[r] : values[r + half];
      const float kept = upper ? values[r + half] : values[r];
      values[r] = fold(kept, __shfl_xor_sync(kFullWarp, sent, half));
    }
  }
  float value = values[0];
#pragma unroll
  for (int mask = kSide; mask < 32; mask *= 2)
    if (mask < lanes) value = fold(value, __shfl_xor_sync(kFullWarp, value, mask));
  return value;
}

// Calls f(r) for the rows 0 .. rows - 1, and possibly for some more.
template <typename F>
__device__ __forceinline__ void for_rows(int rows, const F& f) {
#pragma unroll
  for (int r = 0; r < kHalf; ++r) f(r);
  if (rows <= kHalf) return;
#pragma unroll
  for (int r = kHalf; r < kSide; ++r) f(r);
}

template <int kClasses, bool kSmooth>
class OnePassWalk : public CellWalk<OnePassWalk<kClasses, kSmooth>, float, kClasses> {
 public:
  using Base = CellWalk<OnePassWalk, float, kClasses>;

  __device__ OnePassWalk(const OnePassInput& input, const TilePlace& place, int walk, int lane,
                         WalkPixels& pixels)
      : Base(input.plan.lanes, lane, place.cell_y, input.y_axis.in_size,
             input.y_axis.in_size == input.y_axis.out_size),
        input_(input),
        pixels_(pixels),
        lanes_log2_(31 - __clz(input.plan.lanes)),
        unit_(static_cast<float>(input.divisor->inverse)) {
    const int x = place.cell_x + walk, last = input.x_axis.in_size - 1;
    one_column_ = x >= last || input.x_axis.in_size == input.x_axis.out_size;
    offset_ = place.b * input.strides.batch + min(x, last) * input.strides.column;
    right_ = one_column_ ? 0 : input.strides.column;
    targets_ = input.targets + static_cast<int64_t>(place.b) * input.y_axis.out_size *
                                   input.x_axis.out_size;
    if constexpr (kSmooth) {
      spread_ = input.smoothing / static_cast<float>(input.classes);
      for (int k = 0; k < input.classes; ++k) weight_sum_ += input.class_weight(k);
#pragma unroll
      for (int j = 0; j < kClasses; ++j)
        weights_[j] = is_class(j) ? input.class_weight(class_at(j)) : 0.0f;
    }
  }

  // Goes down the walk; returns the losses of the pixels whose turn was this lane's. Called by all
  // lanes of a warp, for the most columns of pixels, `widest`, that a walk of the warp has.
  __device__ __forceinline__ float run(const CellBegins& begins, int widest, int x_begin,
                                       int x_end, const WalkSums<float>& sums) {
    float losses = 0.0f;
    start();
    for (int cell = 0; cell < input_.plan.cells; ++cell) {
      find_bound();
      for (int y = begins.y[cell]; y < begins.y[cell + 1]; y += kSide)
        for (int column = 0; column < widest; column += kSide)
          losses += add_pixels(y, min(kSide, begins.y[cell + 1] - y), x_begin + column,
                               x_end - x_begin - column, min(kSide, widest - column));
      next_cell(false, sums);
    }
    store_upper(false, sums);
    return losses;
  }

 private:
  friend Base;
  using Base::add_column_sums;
  using Base::corners_;
  using Base::lane_;
  using Base::lanes_;
  using Base::next_cell;
  using Base::one_column_;
  using Base::one_row_;
  using Base::start;
  using Base::store_upper;

  // The exponentials of one column's pixels, [class][row].
  using Column = float[kClasses][kSide];
  // What is done again of a pixel whose exponentials do not serve: nothing, all, or they become 0,
  // as the pixel does not count.
  enum Again { kNot, kOwnLargest, kNothingOfIt };
  // A class's logits, scaled and relative to the bound: where the weight of the lower row is 0, and
  // how they change with it.
  struct Slope {
    float at, by;
  };

  __device__ __forceinline__ int class_at(int j) const { return lane_ + j * lanes_; }
  __device__ __forceinline__ bool is_class(int j) const { return class_at(j) < input_.classes; }

  __device__ __forceinline__ typename Base::Row row_at(int j, int y) const {
    if (!is_class(j)) return {kNoLogit, kNoLogit};
    const int64_t at =
        offset_ + class_at(j) * input_.strides.channel + y * input_.strides.row;
    if (input_.kind == FloatKind::kFloat32) return pair_at<float>(at);
    if (input_.kind == FloatKind::kFloat16) return pair_at<__half>(at);
    return pair_at<__nv_bfloat16>(at);
  }
  template <typename Element>
  __device__ __forceinline__ typename Base::Row pair_at(int64_t at) const {
    const auto* logits = static_cast<const Element*>(input_.logits);
    return {widen(logits[at]), widen(logits[at + right_])};
  }

  // The largest logit of the cell's corners.
  __device__ __forceinline__ void find_bound() {
    bound_ = kNothing<float>;
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      const auto& c = corners_[j];
      if (!is_class(j)) continue;
      bound_ = maximum(bound_, maximum(c.upper.left, c.upper.right));
      if (!one_row_) bound_ = maximum(bound_, maximum(c.lower.left, c.lower.right));
    }
    for (int mask = 1; mask < lanes_; mask *= 2)
      bound_ = maximum(bound_, __shfl_xor_sync(kFullWarp, bound_, mask));
  }

  // Of the pixels in rows y .. y + rows - 1 and `columns` columns from x on, of which this walk has
  // `own`, possibly fewer than another of the warp, or none.
  __device__ __forceinline__ float add_pixels(int y, int rows, int x, int own, int columns) {
    __syncwarp();  // the pixels before have been used
    fill(y, rows, x, own);
    __syncwarp();  // these pixels are loaded
    for (int column = 0; column < columns; ++column) add_column(column, rows);
    __syncwarp();  // sums and chosen logits are known
    float losses = 0.0f;
    for (int i = lane_; i < kSide * kSide; i += lanes_) losses += loss_of(i);
    return losses;
  }

  __device__ __forceinline__ void fill(int y, int rows, int x, int own) {
    for (int i = lane_; i < kSide * kSide; i += lanes_) {
      const int row = i / kSide, column = i % kSide;
      int label = -1;
      float hard = 0.0f;
      if (row < rows && column < own) {
        label = targets_[static_cast<int64_t>(y + row) * input_.x_axis.out_size + x + column];
        if (label >= 0) hard = (1.0f - input_.smoothing) * input_.class_weight(label);
      }
      pixels_.label[column * kSide + row] = label;
      pixels_.hard[column * kSide + row] = hard;
    }
    if (lane_ >= kSide) return;
    // Rows and columns that are not there repeat the last one.
    pixels_.far[lane_] = far_weight(input_.y_axis, y + min(lane_, rows - 1));
    const int last = min(x + own, input_.x_axis.out_size) - 1;
    pixels_.right[lane_] = far_weight(input_.x_axis, max(min(x + lane_, last), 0));
  }

  __device__ __forceinline__ float loss_of(int i) const {
    if (pixels_.label[i] < 0) return 0.0f;
    const float log_sum = logf(pixels_.sum[i]);
    float loss = pixels_.hard[i] * (log_sum - pixels_.chosen[i]);
    if constexpr (kSmooth) loss += spread_ * (weight_sum_ * log_sum + pixels_.below[i]);
    return loss;
  }

  // ---- one column of pixels ---------------------------------------------------------------------

  __device__ __forceinline__ void add_column(int column, int rows) {
    const int row = lane_ % kSide, pixel = column * kSide + row;
    const int label = pixels_.label[pixel];
    // Which of the lanes' classes, as bits, the labels of the warp's columns are.
    const unsigned slots =
        __reduce_or_sync(kFullWarp, label < 0 ? 0u : 1u << (label >> lanes_log2_));
    if (slots == 0) return;
    const float right = pixels_.right[column], scaled_bound = bound_ * kLog2E<float>;
    Column powers;
    float below = 0.0f;
    float sum = take_exponentials(right, scaled_bound, rows, powers, below);
    // A sum this small may lack terms that were too small for float32, and the only class has the
    // loss 0 without any rounding.
    const bool finite = sum - sum == 0.0f;
    const bool serves = finite && sum > 1e-12f && scales_rows(bound_) && input_.classes > 1;
    const Again again = label < 0 ? (finite ? kNot : kNothingOfIt) : serves ? kNot : kOwnLargest;
    float largest = 0.0f;
    const bool any = __any_sync(kFullWarp, again != kNot);
    if (any) sum = take_again(right, again, powers, largest, below);
    share_scales(pixel, sum, below);
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      if ((slots >> j & 1) == 0) continue;
      take_labels(j, column, right, scaled_bound, powers);
      if (any) choose_again(j, column, right, again, largest);
    }
    add_to_sums(rows, right, powers);
  }

  __device__ __forceinline__ Slope slope_of(int j, float right, float scaled_bound) const {
    const auto& c = corners_[j];
    const float row0 = between(c.upper.left, c.upper.right, right);
    const float row1 = one_row_ ? row0 : between(c.lower.left, c.lower.right, right);
    const float at = fused_multiply_add(row0, kLog2E<float>, -scaled_bound);
    return {at, fused_multiply_add(row1, kLog2E<float>, -scaled_bound) - at};
  }

  // Returns the sum of the row that this lane serves.
  __device__ __forceinline__ float take_exponentials(float right, float scaled_bound, int rows,
                                                     Column& powers, float& below) {
    float sums[kSide] = {}, belows[kSide] = {};
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      const Slope slope = slope_of(j, right, scaled_bound);
#pragma unroll
      for (int r = kHalf; r < kSide; ++r) powers[j][r] = 0.0f;
      for_rows(rows, [&](int r) {
        const float exponent = fused_multiply_add(pixels_.far[r], slope.by, slope.at);
        powers[j][r] = exp2_fast(exponent);
        sums[r] += powers[j][r];
        if constexpr (kSmooth)
          belows[r] = fused_multiply_add(-weights_[j], exponent, belows[r]);
      });
    }
    if constexpr (kSmooth) below = over_lanes(belows, lane_, lanes_, Add()) * kLn2<float>;
    return over_lanes(sums, lane_, lanes_, Add());
  }

  // The same relative to the pixels' own largest logits, where they are taken again.
  __device__ __forceinline__ float take_again(float right, Again again, Column& powers,
                                              float& largest, float& below) {
    float folded[kSide], belows[kSide] = {};
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
      folded[r] = kNothing<float>;
#pragma unroll
      for (int j = 0; j < kClasses; ++j)
        if (is_class(j)) folded[r] = maximum(folded[r], logit_at(j, r, right));
    }
    largest = over_lanes(folded, lane_, lanes_, Maximum());
    // Where no logit is above -inf the sum is 0, or NaN.
    if (largest == kNothing<float>) largest = 0.0f;
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
      const float bound = of_row(largest, r);
      const Again of_pixel = of_row(again, r);
      folded[r] = 0.0f;
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {
        const float relative = logit_at(j, r, right) - bound;
        if (of_pixel == kNothingOfIt) powers[j][r] = 0.0f;
        if (of_pixel == kOwnLargest) powers[j][r] = is_class(j) ? exponential(relative) : 0.0f;
        folded[r] += powers[j][r];
        if constexpr (kSmooth)
          if (is_class(j)) belows[r] = fused_multiply_add(-weights_[j], relative, belows[r]);
      }
    }
    if constexpr (kSmooth) {
      const float own = over_lanes(belows, lane_, lanes_, Add());
      if (again == kOwnLargest) below = own;
    }
    return over_lanes(folded, lane_, lanes_, Add());
  }

  __device__ __forceinline__ float logit_at(int j, int r, float right) const {
    const auto& c = corners_[j];
    const float row0 = between(c.upper.left, c.upper.right, right);
    const float row1 = one_row_ ? row0 : between(c.lower.left, c.lower.right, right);
    return between(row0, row1, pixels_.far[r]);
  }

  // What the lane that serves row r has.
  template <typename Value>
  __device__ __forceinline__ Value of_row(Value value, int r) const {
    return __shfl_sync(kFullWarp, value, r, kSide);
  }

  // Stores what the gradient of this lane's pixel needs, if the lane is the first for its row.
  __device__ __forceinline__ void share_scales(int pixel, float sum, float below) {
    __syncwarp();  // the column before has been added
    if (lane_ < kSide) {
      const bool counts = pixels_.label[pixel] >= 0;
      const float hard = pixels_.hard[pixel], whole = hard + spread_ * weight_sum_;
      const float scale = counts ? __fdividef(unit_ * whole, sum) : 0.0f;
      pixels_.sum[pixel] = sum;
      pixels_.scale[lane_] = scale;
      pixels_.far_scale[lane_] = pixels_.far[lane_] * scale;
      if constexpr (kSmooth) {
        const float ratio = counts && whole != 0.0f ? __fdividef(sum, whole) : 0.0f;
        pixels_.below[pixel] = below;
        pixels_.spread[lane_] = spread_ * ratio;
        pixels_.share[lane_] = hard * ratio;
      } else {
        pixels_.share[lane_] = sum;
      }
    }
    __syncwarp();  // the scales of this column are known
  }

  // Takes the pixels' share from the exponentials of class j where it is their label, and stores
  // its logit for the loss.
  __device__ __forceinline__ void take_labels(int j, int column, float right, float scaled_bound,
                                              Column& powers) {
    const Slope slope = slope_of(j, right, scaled_bound);
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
      if (pixels_.label[column * kSide + r] != class_at(j)) continue;
      const float exponent = fused_multiply_add(pixels_.far[r], slope.by, slope.at);
      pixels_.chosen[column * kSide + r] = exponent * kLn2<float>;
      powers[j][r] -= pixels_.share[r];
    }
  }

  // Replaces the logits that are relative to another bound.
  __device__ __forceinline__ void choose_again(int j, int column, float right, Again again,
                                               float largest) {
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
      const float bound = of_row(largest, r);
      const bool own = of_row(again, r) == kOwnLargest;
      if (own && pixels_.label[column * kSide + r] == class_at(j))
        pixels_.chosen[column * kSide + r] = logit_at(j, r, right) - bound;
    }
  }

  __device__ __forceinline__ void add_to_sums(int rows, float right, const Column& powers) {
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      float both = 0.0f, far = 0.0f;
      for_rows(rows, [&](int r) {
        float power = powers[j][r];
        if constexpr (kSmooth) power = fused_multiply_add(-pixels_.spread[r], weights_[j], power);
        both = fused_multiply_add(pixels_.scale[r], power, both);
        far = fused_multiply_add(pixels_.far_scale[r], power, far);
      });
      add_column_sums(j, both, far, right);
    }
  }

  struct Add {
    __device__ float operator()(float a, float b) const { return a + b; }
  };
  struct Maximum {
    __device__ float operator()(float a, float b) const { return maximum(a, b); }
  };

  const OnePassInput& input_;
  WalkPixels& pixels_;
  int lanes_log2_;
  float unit_;  // the gradient of each loss
  int64_t offset_, right_;
  const int16_t* targets_;
  float bound_ = 0.0f;
  // With smoothing: s/K, sum_k w_k and w_k.
  float spread_ = 0.0f, weight_sum_ = 0.0f, weights_[kSmooth ? kClasses : 1] = {};
};

// Grid: one block for each tile.
template <int kClasses, bool kSmooth>
__global__ void __launch_bounds__(kOnePassThreads, kClasses < kMostClassesOfLane ? 4 : 3)
    cross_entropy_one_pass_kernel(OnePassInput input) {
  const TilePlan& plan = input.plan;
  MCIBI_SHARED(begins, CellBegins);
  MCIBI_DYNAMIC_SHARED(bytes);
  auto* pixels = reinterpret_cast<WalkPixels*>(bytes);
  auto* sums = reinterpret_cast<float*>(pixels + plan.walks);

  const int thread = static_cast<int>(threadIdx.x);
  const TilePlace place(plan, static_cast<int>(blockIdx.x));
  begins.find(input.y_axis, input.x_axis, plan, place);
  __syncthreads();  // the cells' first pixels are known
  const int walk = thread / plan.lanes, rows = plan.cells + 1, width = kClasses * plan.lanes;
  const int x_begin = begins.x[walk], x_end = begins.x[walk + 1];
  const int widest = __reduce_max_sync(kFullWarp, x_end - x_begin);
  OnePassWalk<kClasses, kSmooth> path(input, place, walk, thread % plan.lanes, pixels[walk]);
  const WalkSums<float> own = {sums + 2 * walk * rows * width, rows, width};
  const float losses = path.run(begins, widest, x_begin, x_end, own);
  const double total = block_sum<kOnePassThreads>(losses);  // with a barrier: all walks have ended
  if (thread == 0) input.losses[blockIdx.x] = total;
  write_tile_sums(input, place, kClasses, sums);
}

}  // namespace mcibi_fast
