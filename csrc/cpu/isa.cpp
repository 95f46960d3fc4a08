// Run-time choice of the instruction set of the row kernels.
#include <c10/util/Exception.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <string_view>

#include "../primitives.h"
#include "row_kernels.h"

namespace amn::cpu {
namespace {

enum class Isa { kBaseline, kAvx2, kAvx512 };

#if defined(__x86_64__)
// Every machine with AVX2 has F16C, unless a virtual one hides it. Not every compiler's __builtin_cpu_supports knows
// it.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// The best instruction set of the machine, or the lower one that AMN_CPU_ISA names (for tests and for measuring).
Isa detect_isa() {
  Isa best = Isa::kBaseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) best = Isa::kAvx2;
  if (best == Isa::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    best = Isa::kAvx512;
  }
#endif
  const char* name = std::getenv("AMN_CPU_ISA");
  if (name == nullptr || *name == '\0') return best;
  const std::string_view wanted = name;
  const Isa isa = wanted == "avx512" ? Isa::kAvx512 : wanted == "avx2" ? Isa::kAvx2 : Isa::kBaseline;
  TORCH_CHECK(wanted == "baseline" || isa != Isa::kBaseline, "AMN_CPU_ISA must be baseline, avx2 or avx512, got ", name);
  TORCH_CHECK(isa <= best, "AMN_CPU_ISA=", name, ", but this machine does not have it");
  return isa;
}

Isa current_isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

}  // namespace

template <class T>
const RowKernels<T>& kernels() {
  static const RowKernels<T> chosen = [] {
#if defined(__x86_64__)
    if (current_isa() == Isa::kAvx512) return avx512_kernels<T>();
    if (current_isa() == Isa::kAvx2) return avx2_kernels<T>();
#endif
    return baseline_kernels<T>();
  }();
  return chosen;
}
template const RowKernels<float>& kernels<float>();
template const RowKernels<double>& kernels<double>();

const char* isa() {
  switch (current_isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace amn::cpu
