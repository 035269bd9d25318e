// What the library _cpu has besides the ops' operators (each op's binding_cpu.cpp): loading it,
// with torch.ops.load_library, registers them all in torch.ops.mcibi_fast_cpu. It knows nothing of
// Python.
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/cpu_dispatch.h"

namespace mcibi_fast {
namespace {

std::string cpu_flavour() { return cpu_arch_name(cpu_arch()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mcibi_fast_cpu, m) { m.def("cpu_flavour() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(mcibi_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("cpu_flavour", TORCH_BOX(&cpu_flavour));
}

}  // namespace mcibi_fast
