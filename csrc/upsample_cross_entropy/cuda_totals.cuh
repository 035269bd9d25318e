// The launches around the one-pass kernel (cuda_one_pass.cuh): the classes of all pixels and the
// divisor of the mean before it, the loss after it. Blocks write their totals, and one block adds
// them in a fixed order.
#pragma once

#include <limits>

#include "common/labels.cuh"
#include "common/launch.cuh"

namespace mcibi_fast {

inline constexpr int kTotalThreads = 256;
inline constexpr int64_t kMostTargetBlocks = 1024;

// The number of valid pixels, and the sum of the weights of their classes.
struct ValidTotal {
  double valid, weight;
};

// What the loss and its gradient are divided by.
struct Divisor {
  double value, inverse;
};

// Called by all threads: the sum over the block's threads, for thread 0.
template <int kThreads>
__device__ __forceinline__ double block_sum(double value) {
  MCIBI_SHARED(warps, double[kThreads / 32]);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(kFullWarp, value, mask);
  __syncthreads();  // an earlier sum has been added
  if (thread % 32 == 0) warps[thread / 32] = value;
  __syncthreads();  // the warps' sums are known
  double sum = 0;
  if (thread == 0)
    for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) sum += warps[i];
  return sum;
}

struct TargetInput {
  LabelMap labels;
  LabelFlag flag;
  int64_t rows;         // of all images
  const float* weight;  // (K,) or null
  int16_t* targets;     // (B, H, W): the class, or -1
  ValidTotal* totals;   // of the blocks
};

// Writes every pixel's class in two bytes, whatever the labels are stored in.
__global__ void __launch_bounds__(kTotalThreads) cross_entropy_targets_kernel(TargetInput input) {
  LabelReader labels(input.labels);
  const int height = static_cast<int>(input.labels.height);
  const int width = static_cast<int>(input.labels.width);
  double valid = 0, weight = 0;
  for (int64_t row = blockIdx.x; row < input.rows; row += gridDim.x) {
    const int b = static_cast<int>(row / height), y = static_cast<int>(row - b * int64_t(height));
    for (int x = static_cast<int>(threadIdx.x); x < width; x += kTotalThreads) {
      const int label = labels.read(b, y, x);
      input.targets[row * width + x] = static_cast<int16_t>(label);
      if (label < 0) continue;
      valid += 1;
      if (input.weight != nullptr) weight += input.weight[label];
    }
  }
  labels.report(input.flag);
  valid = block_sum<kTotalThreads>(valid);
  weight = block_sum<kTotalThreads>(weight);
  if (threadIdx.x == 0) input.totals[blockIdx.x] = {valid, weight};
}

// One block. Without a valid pixel the mean is 0; weights that are all 0 make it NaN.
__global__ void __launch_bounds__(kTotalThreads)
    cross_entropy_divisor_kernel(const ValidTotal* totals, int count, bool weighted, bool mean,
                                 Divisor* divisor) {
  double valid = 0, weight = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kTotalThreads) {
    valid += totals[i].valid;
    weight += totals[i].weight;
  }
  valid = block_sum<kTotalThreads>(valid);
  weight = block_sum<kTotalThreads>(weight);
  if (threadIdx.x != 0) return;
  double value = weighted ? weight : valid;
  if (value == 0) value = std::numeric_limits<double>::quiet_NaN();
  if (!mean || valid == 0) value = 1;
  *divisor = {value, 1 / value};
}

// One block.
__global__ void __launch_bounds__(kTotalThreads)
    cross_entropy_loss_kernel(const double* losses, int64_t count, const Divisor* divisor,
                              float* loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kTotalThreads) sum += losses[i];
  sum = block_sum<kTotalThreads>(sum);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum / divisor->value);
}

}  // namespace mcibi_fast
