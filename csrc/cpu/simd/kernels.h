// The arithmetic of the CPU engine, one table per instruction set; the widest that the CPU has is
// taken. All tables give the same bits: sums and products are rounded one by one, never fused.
#pragma once

#include <stdint.h>

#include "formats.h"

namespace moebius::cpu {

struct Kernels {
  const char* name;
  // out[c] = 0 + w[0] * rows[0][c] + w[1] * rows[1][c] + ... in fp32, in that order, rounded once
  // to `dtype`. `weights` null: without the products. `num_rows` may be 0.
  void (*weighted_sum)(void* out,
                       const void* const* rows,
                       const float* weights,
                       int num_rows,
                       int64_t hidden,
                       Dtype dtype);
  // e4m3 of `x` and one scale per 128 channels, that is what multiplies back: float, or its
  // exponent byte.
  void (*quantise)(
      const void* x, Dtype dtype, int64_t hidden, ScaleFormat format, uint8_t* out, void* scales);
};

// Kernels for `name` ("avx512", "avx2", "scalar"), or the widest for an empty one; null if the CPU
// or the build lacks it.
const Kernels* find_kernels(const char* name);

}  // namespace moebius::cpu
