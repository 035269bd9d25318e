// The predictions of the pixels of one tile (common/upsample_tile.cuh).
//
// Along a column, from one row of the logits to the next, a class stays between its values on the
// two rows. If it stays below the smaller value of another class it cannot win, and its logits at
// the thread's pixels are not interpolated.
#pragma once

#include <limits>

#include "common/upsample_tile.cuh"
#include "upsample_argmax/api.h"

namespace mcibi_fast {

// A bound on the rounding of an interpolated logit, relative to its neighbours.
template <typename T>
inline constexpr T kRounding = 8 * std::numeric_limits<T>::epsilon();

template <typename T, int kRows>
struct Prediction {
  T logit[kRows];  // the largest so far, and its class
  int label[kRows];
  T certain;  // a lower bound of the largest logit, except for rounding

  __device__ Prediction() : certain(-std::numeric_limits<T>::infinity()) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      logit[r] = certain;
      label[r] = 0;
    }
  }

  // Class k, interpolated horizontally on both rows of the logits.
  __device__ __forceinline__ void add(int k, T row0, T row1, const ThreadPixels<T, kRows>& pixels) {
    const T slack = kRounding<T> * (magnitude(row0) + magnitude(row1) + magnitude(certain));
    if (maximum(row0, row1) + slack < certain) return;  // false for NaN, which makes slack NaN
    certain = maximum(certain, minimum(row0, row1));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= pixels.rows) break;
      const T far = pixels.far[r];
      const T value = fused_multiply_add(far, row1, (T(1) - far) * row0);
      if (exceeds(value, logit[r])) {
        logit[r] = value;
        label[r] = k;
      }
    }
  }

 private:
  __device__ static float magnitude(float x) { return fabsf(x); }
  __device__ static double magnitude(double x) { return fabs(x); }
};

// The next `count` classes, the first of which is `first`.
template <typename Value, typename T, int kRows>
__device__ __forceinline__ void predict_classes(Corners<Value> corners, int first, int count,
                                                const ThreadPixels<T, kRows>& pixels,
                                                Prediction<T, kRows>& prediction) {
#pragma unroll 4
  for (int k = 0; k < count; ++k) {
    T row0, row1;
    corners.next(pixels.column, row0, row1);
    prediction.add(first + k, row0, row1, pixels);
  }
}

// Called by all threads of a block. `values` is shared memory for kPatchValues, used if kPatch.
template <bool kPatch, typename Element, typename T, int kRows>
__device__ __forceinline__ Prediction<T, kRows> predict(const UpsampleInput<Element>& input,
                                                        const Tile& tile,
                                                        const ThreadPixels<T, kRows>& pixels,
                                                        T* values) {
  Prediction<T, kRows> prediction;
  if constexpr (kPatch) {
    const Patch<T> patch(input, tile, values);
    const Corners<T> corners = patch.corners(pixels);
    for (int first = 0; first < input.classes; first += input.patch_classes) {
      const int count = min(input.patch_classes, input.classes - first);
      __syncthreads();  // the previous classes have been used
      patch.fill(input, tile.b, first, count, T(0));
      __syncthreads();  // these classes are loaded
      if (pixels.rows > 0) predict_classes(corners, first, count, pixels, prediction);
    }
  } else if (pixels.rows > 0) {
    predict_classes(corners_in_map(input, tile.b, pixels), 0, input.classes, pixels, prediction);
  }
  return prediction;
}

}  // namespace mcibi_fast
