// Eight or four numbers of a 16-byte vector as floats and back, and the quantisation to FP8; bit
// for bit what the CPU engine computes (csrc/cpu/simd/kernels.inl).
#pragma once

#include "cuda/device.cuh"
#include "formats.h"

namespace moebius::cuda {

template <Dtype kDtype>
struct Numbers {
  static constexpr int kCount = kDtype == Dtype::kFp32 ? 4 : 8;

  MOEBIUS_DEVICE static void widen(const Vec16& v, float* f) {
    for (int i = 0; i < 4; ++i) {
      if constexpr (kDtype == Dtype::kFp32) {
        f[i] = float_of(v.w[i]);
      } else if constexpr (kDtype == Dtype::kBf16) {
        f[2 * i] = float_of(v.w[i] << 16);
        f[2 * i + 1] = float_of(v.w[i] & 0xffff0000u);
      } else {
        f[2 * i] = float_of_fp16(v.w[i] & 0xffffu);
        f[2 * i + 1] = float_of_fp16(v.w[i] >> 16);
      }
    }
  }
  MOEBIUS_DEVICE static Vec16 narrow(const float* f) {
    Vec16 v;
    for (int i = 0; i < 4; ++i) {
      if constexpr (kDtype == Dtype::kFp32) {
        v.w[i] = bits_of(f[i]);
      } else if constexpr (kDtype == Dtype::kBf16) {
        v.w[i] = bf16x2(f[2 * i], f[2 * i + 1]);
      } else {
        v.w[i] = fp16x2(f[2 * i], f[2 * i + 1]);
      }
    }
    return v;
  }
};

// The scale of a group of channels and its inverse.
struct Scale {
  float scale;
  float inverse;
  uint32_t exponent;  // of the scale, biased; for UE8M0
};

MOEBIUS_DEVICE Scale scale_of(float amax, ScaleFormat format) {
  Scale s;
  s.scale = divide(amax, 448.0f);
  s.inverse = divide(448.0f, amax);
  s.exponent = 0;
  if (format != ScaleFormat::kFp32) {
    const uint32_t u = bits_of(s.scale);
    s.exponent = (u >> 23) + ((u & 0x7fffffu) != 0 ? 1u : 0u);  // rounded up to a power of two
    s.scale = float_of(s.exponent << 23);
    s.inverse = divide(1.0f, s.scale);
  }
  return s;
}

constexpr float kLeastAmax = 1e-4f;  // as DeepEP: keeps the scale of an all-zero group finite

}  // namespace moebius::cuda
