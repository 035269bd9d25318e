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

#include "upsample_cross_entropy/cuda_one_pass_pixels.cuh"

namespace mcibi_fast {

inline constexpr int kOnePassThreads = 128;  // at most, in a block
inline constexpr int kMostClassesOfLane = 6;
inline constexpr float kNoLogit = -1e30f;  // of classes after the last

template <int kClasses, bool kSmooth>
class OnePassWalk : public CellWalk<OnePassWalk<kClasses, kSmooth>, float, kClasses> {
 public:
  using Base = CellWalk<OnePassWalk, float, kClasses>;

  __device__ OnePassWalk(const OnePassInput& input, const TilePlace& place, int walk, int lane,
                         WalkPixels& pixels)
      : Base(input.plan.lanes, lane, place.cell_y, input.y_axis.in_size, false),
        input_(input),
        pixels_(pixels),
        b_(place.b),
        x_(min(place.cell_x + walk, input.x_axis.in_size - 1)),
        unit_(static_cast<float>(input.divisor->inverse)) {
    // Not above: nvcc hands initialisers to the host's compiler, which knows no __clz.
    lanes_log2_ = 31 - __clz(input.plan.lanes);
    one_column_ = x_ == input.x_axis.in_size - 1;
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
  __device__ __forceinline__ float run(const CellBegins& begins, int widest, int x_begin, int x_end,
                                       const WalkSums<float>& sums) {
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
  using Base::start;
  using Base::store_upper;

  // The exponentials of one column's pixels, [class][row].
  using Column = float[kClasses][kSide];
  // What is done about the exponentials of a pixel: nothing; they are taken again; or they become
  // 0, because the pixel does not count.
  static constexpr int kServe = 0, kAgain = 1, kZero = 2;
  struct Scales {
    float scale, share, spread;  // see ColumnScales
  };
  // A class's logits, scaled and relative to the bound: where the weight of the lower row is 0, and
  // how they change with it.
  struct Slope {
    float at, by;
  };

  __device__ __forceinline__ int class_at(int j) const { return lane_ + j * lanes_; }
  __device__ __forceinline__ bool is_class(int j) const { return class_at(j) < input_.classes; }

  __device__ __forceinline__ void read_row(int y, typename Base::Row (&rows)[kClasses]) const {
    if (input_.kind == FloatKind::kFloat32)
      read_row_of<float>(y, rows);
    else if (input_.kind == FloatKind::kFloat16)
      read_row_of<__half>(y, rows);
    else
      read_row_of<__nv_bfloat16>(y, rows);
  }
  template <typename Element>
  __device__ __forceinline__ void read_row_of(int y, typename Base::Row (&rows)[kClasses]) const {
    const MapStrides& strides = input_.strides;
    const Element* at = static_cast<const Element*>(input_.logits) + opaque(b_) * strides.batch +
                        y * strides.row + opaque(x_) * strides.column + lane_ * strides.channel;
    const int64_t right = one_column_ ? 0 : strides.column, step = lanes_ * strides.channel;
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      rows[j] = {kNoLogit, kNoLogit};
      if (is_class(j)) rows[j] = {widen(at[j * step]), widen(at[j * step + right])};
    }
  }

  // The largest logit of the cell's corners.
  __device__ __forceinline__ void find_bound() {
    bound_ = kNothing<float>;
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      const auto& c = corners_[j];
      if (!is_class(j)) continue;
      bound_ = maximum(bound_, maximum(maximum(c.upper.left, c.upper.right),
                                       maximum(c.lower.left, c.lower.right)));
    }
    bound_ = over_lanes(bound_, lanes_, Maximum());
  }

  // Of the pixels in rows y .. y + rows - 1 and `columns` columns from x on, of which this walk has
  // `own`, possibly fewer than another of the warp, or none.
  __device__ __forceinline__ float add_pixels(int y, int rows, int x, int own, int columns) {
    pixels_.fill(input_, lane_, b_, {y, x, rows, own}, columns);
    __syncwarp();  // these pixels are loaded
    for (int column = 0; column < columns; ++column) add_column(column, rows);
    __syncwarp();  // sums and chosen logits are known, and the pixels have been used
    float losses = 0.0f;
    for (int i = lane_; i < kSide * columns; i += lanes_)
      losses += pixels_.loss<kSmooth>(i, spread_, weight_sum_);
    return losses;
  }

  // ---- one column of pixels ---------------------------------------------------------------------

  __device__ __forceinline__ void add_column(int column, int rows) {
    const int pixel = column * kSide + lane_ % kSide, label = pixels_.label[pixel];
    const float right = pixels_.right[column];
    // Which of the lanes' classes, as bits, the labels of the warp's columns are.
    const unsigned slots =
        __reduce_or_sync(kFullWarp, label < 0 ? 0u : 1u << (label >> lanes_log2_));
    if (slots == 0) return;
    Slope slopes[kClasses];
#pragma unroll
    for (int j = 0; j < kClasses; ++j) slopes[j] = slope_of(j, right);
    Column powers;
    float below = 0.0f;
    const float sum = take_exponentials(slopes, rows, powers, below);
    const int again = done_again(label, sum);
    if (__any_sync(kFullWarp, again != kServe)) {
      add_column_again(column, rows, right, again);
      return;
    }
    turn_ ^= 1;
    ColumnScales& scales = pixels_.columns[turn_];
    share_scales(pixel, sum, below, scales);
    __syncwarp();  // the scales of this column are known
#pragma unroll
    for (int j = 0; j < kClasses; ++j)
      if ((slots >> j & 1) != 0) take_labels(j, column, slopes[j], scales, powers);
    add_to_sums(rows, right, scales, powers);
  }

  __device__ __forceinline__ Slope slope_of(int j, float right) const {
    const float scaled_bound = bound_ * kLog2E<float>;
    const auto& c = corners_[j];
    const float row0 = between(c.upper.left, c.upper.right, right);
    const float row1 = between(c.lower.left, c.lower.right, right);
    const float at = fused_multiply_add(row0, kLog2E<float>, -scaled_bound);
    return {at, fused_multiply_add(row1, kLog2E<float>, -scaled_bound) - at};
  }
  // The logarithm to base 2 of the exponential.
  __device__ __forceinline__ float exponent(const Slope& slope, int r) const {
    return fused_multiply_add(pixels_.far[r], slope.by, slope.at);
  }

  // Returns the sum of the row that this lane serves, and likewise `below`.
  __device__ __forceinline__ float take_exponentials(const Slope (&slopes)[kClasses], int rows,
                                                     Column& powers, float& below) const {
    float sums[kSide] = {}, belows[kSide] = {};
#pragma unroll
    for (int half = 0; half < kSide; half += kHalf) {
      if (half > 0 && rows <= half) break;
#pragma unroll
      for (int j = 0; j < kClasses; ++j)
#pragma unroll
        for (int r = half; r < half + kHalf; ++r) {
          const float x = exponent(slopes[j], r);
          powers[j][r] = exp2_fast(x);
          sums[r] = j == 0 ? powers[j][r] : sums[r] + powers[j][r];
          if constexpr (kSmooth) belows[r] = fused_multiply_add(-weights_[j], x, belows[r]);
        }
    }
    if constexpr (kSmooth) below = sum_over_lanes(belows, lane_, lanes_) * kLn2<float>;
    return sum_over_lanes(sums, lane_, lanes_);
  }

  // Whether the exponentials of a pixel serve; if not, why.
  __device__ __forceinline__ int done_again(int label, float sum) const {
    const bool finite = sum - sum == 0.0f;
    if (label < 0) return finite ? kServe : kZero;
    // A sum this small may lack terms that were too small for float32, and the only class has the
    // loss 0 without any rounding.
    const bool serves = finite && sum > 1e-12f && scales_rows(bound_) && input_.classes > 1;
    return serves ? kServe : kAgain;
  }

  __device__ __forceinline__ Scales scales_of(int pixel, float sum) const {
    const float hard = pixels_.hard[pixel], whole = hard + spread_ * weight_sum_;
    const bool counts = pixels_.label[pixel] >= 0;
    const float scale = counts ? __fdividef(unit_ * whole, sum) : 0.0f;
    if constexpr (kSmooth) {
      const float ratio = counts && whole != 0.0f ? __fdividef(sum, whole) : 0.0f;
      return {scale, hard * ratio, spread_ * ratio};
    } else {
      return {scale, sum, 0.0f};
    }
  }

  // Stores what the gradient of this lane's pixel needs, if the lane is the first for its row.
  __device__ __forceinline__ void share_scales(int pixel, float sum, float below,
                                               ColumnScales& scales) {
    const Scales own = scales_of(pixel, sum);
    if (lane_ >= kSide) return;
    pixels_.sum[pixel] = sum;
    scales.scale[lane_] = own.scale;
    scales.far_scale[lane_] = pixels_.far[lane_] * own.scale;
    scales.share[lane_] = own.share;
    if constexpr (kSmooth) {
      pixels_.below[pixel] = below;
      scales.spread[lane_] = own.spread;
    }
  }

  // Takes the pixels' share from the exponentials of class j where it is their label, and stores
  // its logit for the loss.
  __device__ __forceinline__ void take_labels(int j, int column, const Slope& slope,
                                              const ColumnScales& scales, Column& powers) {
    int labels[kSide];  // read before chosen is written, together
    float shares[kSide];
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
      labels[r] = pixels_.label[column * kSide + r];
      shares[r] = scales.share[r];
    }
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
      const float x = exponent(slope, r);
      if (labels[r] != class_at(j)) continue;
      pixels_.chosen[column * kSide + r] = x;
      powers[j][r] -= shares[r];
    }
  }

  __device__ __forceinline__ void add_to_sums(int rows, float right, const ColumnScales& scales,
                                              const Column& powers) {
    float both[kClasses] = {}, far[kClasses] = {};
#pragma unroll
    for (int half = 0; half < kSide; half += kHalf) {
      if (half > 0 && rows <= half) break;
#pragma unroll
      for (int j = 0; j < kClasses; ++j)
#pragma unroll
        for (int r = half; r < half + kHalf; ++r) {
          float power = powers[j][r];
          if constexpr (kSmooth) power = fused_multiply_add(-scales.spread[r], weights_[j], power);
          both[j] = fused_multiply_add(scales.scale[r], power, both[j]);
          far[j] = fused_multiply_add(scales.far_scale[r], power, far[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < kClasses; ++j) add_column_sums(j, both[j], far[j], right);
  }

  // The whole column, row by row: a pixel that is done again relative to its own largest logit, and
  // nothing of one that does not count, whatever its logits. The others have the same bits as
  // above, so that they do not depend on their neighbours.
  __device__ __forceinline__ void add_column_again(int column, int rows, float right, int again) {
    float both[kClasses] = {}, far[kClasses] = {};
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      const int pixel = column * kSide + r, state = __shfl_sync(kFullWarp, again, r, kSide);
      float exponents[kClasses], powers[kClasses], below;
      const float sum = take_again(state, r, right, exponents, powers, below);
      const Scales scales = scales_of(pixel, sum);
      if (lane_ == 0) {
        pixels_.sum[pixel] = sum;
        pixels_.below[pixel] = below;
      }
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {
        if (pixels_.label[pixel] == class_at(j)) {
          pixels_.chosen[pixel] = exponents[j];
          powers[j] -= scales.share;
        }
        if constexpr (kSmooth)
          powers[j] = fused_multiply_add(-scales.spread, weights_[j], powers[j]);
        both[j] = fused_multiply_add(scales.scale, powers[j], both[j]);
        far[j] = fused_multiply_add(pixels_.far[r] * scales.scale, powers[j], far[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kClasses; ++j) add_column_sums(j, both[j], far[j], right);
  }

  // Sets the exponentials of one pixel and their logarithms to base 2; returns their sum.
  __device__ __forceinline__ float take_again(int state, int r, float right,
                                              float (&exponents)[kClasses],
                                              float (&powers)[kClasses], float& below) const {
    float largest = kNothing<float>;
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      const auto& c = corners_[j];
      const float row0 = between(c.upper.left, c.upper.right, right);
      const float row1 = between(c.lower.left, c.lower.right, right);
      exponents[j] = between(row0, row1, pixels_.far[r]);
      if (is_class(j)) largest = maximum(largest, exponents[j]);
    }
    largest = over_lanes(largest, lanes_, Maximum());
    // Where no logit is above -inf the sum is 0, or NaN.
    if (largest == kNothing<float>) largest = 0.0f;
    float sum = 0.0f;
    below = 0.0f;
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      exponents[j] = state == kServe ? exponent(slope_of(j, right), r)
                                     : (exponents[j] - largest) * kLog2E<float>;
      powers[j] = exp2_fast(exponents[j]);
      if (state != kServe && (state == kZero || !is_class(j))) powers[j] = 0.0f;
      sum += powers[j];
      if constexpr (kSmooth)
        if (is_class(j)) below = fused_multiply_add(-weights_[j], exponents[j], below);
    }
    if constexpr (kSmooth) below = over_lanes(below, lanes_, Add()) * kLn2<float>;
    return over_lanes(sum, lanes_, Add());
  }

  const OnePassInput& input_;
  WalkPixels& pixels_;
  int lanes_log2_, b_, x_;
  int turn_ = 0;  // which of the two columns of scales was written last
  float unit_;    // the gradient of each loss
  float bound_ = 0.0f;
  // With smoothing: s/K, sum_k w_k and w_k.
  float spread_ = 0.0f, weight_sum_ = 0.0f, weights_[kSmooth ? kClasses : 1] = {};
};

// Grid: one block for each tile.
template <int kClasses, bool kSmooth>
__global__ void __launch_bounds__(kOnePassThreads,
                                  kClasses + 2 * kSmooth < kMostClassesOfLane ? 4 : 3)
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
