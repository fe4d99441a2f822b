#if defined(__x86_64__)

// Before the pragma: what the standard headers define stays callable on any CPU.
#include <stdint.h>
#include <string.h>

#include <cstddef>

#include "cpu/simd/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif

#define MOEBIUS_SIMD_BYTES 64
#define MOEBIUS_SIMD_NAME "avx512"
#define MOEBIUS_SIMD_TABLE kAvx512Kernels
#include "cpu/simd/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
