// CUDA operators of the memory update: cheap checks, allocation, registration. Python checks what a
// user can get wrong (mcibi_fast/ops/memory_update/). Nothing here waits for the device.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cuda_binding.h"
#include "memory_update/binding.h"

namespace mcibi_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_sizes(const FeatureMap& features, const Tensor& labels, int64_t num_classes,
                 const Tensor& other) {
  STD_TORCH_CHECK(features.batch == labels.size(0), "features and labels: different batch sizes");
  STD_TORCH_CHECK(num_classes <= kMaxCudaClasses, "num_classes: the CUDA kernels take 1 to ",
                  kMaxCudaClasses, ", got ", num_classes);
  STD_TORCH_CHECK(labels.get_device_index() == other.get_device_index(),
                  "labels: on another device");
  for (const int64_t size : {features.batch, features.channels, features.height, features.width,
                             labels.size(1), labels.size(2)})
    STD_TORCH_CHECK(size > 0 && size < INT32_MAX, "features and labels: no empty dimension");
  // Kernels number the pixels of an image, and the tiles of a batch, by int.
  STD_TORCH_CHECK(features.batch * features.height * features.width < INT32_MAX &&
                      labels.size(1) * labels.size(2) < INT32_MAX,
                  "features and labels: too many pixels for the CUDA kernels (2^31)");
}

Tensor scratch(const OnDeviceOf& device, size_t bytes) {
  return device.empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor> class_feature_sums(const Tensor& features, const Tensor& labels,
                                              int64_t num_classes, int64_t ignore_index,
                                              bool align_corners, const Tensor& flag) {
  const FeatureMap map = feature_map(features);
  const LabelMap label = label_map(labels, num_classes, ignore_index);
  check_sizes(map, labels, label.num_classes, features);
  const OnDeviceOf device(features);
  Tensor sums = device.empty({num_classes, map.channels}, wide_type(features.scalar_type()));
  Tensor counts = device.empty({num_classes}, ScalarType::Long);
  const Tensor work = scratch(device, class_feature_sums_cuda_scratch(map, label));
  check_launch("class_feature_sums",
               class_feature_sums_cuda(map, label, align_corners, sums.data_ptr(),
                                       static_cast<int64_t*>(counts.data_ptr()),
                                       label_flag(flag, labels, label_ops::class_feature_sums),
                                       work.data_ptr(), device.stream()));
  return {sums, counts};
}

Tensor class_feature_sums_backward(const Tensor& grad_sums, const Tensor& labels, int64_t height,
                                   int64_t width, int64_t ignore_index, bool align_corners,
                                   ScalarType dtype, const Tensor& flag) {
  STD_TORCH_CHECK(grad_sums.dim() == 2 && grad_sums.scalar_type() == wide_type(dtype),
                  "grad_sums: expected (K, Z) in the dtype of the sums");
  const OnDeviceOf device(grad_sums);
  const Tensor grad = torch::stable::contiguous(grad_sums);
  const Tensor grad_features =
      device.empty({labels.size(0), grad_sums.size(1), height, width}, dtype);
  const FeatureMap map = feature_map(grad_features);
  const LabelMap label = label_map(labels, grad_sums.size(0), ignore_index);
  check_sizes(map, labels, label.num_classes, grad_sums);
  const Tensor work = scratch(device, class_feature_sums_backward_cuda_scratch(map, label));
  check_launch("class_feature_sums_backward",
               class_feature_sums_backward_cuda(
                   grad.const_data_ptr(), label, align_corners, map,
                   label_flag(flag, labels, label_ops::class_feature_sums_backward),
                   work.data_ptr(), device.stream()));
  return grad_features;
}

Tensor memory_update(const Tensor& memory, const Tensor& features, const Tensor& labels,
                     double momentum, bool unbiased, int64_t ignore_index, bool align_corners,
                     const Tensor& flag, const Tensor& kept_rows) {
  STD_TORCH_CHECK(memory.dim() == 2 && memory.size(1) == 2, "memory: expected (K, 2)");
  STD_TORCH_CHECK(
      memory.scalar_type() == ScalarType::Float || memory.scalar_type() == ScalarType::Double,
      "memory: expected float32 or float64");
  STD_TORCH_CHECK(memory.get_device_index() == features.get_device_index(),
                  "memory: on another device");
  const FeatureMap map = feature_map(features);
  const LabelMap label = label_map(labels, memory.size(0), ignore_index);
  check_sizes(map, labels, label.num_classes, features);
  const OnDeviceOf device(features);
  Tensor next = device.empty({memory.size(0), 2}, memory.scalar_type());
  const Tensor work = scratch(device, memory_update_cuda_scratch(map, label));
  const MemoryUpdate update = {memory.const_data_ptr(),
                               next.data_ptr(),
                               float_kind(memory, "memory"),
                               memory.stride(0),
                               memory.stride(1),
                               momentum,
                               unbiased,
                               row_counter(kept_rows, memory)};
  check_launch("memory_update",
               memory_update_cuda(map, label, align_corners, update,
                                  label_flag(flag, labels, label_ops::memory_update),
                                  work.data_ptr(), device.stream()));
  return next;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mcibi_fast_cuda, m) {
  m.def(cuda_schemas::class_feature_sums);
  m.def(cuda_schemas::class_feature_sums_backward);
  m.def(cuda_schemas::memory_update);
}

STABLE_TORCH_LIBRARY_IMPL(mcibi_fast_cuda, MCIBI_CUDA_KEY, m) {
  m.impl("class_feature_sums", TORCH_BOX(&class_feature_sums));
  m.impl("class_feature_sums_backward", TORCH_BOX(&class_feature_sums_backward));
  m.impl("memory_update", TORCH_BOX(&memory_update));
}

}  // namespace mcibi_fast
