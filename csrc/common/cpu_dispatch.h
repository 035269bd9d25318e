// Chooses the flavour of the CPU kernels. Each csrc/<op>/cpu.cpp is compiled once per flavour, with
// MCIBI_CPU_ARCH as the name of the flavour and of its kernels' namespace:
//
//   baseline   the compiler's default for the machine (SSE2 on x86-64)
//   v3         x86-64-v3: AVX2, FMA, F16C
//   v4         x86-64-v4: AVX-512 F, BW, CD, DQ, VL
//
// A header declares a kernel with MCIBI_DECLARE_CPU_KERNEL(name, (parameters)); the source defines
// it in namespace mcibi_fast::MCIBI_CPU_ARCH; callers write MCIBI_CPU_KERNEL(name)(arguments).
#pragma once

namespace mcibi_fast {

enum class CpuArch { kBaseline, kV3, kV4 };

// The best flavour that this CPU can run, or the one that the environment variable MCIBI_FAST_CPU
// names (baseline, v3 or v4). Throws std::invalid_argument if that is unknown, was not built or
// does not run on this CPU.
CpuArch cpu_arch();

const char* cpu_arch_name(CpuArch arch);

#if defined(MCIBI_CPU_FLAVOURS)

#define MCIBI_DECLARE_CPU_KERNEL(name, parameters) \
  namespace baseline {                             \
  void name parameters;                            \
  }                                                \
  namespace v3 {                                   \
  void name parameters;                            \
  }                                                \
  namespace v4 {                                   \
  void name parameters;                            \
  }

template <typename Kernel>
Kernel* select_cpu_kernel(Kernel* baseline, Kernel* v3, Kernel* v4) {
  const CpuArch arch = cpu_arch();
  return arch == CpuArch::kV4 ? v4 : arch == CpuArch::kV3 ? v3 : baseline;
}

#define MCIBI_CPU_KERNEL(name) \
  ::mcibi_fast::select_cpu_kernel(&baseline::name, &v3::name, &v4::name)

#else  // one portable flavour

#define MCIBI_DECLARE_CPU_KERNEL(name, parameters) \
  namespace baseline {                             \
  void name parameters;                            \
  }

#define MCIBI_CPU_KERNEL(name) (&baseline::name)

#endif

}  // namespace mcibi_fast
