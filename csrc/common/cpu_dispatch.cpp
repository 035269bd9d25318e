#include "common/cpu_dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mcibi_fast {
namespace {

CpuArch best_arch() {
#if defined(MCIBI_CPU_FLAVOURS)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") &&
                  __builtin_cpu_supports("movbe");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? CpuArch::kV4 : v3 ? CpuArch::kV3 : CpuArch::kBaseline;
#else
  return CpuArch::kBaseline;
#endif
}

CpuArch choose_arch() {
  const CpuArch best = best_arch();
  const char* wanted = std::getenv("MCIBI_FAST_CPU");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (CpuArch arch : {CpuArch::kBaseline, CpuArch::kV3, CpuArch::kV4}) {
    if (std::strcmp(wanted, cpu_arch_name(arch)) != 0) continue;
    if (arch <= best) return arch;
    throw std::invalid_argument(std::string("MCIBI_FAST_CPU=") + wanted +
                                ": this CPU, or this build, goes up to " + cpu_arch_name(best));
  }
  throw std::invalid_argument(std::string("MCIBI_FAST_CPU=") + wanted +
                              ": expected baseline, v3 or v4");
}

}  // namespace

CpuArch cpu_arch() {
  static const CpuArch arch = choose_arch();
  return arch;
}

const char* cpu_arch_name(CpuArch arch) {
  return arch == CpuArch::kV4 ? "v4" : arch == CpuArch::kV3 ? "v3" : "baseline";
}

}  // namespace mcibi_fast
