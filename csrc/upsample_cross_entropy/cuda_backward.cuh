// grad_l[j, k] = sum_i U[i, j] d[i, k], with d[i, k] = g_i (((1 - s) w_y + s/K sum w) p_ik
// - (1 - s) w_y [k = y] - s/K w_k) and p_ik = exp((U l)_ik - largest_i) / sum_i, in two launches.
//
// Cell (y, x) is the set of output pixels that interpolate between low-resolution pixels y, y + 1
// and x, x + 1. Every pixel is in one cell, so that d is computed once. A block has a tile of
// cells, and a thread walks down one of its columns of cells for two classes. Their four logits and
// the sums for the four corners stay in registers. On the way a thread reads only what all classes
// share: label, bound of the logits and scales of the pixels, from shared memory, and mostly at the
// same address in all lanes of a warp. The sums of the columns are added in shared memory; those of
// low-resolution pixels on the borders of tiles are added by the second launch, in a fixed order.
//
// The walk goes down, not to the right, because the forward interpolates along the rows first: both
// then form the same logits, bit for bit, and a thread does so with two operations per pixel.
#pragma once

#include <type_traits>

#include "upsample_cross_entropy/cuda_forward.cuh"

namespace mcibi_fast {

template <typename T>
inline constexpr int kMostThreads = 1280 / sizeof(T);  // in a block of the backward
inline constexpr int kThreadClasses = 2;
inline constexpr int kMaxWalks = 16;  // columns of cells in a tile
inline constexpr int kMaxCells = 8;   // cells in such a column
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
  const T *largest, *sum;  // what the forward stored of each pixel
  const T* weight;
  T smoothing;
  bool scaled;  // see may_scale
  BackwardPlan plan;
  T* sums;  // (B, tiles_y * (cells + 1), tiles_x * (walks + 1), K)

  __device__ T class_weight(int k) const { return weight == nullptr ? T(1) : weight[k]; }
};

// The static part of a block's shared memory. The dynamic part is PixelState[walks][kStagePixels],
// followed by the sums [walks][2][cells + 1][2 lanes].
template <typename T>
struct TileShared {
  int y_begin[kMaxCells + 1], x_begin[kMaxWalks + 1];  // first output pixels of the cells
  T below[kStageRows];                                 // weights of the lower neighbours
  ColumnState<T> columns[kMaxWalks * kStageColumns];
};

// ---- what all classes share ---------------------------------------------------------------------

// The weight with which the forward interpolates output i.
template <typename T>
__device__ __forceinline__ T far_weight(const BilinearAxis<T>& axis, int i) {
  return without_zero(bilinear_tap(axis, i)).weight1;
}

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
    const int yi = y + row, xi = shared.x_begin[walk] + column + in_walk;
    const bool inside = yi < y_end && xi < shared.x_begin[walk + 1];
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

// The sums of a walk for the low-resolution rows that it passes: [left, right][row][class].
template <typename T>
struct WalkSums {
  T* data;
  int rows, width;

  __device__ T& at(int side, int row, int k) const { return data[(side * rows + row) * width + k]; }
};

template <typename Element, bool kSmooth>
class Walk {
 public:
  using T = Compute<Element>;

  // A walk down column `x` of cells from cell `y` on, for classes first + lane and first + lane +
  // lanes.
  __device__ Walk(const BackwardInput<Element>& input, int b, int y, int x, int first, int lane)
      : input_(input), first_y_(y), lane_(lane) {
    const bool last =
        x >= input.x_axis.in_size - 1 || input.x_axis.in_size == input.x_axis.out_size;
    column_ = input.logits + b * input.strides.batch +
              min(x, input.x_axis.in_size - 1) * input.strides.column;
    right_ = last ? 0 : input.strides.column;
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
      c.upper = row_at(c, first_y_);
      c.lower = row_at(c, first_y_ + 1);
      c.upper_sums = c.lower_sums = {T(0), T(0)};
    }
    set_one_row();
  }

  // The part of the walk in one stage: rows y .. y_end - 1, `columns` columns of the cells.
  __device__ __forceinline__ void pass(const TileShared<T>& shared, const PixelState<T>* states,
                                       int walk, int y, int y_end, int columns, bool add,
                                       const WalkSums<T>& sums) {
    const ColumnState<T>* of_columns = shared.columns + walk * kStageColumns;
    for (int begin = y; begin < y_end;) {
      while (shared.y_begin[cell_ + 1] <= begin) next_cell(add, sums);
      const int end = min(shared.y_begin[cell_ + 1], y_end);
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
  // Whether columns whose labels are of other classes go a shorter way.
  static constexpr bool kWithoutLabels = !kSmooth && std::is_same_v<T, float>;

  // The logits of a low-resolution row in the left and the right column.
  struct Row {
    T left, right;
  };
  // Sums for a low-resolution row: of both columns, and of the right column.
  struct Sums {
    T both, right;
  };
  struct ClassState {
    Row upper, lower;  // of the cell
    Sums upper_sums, lower_sums;
    T hard, soft;  // (1 - s) w_k, s/K w_k
    int k;
  };

  __device__ __forceinline__ Row row_at(const ClassState& c, int y) const {
    const int k = opaque(min(c.k, input_.classes - 1));
    const Element* at = column_ + k * input_.strides.channel +
                        min(y, input_.y_axis.in_size - 1) * input_.strides.row;
    return {widen(at[0]), widen(at[right_])};
  }

  // Notes whether the cell has no lower row.
  __device__ __forceinline__ void set_one_row() {
    one_row_ = first_y_ + cell_ >= input_.y_axis.in_size - 1 ||
               input_.y_axis.in_size == input_.y_axis.out_size;
  }

  __device__ __forceinline__ void next_cell(bool add, const WalkSums<T>& sums) {
    store_upper(add, sums);
    ++cell_;
#pragma unroll
    for (int j = 0; j < kThreadClasses; ++j) {
      ClassState& c = classes_[j];
      c.upper = c.lower;
      c.lower = row_at(c, first_y_ + cell_ + 1);
      c.upper_sums = c.lower_sums;
      c.lower_sums = {T(0), T(0)};
    }
    set_one_row();
  }

  __device__ __forceinline__ void store_upper(bool add, const WalkSums<T>& sums) {
#pragma unroll
    for (int j = 0; j < kThreadClasses; ++j) {
      const Sums& s = classes_[j].upper_sums;
      const int k = lane_ + j * input_.plan.lanes;
      T& left = sums.at(0, cell_, k);
      T& right = sums.at(1, cell_, k);
      left = (add ? left : T(0)) + (s.both - s.right);
      right = (add ? right : T(0)) + s.right;
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
      const ClassState& c = classes_[j];
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
    for (int j = 0; j < kThreadClasses; ++j) {
      // A NaN must not reach a neighbour that was not interpolated, not even times 0.
      if (one_row_) far[j] = T(0);
      add_sums(classes_[j].upper_sums, both[j] - far[j], right);
      add_sums(classes_[j].lower_sums, far[j], right);
    }
  }

  __device__ __forceinline__ void add_sums(Sums& sums, T d, T right) {
    sums.both += d;
    if (right_ != 0) sums.right = fused_multiply_add(right, d, sums.right);
  }

  const BackwardInput<Element>& input_;
  const Element* column_;
  int first_y_, lane_, cell_ = 0;
  int64_t right_;  // from the left column of logits to the right; 0: they are the same column
  bool one_row_ = false;
  ClassState classes_[kThreadClasses];
};

// ---- the tile's sums ----------------------------------------------------------------------------

// Called by all threads: adds what the walks have for the low-resolution columns between them.
template <typename Element, typename T>
__device__ __forceinline__ void write_tile_sums(const BackwardInput<Element>& input, int b,
                                                int tile_y, int tile_x, int first, const T* sums) {
  const BackwardPlan& plan = input.plan;
  const int count = min(plan.group_classes, input.classes - first);
  const int rows = plan.cells + 1, columns = plan.walks + 1, width = kThreadClasses * plan.lanes;
  const FastDivisor by_count(count), by_columns(columns);
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns * count;
       i += static_cast<int>(blockDim.x)) {
    const int place = by_count.quotient(i), k = i - place * count;
    const int row = by_columns.quotient(place), column = place - row * columns;
    const int y = tile_y * plan.cells + row, x = tile_x * plan.walks + column;
    if (y >= input.y_axis.in_size || x >= input.x_axis.in_size) continue;
    T sum = T(0);
    if (column > 0) sum += sums[((2 * column - 1) * rows + row) * width + k];
    if (column < plan.walks) sum += sums[(2 * column * rows + row) * width + k];
    const int64_t out_y = static_cast<int64_t>(b * plan.tiles_y + tile_y) * rows + row;
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
  const int cell_y = tile_y * plan.cells, cell_x = tile_x * plan.walks;
  const int first = group * plan.group_classes;
  if (thread <= plan.cells)
    shared.y_begin[thread] = bilinear_first_output(input.y_axis, cell_y + thread);
  if (thread <= plan.walks)
    shared.x_begin[thread] = bilinear_first_output(input.x_axis, cell_x + thread);
  T weight_sum = T(0);
  if constexpr (kSmooth)
    for (int k = 0; k < input.classes; ++k) weight_sum += input.class_weight(k);

  const int walk = min(thread / plan.lanes, plan.walks - 1);
  const bool active = thread < plan.walks * plan.lanes;
  Walk<Element, kSmooth> path(input, b, cell_y, cell_x + walk, first, thread % plan.lanes);
  const int rows = plan.cells + 1, width = kThreadClasses * plan.lanes;
  const WalkSums<T> own = {sums + 2 * walk * rows * width, rows, width};
  const LabelFlag flag = {group == 0 ? input.flag.flag : nullptr, input.flag.op};
  __syncthreads();  // the cells' first pixels are known
  const int y_end = shared.y_begin[plan.cells];
  int widest = 1;
  for (int i = 0; i < plan.walks; ++i)
    widest = max(widest, shared.x_begin[i + 1] - shared.x_begin[i]);
  for (int column = 0; column < widest; column += kStageColumns) {
    path.start();
    const int columns =
        min(kStageColumns, shared.x_begin[walk + 1] - shared.x_begin[walk] - column);
    for (int y = shared.y_begin[0]; y < y_end; y += kStageRows) {
      const int end = min(y + kStageRows, y_end);
      __syncthreads();  // the previous stage has been used
      fill_stage(input, opaque(b), column, y, end, weight_sum, shared, states, flag);
      __syncthreads();  // this stage is loaded
      if (active)
        path.pass(shared, states + walk * kStagePixels, walk, y, end, columns, column > 0, own);
    }
    if (active) path.finish(column > 0, own);
  }
  __syncthreads();  // all walks have ended
  write_tile_sums(input, b, tile_y, tile_x, first, sums);
}

}  // namespace mcibi_fast
