#include <stdint.h>
#include <string.h>

#include <cstddef>

#include "cpu/simd/kernels.h"

// 16 bytes: what every x86-64 and arm64 has.
#define MOEBIUS_SIMD_BYTES 16
#define MOEBIUS_SIMD_NAME "scalar"
#define MOEBIUS_SIMD_TABLE kScalarKernels
#include "cpu/simd/kernels.inl"
