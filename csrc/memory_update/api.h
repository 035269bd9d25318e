// Launch declarations of the memory update (Eqs. 6-9), free of torch: raw pointers, sizes, strides
// in elements.
//
// With U the bilinear upsampling and A = U^T onehot(GT), the sum over the pixels of class c of the
// upsampled features is sum_j A[j, c] R_j: nothing is upsampled.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtypes.h"
#include "common/labels.h"

namespace mcibi_fast {

// --- CPU ----------------------------------------------------------------------------------------

// R, or the gradient to it: (B, Z, h, w); strides in elements.
struct FeatureMap {
  const void* data;
  FloatKind kind;
  int64_t batch, channels, height, width;
  int64_t stride_b, stride_z, stride_y, stride_x;
};

// sums (K, Z) and counts (K,), both contiguous and overwritten. With a bad label the sums are not
// computed.
MCIBI_DECLARE_CPU_KERNEL(class_feature_sums_cpu,
                         (const FeatureMap& features, const LabelMap& labels, bool align_corners,
                          double* sums, int64_t* counts, BadLabel* bad))

// The adjoint: grad_features[j, z] = sum_c A[j, c] grad_sums[c, z], with grad_sums (K, Z)
// contiguous; grad_features, whose data are written, is contiguous too.
MCIBI_DECLARE_CPU_KERNEL(class_feature_sums_backward_cpu,
                         (const double* grad_sums, const LabelMap& labels, bool align_corners,
                          const FeatureMap& grad_features, BadLabel* bad))

// Eqs. 9 and 6 on contiguous memory (K, 2), in place; classes with no pixel keep their row.
MCIBI_DECLARE_CPU_KERNEL(moving_average_cpu,
                         (const double* sums, const int64_t* counts, int64_t num_classes,
                          int64_t channels, double momentum, bool unbiased, double* memory))

// --- CUDA ---------------------------------------------------------------------------------------
// Launchers: pointers to device memory; nothing waits for the device, so that a CUDA graph can
// capture them, and nothing is allocated. They return null, or what the CUDA runtime said.
//
// The scratch memory they ask for holds, for N low-resolution pixels and s <= 384 slices of them,
// 4 N K bytes (one weight per low-resolution pixel and class, of which those of the classes that
// are there are touched), 16 N K / 64 for indices and 4 s K Z for partial sums (s = 384 * 64 / Z
// where there is work enough); the weights and sums of float64 features take twice that.

inline constexpr int64_t kMaxCudaClasses = 4096;  // a block numbers the classes in shared memory

// The memory before and after: (K, 2), float32 or float64.
struct MemoryUpdate {
  const void* memory;
  void* next;  // contiguous
  FloatKind kind;
  int64_t stride_k, stride_column;
  double momentum;
  bool unbiased;
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

// grad_sums: (K, Z) contiguous, float32 (float64 for float64 grad_features); grad_features, whose
// data are written, is contiguous.
size_t class_feature_sums_backward_cuda_scratch(const FeatureMap& grad_features,
                                                const LabelMap& labels);
const char* class_feature_sums_backward_cuda(const void* grad_sums, const LabelMap& labels,
                                             bool align_corners, const FeatureMap& grad_features,
                                             LabelFlag flag, void* scratch, CudaStream stream);

}  // namespace mcibi_fast
