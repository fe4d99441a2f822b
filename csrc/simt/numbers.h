// Conversions between number formats as the device's instructions do them, NaNs included.
#pragma once

#include <stdint.h>
#include <string.h>

namespace moebius::simt {

inline uint32_t bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}
inline float from_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

// `value` >> `shift`, rounded to nearest even; shift in [1, 31].
inline uint32_t round_shift(uint32_t value, int shift) {
  const uint32_t half = (1u << (shift - 1)) - 1;
  return (value + half + ((value >> shift) & 1)) >> shift;
}

// To a format of `exponent_bits` and `mantissa_bits` without its sign; overflow carries on past the
// largest exponent and is the caller's to see. Not for NaN.
inline uint32_t narrow(uint32_t magnitude, int exponent_bits, int mantissa_bits) {
  const int bias_change = 127 - ((1 << (exponent_bits - 1)) - 1);
  const int exponent = static_cast<int>(magnitude >> 23) - bias_change;
  const int shift = 23 - mantissa_bits;
  if (exponent > 0) {
    return round_shift(magnitude - (static_cast<uint32_t>(bias_change) << 23), shift);
  }
  const int subnormal_shift = shift + 1 - exponent;
  if (subnormal_shift > 25) return 0;
  return round_shift((magnitude & 0x7fffffu) | 0x800000u, subnormal_shift);
}

inline uint32_t bf16_bits(float f) {
  const uint32_t u = bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
}

inline uint32_t fp16_bits(float f) {
  const uint32_t u = bits(f), a = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  if (a > 0x7f800000u) return 0x7fffu;
  if (a >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  return sign | narrow(a, 5, 10);
}

inline float from_fp16(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, fields = (half & 0x7fffu) << 13;
  if ((half & 0x7c00u) == 0x7c00u) return from_bits(sign | fields | 0x7f800000u);
  return from_bits(sign | bits(from_bits(fields) * 0x1p112f));
}

inline uint32_t e4m3_bits(float f) {
  const uint32_t u = bits(f), a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return 0x7fu;
  const uint32_t finite = a >= 0x43e00000u ? 0x7eu : narrow(a, 4, 3);
  return ((u >> 24) & 0x80u) | (finite > 0x7eu ? 0x7eu : finite);
}

}  // namespace moebius::simt
