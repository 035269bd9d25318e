// CUDA operators of upsample_argmax and upsample_confusion: cheap checks, allocation, registration.
// Python checks what a user can get wrong (mcibi_fast/ops/upsample_argmax/). Nothing here waits
// for the device.
#include <torch/csrc/stable/library.h>

#include "common/cuda_binding.h"
#include "common/upsample_cuda_binding.h"
#include "upsample_argmax/api.h"

namespace mcibi_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor upsample_argmax(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  const LogitMap map = logit_map(logits, "logits");
  check_cuda_sizes(map, height, width);
  const OnDeviceOf device(logits);
  Tensor prediction = device.empty({map.batch, height, width}, ScalarType::Long);
  check_launch("upsample_argmax",
               upsample_argmax_cuda(map, height, width, align_corners,
                                    static_cast<int64_t*>(prediction.data_ptr()), device.stream()));
  return prediction;
}

Tensor upsample_confusion(const Tensor& logits, const Tensor& labels, int64_t ignore_index,
                          bool align_corners, const Tensor& flag) {
  const LogitMap map = logit_map(logits, "logits");
  const LabelMap label = cuda_label_map_of(labels, logits, map, ignore_index);
  const OnDeviceOf device(logits);
  Tensor confusion = device.empty({map.classes, map.classes}, ScalarType::Long);
  check_launch("upsample_confusion",
               upsample_confusion_cuda(
                   map, label, align_corners, static_cast<int64_t*>(confusion.data_ptr()),
                   label_flag(flag, labels, label_ops::upsample_confusion), device.stream()));
  return confusion;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mcibi_fast_cuda, m) {
  m.def(cuda_schemas::upsample_argmax);
  m.def(cuda_schemas::upsample_confusion);
}

STABLE_TORCH_LIBRARY_IMPL(mcibi_fast_cuda, MCIBI_CUDA_KEY, m) {
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
  m.impl("upsample_confusion", TORCH_BOX(&upsample_confusion));
}

}  // namespace mcibi_fast
