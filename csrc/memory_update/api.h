// Launch declarations of the memory update (Eqs. 6-9), free of torch: raw pointers, sizes, strides
// in elements.
//
// Let U be the bilinear upsampling and A = U^T onehot(GT). The sum of the upsampled features over
// the pixels of class c is then sum_j A[j, c] R_j, and nothing needs to be upsampled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "common/cpu_dispatch.h"
#include "common/dtypes.h"
#include "common/labels.h"

namespace mcibi_fast {

// ---- CPU ----------------------------------------------------------------------------------------

// R, or the gradient to it: (B, Z, h, w); strides in elements.
struct FeatureMap {
  const void* data;
  FloatKind kind;
  int64_t batch, channels, height, width;
  int64_t stride_b, stride_z, stride_y, stride_x;
};

// The sums of the classes that occur, which are few of many: row i of sums, (count, Z), is that of
// class classes[i], in ascending order.
struct ClassSums {
  std::unique_ptr<int32_t[]> classes;
  std::unique_ptr<double[]> sums;
  int64_t count = 0;
};

// Overwrites sums and counts (K,). If there is a bad label, the sums are not computed.
MCIBI_DECLARE_CPU_KERNEL(class_feature_sums_cpu,
                         (const FeatureMap& features, const LabelMap& labels, bool align_corners,
                          ClassSums& sums, int64_t* counts, BadLabel* bad))

// The adjoint: writes grad_features[j, z] = sum_c A[j, c] grad_sums[c, z]. grad_sums, (K, Z), and
// grad_features are contiguous.
MCIBI_DECLARE_CPU_KERNEL(class_feature_sums_backward_cpu,
                         (const double* grad_sums, const LabelMap& labels, bool align_corners,
                          const FeatureMap& grad_features, BadLabel* bad))

// Eqs. 9 and 6, in place on the contiguous memory (K, 2). Classes without pixels keep their row.
MCIBI_DECLARE_CPU_KERNEL(moving_average_cpu,
                         (const ClassSums& sums, const int64_t* counts, int64_t channels,
                          double momentum, bool unbiased, double* memory))

// ---- CUDA ---------------------------------------------------------------------------------------

// Launchers take pointers to device memory. They neither wait for the device nor allocate, so that
// a CUDA graph can capture them. They return null, or the message of the CUDA runtime.
//
// For N low-resolution pixels in s <= 384 slices, the scratch memory holds 4 N K bytes of weights
// (one per low-resolution pixel and class; only those of the classes present are used) but at most
// 32 MiB, a sixteenth of that for indices and 4 s K Z bytes of partial sums (s = 384 * 64 / Z if
// there is enough work). Sums take twice that for float64 features, weights up to 32 MiB too.

inline constexpr int64_t kMaxCudaClasses = 4096;  // a block numbers the classes in shared memory

// The memory before and after: (K, 2), float32 or float64. A row that would not be finite
// afterwards is kept.
struct MemoryUpdate {
  const void* memory;
  void* next;  // contiguous
  FloatKind kind;
  int64_t stride_k, stride_column;
  double momentum;
  bool unbiased;
  int64_t* kept_rows;  // counts the classes with pixels that keep their row; may be null
};

// sums: (K, Z) float32 (float64 for float64 features), counts: (K,), both contiguous.
size_t class_feature_sums_cuda_scratch(const FeatureMap& features, const LabelMap& labels);
const char* class_feature_sums_cuda(const FeatureMap& features, const LabelMap& labels,
                                    bool align_corners, void* sums, int64_t* counts, LabelFlag flag,
                                    void* scratch, CudaStream stream);

size_t memory_update_cuda_scratch(const FeatureMap& features, const LabelMap& labels);
const char* memory_update_cuda(const FeatureMap& features, const LabelMap& labels,
                               bool align_corners, const MemoryUpdate& update, LabelFlag flag,
                               void* scratch, CudaStream stream);

// grad_sums: (K, Z) contiguous, float32 (float64 for float64 grad_features). Writes grad_features,
// which is contiguous.
size_t class_feature_sums_backward_cuda_scratch(const FeatureMap& grad_features,
                                                const LabelMap& labels);
const char* class_feature_sums_backward_cuda(const void* grad_sums, const LabelMap& labels,
                                             bool align_corners, const FeatureMap& grad_features,
                                             LabelFlag flag, void* scratch, CudaStream stream);

}  // namespace mcibi_fast
