#if defined(__x86_64__)

// Before the pragma: what the standard headers define stays callable on any CPU.
#include <stdint.h>
#include <string.h>

#include <cstddef>

#include "cpu/simd/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define MOEBIUS_SIMD_BYTES 32
#define MOEBIUS_SIMD_NAME "avx2"
#define MOEBIUS_SIMD_TABLE kAvx2Kernels
#include "cpu/simd/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
