// upsample_argmax and upsample_confusion for the CPU, in torch.ops.mcibi_fast_cpu. Python checks
// what a user can get wrong.
#include <torch/csrc/stable/library.h>

#include "common/cpu_binding.h"
#include "common/upsample_binding.h"
#include "upsample_argmax/api.h"

namespace mcibi_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor upsample_argmax(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  const LogitMap map = logit_map(logits, "logits");
  check_map_sizes("size", {height, width});
  Tensor out = empty_cpu({map.batch, height, width}, ScalarType::Long);
  MCIBI_CPU_KERNEL(upsample_argmax_cpu)
  (map, height, width, align_corners, static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor upsample_confusion(const Tensor& logits, const Tensor& labels, int64_t ignore_index,
                          bool align_corners, const Tensor& report) {
  const LogitMap map = logit_map(logits, "logits");
  const LabelMap label = label_map_of(labels, map, ignore_index);
  Tensor counts = empty_cpu({map.classes, map.classes}, ScalarType::Long);
  BadLabel bad = {};
  MCIBI_CPU_KERNEL(upsample_confusion_cpu)
  (map, label, align_corners, static_cast<int64_t*>(counts.mutable_data_ptr()), &bad);
  report_bad_label(report, bad, label);
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mcibi_fast_cpu, m) {
  m.def(cpu_schemas::upsample_argmax);
  m.def(cpu_schemas::upsample_confusion);
}

STABLE_TORCH_LIBRARY_IMPL(mcibi_fast_cpu, CPU, m) {
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
  m.impl("upsample_confusion", TORCH_BOX(&upsample_confusion));
}

}  // namespace mcibi_fast
