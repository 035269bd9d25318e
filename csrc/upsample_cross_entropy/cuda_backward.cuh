// grad_l[j, k] = sum_i U[i, j] d[i, k], with d[i, k] = g_i (((1 - s) w_y + s/K sum w) p_ik
// - (1 - s) w_y [k = y] - s/K w_k) and p_ik = exp((U l)_ik - largest_i) / sum_i, in two launches.
//
// A thread walks over cells for two classes (cuda_walk.cuh), so that d is computed once. On the way
// it reads only what all classes share: label, bound of the logits and scales of the pixels, from
// shared memory, and mostly at the same address in all lanes of a warp.
//
// The walk goes down, not to the right, because the forward interpolates along the rows first: both
// then form the same logits, bit for bit, and a thread does so with two operations per pixel.
#pragma once

#include <type_traits>

#include "upsample_cross_entropy/cuda_walk.cuh"

namespace mcibi_fast {

template <typename T>
inline constexpr int kMostThreads = 1280 / sizeof(T);  // in a block of the backward
inline constexpr int kThreadClasses = 2;
inline constexpr int kStageRows = 8;  // pixels of a walk that are in shared memory at a time
inline constexpr int kStageColumns = 12;
inline constexpr int kStagePixels = kStageRows * kStageColumns;
inline constexpr int kNoClass = INT32_MAX;  // above all classes

template <typename T>
struct alignas(16) PixelState {
  T largest;  // logit, or the forward's bound
  T scale;    // of exp(l - largest)
  T grad;     // of the loss
  int label;  // -1: the pixel does not count
};

// The pixels of a column in one stage: between which classes their labels are. If one does not
// count, or they are not all relative to the same bound, or to one that is not scaled: all classes.
template <typename T>
struct alignas(16) ColumnState {
  T bound;
  T right;  // weight of the right neighbour
  int lowest, highest;
};

template <typename Element>
struct BackwardInput {
  using T = Compute<Element>;
  const Element* logits;
  MapStrides strides;
  int classes;
  BilinearAxis<T> y_axis, x_axis;
  LabelMap labels;
  LabelFlag flag;
  const T* grad_losses;
  int64_t grad_stride_b, grad_stride_y, grad_stride_x;
  const T *largest, *sum;  // what the forward stored of each pixel
  const T* weight;
  T smoothing;
  bool scaled;  // see may_scale
  TilePlan plan;
  T* sums;  // (B, tiles_y * (cells + 1), tiles_x * (walks + 1), K)

  __device__ T class_weight(int k) const { return weight == nullptr ? T(1) : weight[k]; }
};

// The static part of a block's shared memory. The dynamic part is PixelState[walks][kStagePixels],
// followed by the sums [walks][2][cells + 1][2 lanes].
template <typename T>
struct TileShared {
  CellBegins begins;
  T below[kStageRows];  // weights of the lower neighbours
  ColumnState<T> columns[kMaxWalks * kStageColumns];
};

// ---- what all classes share ---------------------------------------------------------------------

template <typename Element, typename T>
__device__ PixelState<T> pixel_state(const BackwardInput<Element>& input, int label, int b, int y,
                                     int x, T weight_sum) {
  constexpr PixelState<T> kNone = {T(0), T(0), T(0), -1};
  if (label < 0) return kNone;
  const int64_t i =
      (static_cast<int64_t>(b) * input.y_axis.out_size + y) * input.x_axis.out_size + x;
  const T grad =
      input
          .grad_losses[b * input.grad_stride_b + y * input.grad_stride_y + x * input.grad_stride_x];
  if (grad == T(0)) return kNone;
  const T smooth = input.smoothing / static_cast<T>(input.classes) * weight_sum;
  const T scale = (T(1) - input.smoothing) * input.class_weight(label) + smooth;
  return {input.largest[i], grad * scale / input.sum[i], grad, label};
}

// Called by all threads: stages the pixels of rows y .. y_end - 1 and, for each walk, of the
// columns from its first + column on.
template <typename Element, typename T>
__device__ __forceinline__ void fill_stage(const BackwardInput<Element>& input, int b, int column,
                                           int y, int y_end, T weight_sum, TileShared<T>& shared,
                                           PixelState<T>* states, LabelFlag flag) {
  LabelReader labels(input.labels);
  const int thread = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  // Eight threads have a column, and whole warps are in the loop or not.
#pragma unroll 1
  for (int i = thread; i < input.plan.walks * kStagePixels; i += step) {
    const int columns = i / kStageRows, row = i % kStageRows;
    const int walk = columns / kStageColumns, in_walk = columns % kStageColumns;
    const int yi = y + row, xi = shared.begins.x[walk] + column + in_walk;
    const bool inside = yi < y_end && xi < shared.begins.x[walk + 1];
    PixelState<T> state = {};
    if (inside) {
      state = pixel_state(input, labels.read(b, yi, xi), b, yi, xi, weight_sum);
      states[walk * kStagePixels + row * kStageColumns + in_walk] = state;
    }
    const T bound = __shfl_sync(0xffffffffu, state.largest, thread % 32 - row);
    const bool alike =
        state.label >= 0 && state.largest == bound && input.scaled && scales_rows(bound);
    int lowest = !inside ? kNoClass : alike ? state.label : -1;
    int highest = !inside ? -1 : alike ? state.label : kNoClass;
#pragma unroll
    for (int mask = 1; mask < kStageRows; mask *= 2) {
      lowest = min(lowest, __shfl_xor_sync(0xffffffffu, lowest, mask));
      highest = max(highest, __shfl_xor_sync(0xffffffffu, highest, mask));
    }
    if (row == 0 && inside)
      shared.columns[columns] = {bound, far_weight(input.x_axis, xi), lowest, highest};
  }
  if (thread < kStageRows && y + thread < y_end)
    shared.below[thread] = far_weight(input.y_axis, y + thread);
  labels.report(flag);
}

// ---- a thread's walk ----------------------------------------------------------------------------

template <typename Element, bool kSmooth>
class Walk : public CellWalk<Walk<Element, kSmooth>, Compute<Element>, kThreadClasses> {
 public:
  using T = Compute<Element>;
  using Base = CellWalk<Walk, T, kThreadClasses>;
  using Base::start;

  // A walk down column `x` of cells from cell `y` on, for classes first + lane and first + lane +
  // lanes.
  __device__ Walk(const BackwardInput<Element>& input, int b, int y, int x, int first, int lane)
      : Base(input.plan.lanes, lane, y, input.y_axis.in_size,
             input.y_axis.in_size == input.y_axis.out_size),
        input_(input) {
    one_column_ = x >= input.x_axis.in_size - 1 || input.x_axis.in_size == input.x_axis.out_size;
    column_ = input.logits + b * input.strides.batch +
              min(x, input.x_axis.in_size - 1) * input.strides.column;
    right_ = one_column_ ? 0 : input.strides.column;
    const T soft = input.smoothing / static_cast<T>(input.classes);
#pragma unroll
    for (int j = 0; j < kThreadClasses; ++j) {
      ClassState& c = classes_[j];
      const int k = first + lane + j * input.plan.lanes;
      c.k = k;
      const int real = min(k, input.classes - 1);
      const T weight = input.class_weight(real);
      c.hard = (T(1) - input.smoothing) * weight;
      c.soft = soft * weight;
    }
  }

  // The part of the walk in one stage: rows y .. y_end - 1, `columns` columns of the cells.
  __device__ __forceinline__ void pass(const TileShared<T>& shared, const PixelState<T>* states,
                                       int walk, int y, int y_end, int columns, bool add,
                                       const WalkSums<T>& sums) {
    const ColumnState<T>* of_columns = shared.columns + walk * kStageColumns;
    for (int begin = y; begin < y_end;) {
      while (shared.begins.y[cell_ + 1] <= begin) next_cell(add, sums);
      const int end = min(shared.begins.y[cell_ + 1], y_end);
#pragma unroll 1
      for (int column = 0; column < columns; ++column) {
        const PixelState<T>* first = states + (begin - y) * kStageColumns + column;
        const T* below = shared.below + begin - y;
        const ColumnState<T> state = of_columns[column];
        if (!kWithoutLabels || may_have_label(state))
          add_column<true>(first, below, end - begin, state);
        else if constexpr (kWithoutLabels)
          add_column<false>(first, below, end - begin, state);
      }
      begin = end;
    }
  }

  // Goes past the last cell and stores the remaining sums.
  __device__ __forceinline__ void finish(bool add, const WalkSums<T>& sums) {
    while (cell_ < input_.plan.cells) next_cell(add, sums);
    store_upper(add, sums);
  }

 private:
  friend Base;
  using Base::add_column_sums;
  using Base::cell_;
  using Base::corners_;
  using Base::lane_;
  using Base::next_cell;
  using Base::one_column_;
  using Base::one_row_;
  using Base::store_upper;

  // Whether columns whose labels are of other classes go a shorter way.
  static constexpr bool kWithoutLabels = !kSmooth && std::is_same_v<T, float>;

  struct ClassState {
    T hard, soft;  // (1 - s) w_k, s/K w_k
    int k;
  };

  __device__ __forceinline__ void read_row(int y,
                                           typename Base::Row (&rows)[kThreadClasses]) const {
#pragma unroll
    for (int j = 0; j < kThreadClasses; ++j) {
      const int k = opaque(min(classes_[j].k, input_.classes - 1));
      const Element* at = column_ + k * input_.strides.channel + y * input_.strides.row;
      rows[j] = {widen(at[0]), widen(at[right_])};
    }
  }

  // Whether a label of the column may be of a class that a lane of this walk and warp has; they all
  // take the same way through the column.
  __device__ __forceinline__ bool may_have_label(const ColumnState<T>& column) const {
    const int in_warp = opaque(static_cast<int>(threadIdx.x)) % 32, lanes = input_.plan.lanes;
    const int first = classes_[0].k - min(in_warp, lane_);
    const int last = classes_[0].k + min(31 - in_warp, lanes - 1 - lane_);
    return (column.lowest <= last && column.highest >= first) ||
           (column.lowest <= last + lanes && column.highest >= first + lanes);
  }

  // `count` pixels of one column of the cell. If none has a label of these classes, all of them
  // count and are relative to one bound, with scaled rows.
  template <bool kLabels>
  __device__ __forceinline__ void add_column(const PixelState<T>* states, const T* below, int count,
                                             const ColumnState<T>& column) {
    const T right = column.right, scaled = column.bound * kLog2E<T>;
    T row0[kThreadClasses], row1[kThreadClasses], both[kThreadClasses], far[kThreadClasses];
#pragma unroll
    for (int j = 0; j < kThreadClasses; ++j) {
      const auto& c = corners_[j];
      row0[j] = between(c.upper.left, c.upper.right, right);
      row1[j] = one_row_ ? row0[j] : between(c.lower.left, c.lower.right, right);
      if constexpr (!kLabels) {
        row0[j] = scaled_row(row0[j], scaled);
        row1[j] = scaled_row(row1[j], scaled);
      }
      both[j] = far[j] = T(0);
    }
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const PixelState<T> state = states[i * kStageColumns];
      const T weight = below[i];
#pragma unroll
      for (int j = 0; j < kThreadClasses; ++j) {
        const ClassState& c = classes_[j];
        if constexpr (!kLabels) {
          const T power = exp2_fast(between(row0[j], row1[j], weight));
          both[j] = fused_multiply_add(state.scale, power, both[j]);
          far[j] = fused_multiply_add(weight * state.scale, power, far[j]);
          continue;
        }
        const T power = input_.scaled
                            ? relative_exponential(true, row0[j], row1[j], weight, state.largest)
                            : exponential(between(row0[j], row1[j], weight) - state.largest);
        T d = state.scale * power;
        if constexpr (kSmooth) d = fused_multiply_add(-state.grad, c.soft, d);
        if (state.label == c.k) d = fused_multiply_add(-state.grad, c.hard, d);
        if (state.label >= 0) {
          both[j] += d;
          far[j] = fused_multiply_add(weight, d, far[j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kThreadClasses; ++j) add_column_sums(j, both[j], far[j], right);
  }

  const BackwardInput<Element>& input_;
  const Element* column_;
  int64_t right_;  // from the left column of logits to the right; 0: they are the same column
  ClassState classes_[kThreadClasses];
};

// Grid: one block for each tile and group of classes.
template <typename Element, bool kSmooth>
__global__ void __launch_bounds__(kMostThreads<Compute<Element>>,
                                  std::is_same_v<Element, double> ? 1 : 2)
    cross_entropy_backward_kernel(BackwardInput<Element> input) {
  using T = Compute<Element>;
  const TilePlan& plan = input.plan;
  MCIBI_SHARED(shared, TileShared<T>);
  MCIBI_DYNAMIC_SHARED(bytes);
  auto* states = reinterpret_cast<PixelState<T>*>(bytes);
  auto* sums = reinterpret_cast<T*>(states + plan.walks * kStagePixels);

  const int thread = static_cast<int>(threadIdx.x);
  const TilePlace place(plan, static_cast<int>(blockIdx.x));
  shared.begins.find(input.y_axis, input.x_axis, plan, place);
  T weight_sum = T(0);
  if constexpr (kSmooth)
    for (int k = 0; k < input.classes; ++k) weight_sum += input.class_weight(k);

  const int walk = min(thread / plan.lanes, plan.walks - 1);
  const bool active = thread < plan.walks * plan.lanes;
  Walk<Element, kSmooth> path(input, place.b, place.cell_y, place.cell_x + walk,
                              place.group * plan.group_classes, thread % plan.lanes);
  const int rows = plan.cells + 1, width = kThreadClasses * plan.lanes;
  const WalkSums<T> own = {sums + 2 * walk * rows * width, rows, width};
  const LabelFlag flag = {place.group == 0 ? input.flag.flag : nullptr, input.flag.op};
  __syncthreads();  // the cells' first pixels are known
  const int y_end = shared.begins.y[plan.cells];
  int widest = 1;
  for (int i = 0; i < plan.walks; ++i)
    widest = max(widest, shared.begins.x[i + 1] - shared.begins.x[i]);
  for (int column = 0; column < widest; column += kStageColumns) {
    path.start();
    const int columns =
        min(kStageColumns, shared.begins.x[walk + 1] - shared.begins.x[walk] - column);
    for (int y = shared.begins.y[0]; y < y_end; y += kStageRows) {
      const int end = min(y + kStageRows, y_end);
      __syncthreads();  // the previous stage has been used
      fill_stage(input, opaque(place.b), column, y, end, weight_sum, shared, states, flag);
      __syncthreads();  // this stage is loaded
      if (active)
        path.pass(shared, states + walk * kStagePixels, walk, y, end, columns, column > 0, own);
    }
    if (active) path.finish(column > 0, own);
  }
  __syncthreads();  // all walks have ended
  write_tile_sums(input, place, kThreadClasses, sums);
}

}  // namespace mcibi_fast
