// grad_l[j, k] = sum_i U[i, j] d[i, k], with d[i, k] = g_i (((1 - s) w_y + s/K sum w) p_ik
// - (1 - s) w_y [k = y] - s/K w_k) and p_ik = exp((U l)_ik - lse_i), in two launches.
//
// Cell (y, x) is the set of output pixels that interpolate between low-resolution pixels y, y + 1
// and x, x + 1. Every pixel is in one cell, so that d is computed once. A block has a tile of
// cells, and a thread walks along one of its rows of cells for two classes. Their four logits and
// the sums for the four corners stay in registers. On the way a thread reads only what all classes
// share: lse, label and scales of the pixels, from shared memory, and mostly at the same address in
// all lanes of a warp. The sums of the rows are added in shared memory; those of low-resolution
// pixels on the borders of tiles are added by the second launch, in a fixed order.
#pragma once

#include <type_traits>

#include "upsample_cross_entropy/cuda_forward.cuh"

namespace mcibi_fast {

template <typename T>
inline constexpr int kMostThreads = 1280 / sizeof(T);  // in a block of the backward
inline constexpr int kThreadClasses = 2;
inline constexpr int kMaxWalks = 16;  // rows of cells in a tile
inline constexpr int kMaxCells = 8;   // cells in such a row
inline constexpr int kStageRows = 12;
inline constexpr int kStageColumns = 8;
inline constexpr int kStagePixels = kStageRows * kStageColumns;

template <typename T>
struct alignas(16) PixelState {
  T lse;
  T scale;  // of p
  T grad;   // of the loss
  int label;
};

// How the cells are divided into tiles.
struct BackwardPlan {
  int walks, cells;           // in a tile
  int tiles_y, tiles_x;       // in an image
  int groups, group_classes;  // the classes are divided too
  int lanes;                  // threads on one walk

  int threads() const { return (walks * lanes + 31) / 32 * 32; }
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
  const T* lse;
  const T* weight;
  T smoothing;
  BackwardPlan plan;
  T* sums;  // (B, tiles_y * (walks + 1), tiles_x * (cells + 1), K)

  __device__ T class_weight(int k) const { return weight == nullptr ? T(1) : weight[k]; }
};

// The static part of a block's shared memory. The dynamic part is PixelState[walks][kStagePixels],
// followed by the sums [walks][2][cells + 1][2 lanes].
template <typename T>
struct TileShared {
  int y_begin[kMaxWalks + 1], x_begin[kMaxCells + 1];  // first output pixels of the cells
  T far_y[kMaxWalks * kStageRows], far_x[kStageColumns];
};

// ---- what all classes share ---------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T far_weight(const BilinearAxis<T>& axis, int i) {
  const BilinearTap<T> tap = bilinear_tap(axis, i);
  return tap.index0 == tap.index1 ? T(0) : tap.weight1;
}

template <typename Element, typename T>
__device__ PixelState<T> pixel_state(const BackwardInput<Element>& input, int label, int b, int y,
                                     int x, T weight_sum) {
  constexpr T kInfinite = T(3e38);  // gives p = 0
  if (label < 0) return {kInfinite, T(0), T(0), -1};
  const int64_t i =
      (static_cast<int64_t>(b) * input.y_axis.out_size + y) * input.x_axis.out_size + x;
  const T grad =
      input
          .grad_losses[b * input.grad_stride_b + y * input.grad_stride_y + x * input.grad_stride_x];
  const T smooth = input.smoothing / static_cast<T>(input.classes) * weight_sum;
  const T scale = (T(1) - input.smoothing) * input.class_weight(label) + smooth;
  return {input.lse[i], grad * scale, grad, label};
}

// Called by all threads: stages the pixels of columns x .. x_end - 1 and, for each walk, of the
// rows from its first + row on.
template <typename Element, typename T>
__device__ __forceinline__ void fill_stage(const BackwardInput<Element>& input, int b, int row,
                                           int x, int x_end, T weight_sum, TileShared<T>& shared,
                                           PixelState<T>* states, LabelFlag flag) {
  LabelReader labels(input.labels);
  const int thread = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
#pragma unroll 1
  for (int i = thread; i < input.plan.walks * kStagePixels; i += step) {
    const int walk = i / kStagePixels, in_walk = i % kStagePixels;
    const int yi = shared.y_begin[walk] + row + in_walk / kStageColumns;
    const int xi = x + in_walk % kStageColumns;
    if (yi < shared.y_begin[walk + 1] && xi < x_end)
      states[i] = pixel_state(input, labels.read(b, yi, xi), b, yi, xi, weight_sum);
  }
#pragma unroll 1
  for (int i = thread; i < input.plan.walks * kStageRows; i += step) {
    const int yi = shared.y_begin[i / kStageRows] + row + i % kStageRows;
    if (yi < shared.y_begin[i / kStageRows + 1]) shared.far_y[i] = far_weight(input.y_axis, yi);
  }
  if (thread < kStageColumns && x + thread < x_end)
    shared.far_x[thread] = far_weight(input.x_axis, x + thread);
  labels.report(flag);
}

// ---- a thread's walk ----------------------------------------------------------------------------

// The sums of a walk for the low-resolution columns that it passes: [row 0, row 1][column][class].
template <typename T>
struct WalkSums {
  T* data;
  int columns, width;

  __device__ T& at(int row, int column, int k) const {
    return data[(row * columns + column) * width + k];
  }
};

template <typename Element, bool kSmooth>
class Walk {
 public:
  using T = Compute<Element>;

  // A walk along cell row `y` from cell `x` on, for classes first + lane and first + lane + lanes.
  __device__ Walk(const BackwardInput<Element>& input, int b, int y, int x, int first, int lane)
      : input_(input), first_x_(x), lane_(lane) {
    const bool last =
        y >= input.y_axis.in_size - 1 || input.y_axis.in_size == input.y_axis.out_size;
    row_ = input.logits + b * input.strides.batch +
           min(y, input.y_axis.in_size - 1) * input.strides.row;
    lower_ = last ? 0 : input.strides.row;
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

  // Goes to the first cell.
  __device__ __forceinline__ void start() {
    cell_ = 0;
#pragma unroll
    for (int j = 0; j < kThreadClasses; ++j) {
      ClassState& c = classes_[j];
      c.left = column_at(c, first_x_);
      c.right = column_at(c, first_x_ + 1);
      c.near_sums = c.far_sums = {T(0), T(0)};
    }
    set_one_column();
  }

  // The part of the walk in one stage: columns x .. x_end - 1, `rows` rows of the cells.
  __device__ __forceinline__ void pass(const TileShared<T>& shared, const PixelState<T>* states,
                                       const T* far_y, int x, int x_end, int rows, bool add,
                                       const WalkSums<T>& sums) {
    for (int begin = x; begin < x_end;) {
      while (shared.x_begin[cell_ + 1] <= begin) next_cell(add, sums);
      const int end = min(shared.x_begin[cell_ + 1], x_end);
#pragma unroll 1
      for (int row = 0; row < rows; ++row)
        add_row(states + row * kStageColumns + begin - x, shared.far_x + begin - x, end - begin,
                far_y[row]);
      begin = end;
    }
  }

  // Goes past the last cell and stores the remaining sums.
  __device__ __forceinline__ void finish(bool add, const WalkSums<T>& sums) {
    while (cell_ < input_.plan.cells) next_cell(add, sums);
    store_left(add, sums);
  }

 private:
  // The logit of a low-resolution column in the upper row, and the slope to the lower row.
  struct Column {
    T logit, slope;
  };
  // Sums for a low-resolution column: of both rows, and of the lower row.
  struct Sums {
    T both, lower;
  };
  struct ClassState {
    Column left, right;        // of the cell
    Sums near_sums, far_sums;  // for the left and the right column
    T hard, soft;              // (1 - s) w_k, s/K w_k
    int k;
  };

  __device__ __forceinline__ Column column_at(const ClassState& c, int x) const {
    const int k = opaque(min(c.k, input_.classes - 1));
    const Element* at = row_ + k * input_.strides.channel +
                        min(x, input_.x_axis.in_size - 1) * input_.strides.column;
    const T logit = widen(at[0]);
    return {logit, lower_ == 0 ? T(0) : widen(at[lower_]) - logit};
  }

  // Notes whether the cell has no right column, whose logits may be infinite.
  __device__ __forceinline__ void set_one_column() {
    one_column_ = first_x_ + cell_ >= input_.x_axis.in_size - 1 ||
                  input_.x_axis.in_size == input_.x_axis.out_size;
  }

  __device__ __forceinline__ void next_cell(bool add, const WalkSums<T>& sums) {
    store_left(add, sums);
    ++cell_;
#pragma unroll
    for (int j = 0; j < kThreadClasses; ++j) {
      ClassState& c = classes_[j];
      c.left = c.right;
      c.right = column_at(c, first_x_ + cell_ + 1);
      c.near_sums = c.far_sums;
      c.far_sums = {T(0), T(0)};
    }
    set_one_column();
  }

  __device__ __forceinline__ void store_left(bool add, const WalkSums<T>& sums) {
#pragma unroll
    for (int j = 0; j < kThreadClasses; ++j) {
      const Sums& s = classes_[j].near_sums;
      const int k = lane_ + j * input_.plan.lanes;
      T& upper = sums.at(0, cell_, k);
      T& lower = sums.at(1, cell_, k);
      upper = (add ? upper : T(0)) + (s.both - s.lower);
      lower = (add ? lower : T(0)) + s.lower;
    }
  }

  // `count` pixels of one row of the cell.
  __device__ __forceinline__ void add_row(const PixelState<T>* states, const T* far_x, int count,
                                          T far_y) {
    T logit[kThreadClasses], slope[kThreadClasses], both[kThreadClasses], far[kThreadClasses];
#pragma unroll
    for (int j = 0; j < kThreadClasses; ++j) {
      const ClassState& c = classes_[j];
      logit[j] = fused_multiply_add(far_y, c.left.slope, c.left.logit);
      const T right = fused_multiply_add(far_y, c.right.slope, c.right.logit);
      slope[j] = one_column_ ? T(0) : right - logit[j];
      both[j] = far[j] = T(0);
    }
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const PixelState<T> state = states[i];
      const T weight = far_x[i];
#pragma unroll
      for (int j = 0; j < kThreadClasses; ++j) {
        const ClassState& c = classes_[j];
        T d = state.scale * exponential(fused_multiply_add(weight, slope[j], logit[j] - state.lse));
        if constexpr (kSmooth) d = fused_multiply_add(-state.grad, c.soft, d);
        if (state.label == c.k) d = fused_multiply_add(-state.grad, c.hard, d);
        both[j] += d;
        far[j] = fused_multiply_add(weight, d, far[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kThreadClasses; ++j) {
      ClassState& c = classes_[j];
      const T near = both[j] - far[j];
      c.near_sums.both += near;
      c.near_sums.lower = fused_multiply_add(far_y, near, c.near_sums.lower);
      c.far_sums.both += far[j];
      c.far_sums.lower = fused_multiply_add(far_y, far[j], c.far_sums.lower);
    }
  }

  const BackwardInput<Element>& input_;
  const Element* row_;
  int first_x_, lane_, cell_ = 0;
  int64_t lower_;  // from the upper row of logits to the lower; 0: they are the same row
  bool one_column_ = false;
  ClassState classes_[kThreadClasses];
};

// ---- the tile's sums ----------------------------------------------------------------------------

// Called by all threads: adds what the walks have for the low-resolution rows between them.
template <typename Element, typename T>
__device__ __forceinline__ void write_tile_sums(const BackwardInput<Element>& input, int b,
                                                int tile_y, int tile_x, int first, const T* sums) {
  const BackwardPlan& plan = input.plan;
  const int count = min(plan.group_classes, input.classes - first);
  const int columns = plan.cells + 1, width = kThreadClasses * plan.lanes;
  const FastDivisor by_count(count), by_columns(columns);
  for (int i = static_cast<int>(threadIdx.x); i < (plan.walks + 1) * columns * count;
       i += static_cast<int>(blockDim.x)) {
    const int place = by_count.quotient(i), k = i - place * count;
    const int row = by_columns.quotient(place), column = place - row * columns;
    const int y = tile_y * plan.walks + row, x = tile_x * plan.cells + column;
    if (y >= input.y_axis.in_size || x >= input.x_axis.in_size) continue;
    T sum = T(0);
    if (row > 0) sum += sums[((2 * row - 1) * columns + column) * width + k];
    if (row < plan.walks) sum += sums[(2 * row * columns + column) * width + k];
    const int64_t out_y = static_cast<int64_t>(b * plan.tiles_y + tile_y) * (plan.walks + 1) + row;
    const int64_t out_x = static_cast<int64_t>(tile_x) * columns + column;
    input.sums[(out_y * plan.tiles_x * columns + out_x) * input.classes + first + k] = sum;
  }
}

// Grid: one block for each tile and group of classes.
template <typename Element, bool kSmooth>
__global__ void __launch_bounds__(kMostThreads<Compute<Element>>,
                                  std::is_same_v<Element, double> ? 1 : 2)
    cross_entropy_backward_kernel(BackwardInput<Element> input) {
  using T = Compute<Element>;
  const BackwardPlan& plan = input.plan;
  MCIBI_SHARED(shared, TileShared<T>);
  MCIBI_DYNAMIC_SHARED(bytes);
  auto* states = reinterpret_cast<PixelState<T>*>(bytes);
  auto* sums = reinterpret_cast<T*>(states + plan.walks * kStagePixels);

  const int thread = static_cast<int>(threadIdx.x);
  const int tile = static_cast<int>(blockIdx.x) / plan.groups;
  const int group = static_cast<int>(blockIdx.x) - tile * plan.groups;
  const int tile_x = tile % plan.tiles_x, tile_y = tile / plan.tiles_x % plan.tiles_y;
  const int b = tile / plan.tiles_x / plan.tiles_y;
  const int cell_y = tile_y * plan.walks, cell_x = tile_x * plan.cells;
  const int first = group * plan.group_classes;
  if (thread <= plan.walks)
    shared.y_begin[thread] = bilinear_first_output(input.y_axis, cell_y + thread);
  if (thread <= plan.cells)
    shared.x_begin[thread] = bilinear_first_output(input.x_axis, cell_x + thread);
  T weight_sum = T(0);
  if constexpr (kSmooth)
    for (int k = 0; k < input.classes; ++k) weight_sum += input.class_weight(k);

  const int walk = min(thread / plan.lanes, plan.walks - 1);
  const bool active = thread < plan.walks * plan.lanes;
  Walk<Element, kSmooth> path(input, b, cell_y + walk, cell_x, first, thread % plan.lanes);
  const int columns = plan.cells + 1, width = kThreadClasses * plan.lanes;
  const WalkSums<T> own = {sums + 2 * walk * columns * width, columns, width};
  const LabelFlag flag = {group == 0 ? input.flag.flag : nullptr, input.flag.op};
  __syncthreads();  // the cells' first pixels are known
  const int x_end = shared.x_begin[plan.cells];
  int tallest = 1;
  for (int i = 0; i < plan.walks; ++i)
    tallest = max(tallest, shared.y_begin[i + 1] - shared.y_begin[i]);
  for (int row = 0; row < tallest; row += kStageRows) {
    path.start();
    const int rows = min(kStageRows, shared.y_begin[walk + 1] - shared.y_begin[walk] - row);
    for (int x = shared.x_begin[0]; x < x_end; x += kStageColumns) {
      const int end = min(x + kStageColumns, x_end);
      __syncthreads();  // the previous stage has been used
      fill_stage(input, opaque(b), row, x, end, weight_sum, shared, states, flag);
      __syncthreads();  // this stage is loaded
      if (active)
        path.pass(shared, states + walk * kStagePixels, shared.far_y + walk * kStageRows, x, end,
                  rows, row > 0, own);
    }
    if (active) path.finish(row > 0, own);
  }
  __syncthreads();  // all walks have ended
  write_tile_sums(input, b, tile_y, tile_x, first, sums);
}

}  // namespace mcibi_fast
