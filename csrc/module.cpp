// The Python module mcibi_fast._C. Importing it registers the CPU operators (each op's
// binding_cpu.cpp, in torch.ops.mcibi_fast_cpu); the functions here say how it was built.
#include <pybind11/pybind11.h>

#include "common/cpu_dispatch.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = MCIBI_FAST_VERSION;
  info["torch"] = MCIBI_FAST_TORCH;
  info["compiler"] = __VERSION__;
  info["cpu_flavour"] = mcibi_fast::cpu_arch_name(mcibi_fast::cpu_arch());
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "Version, the torch headers it was compiled with, the compiler, the CPU flavour in use.");
}
