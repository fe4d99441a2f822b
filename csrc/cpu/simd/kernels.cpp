#include "cpu/simd/kernels.h"

#include <string.h>

namespace moebius::cpu {

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

namespace {

bool is_supported(const Kernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&kernels == &kAvx512Kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (&kernels == &kAvx2Kernels) return __builtin_cpu_supports("avx2");
#endif
  return &kernels == &kScalarKernels;
}

}  // namespace

const Kernels* find_kernels(const char* name) {
  const Kernels* const tables[] = {
#if defined(__x86_64__)
      &kAvx512Kernels,
      &kAvx2Kernels,
#endif
      &kScalarKernels,
  };
  for (const Kernels* table : tables) {
    const bool is_wanted = name[0] == '\0' || strcmp(name, table->name) == 0;
    if (is_wanted && is_supported(*table)) return table;
  }
  return nullptr;
}

}  // namespace moebius::cpu
