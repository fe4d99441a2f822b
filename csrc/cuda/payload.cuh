// A row of x as it becomes a payload: moved as it is, or quantised to FP8 in registers.
#pragma once

#include "cuda/numbers.cuh"
#include "cuda/rank.cuh"

namespace moebius::cuda {

// A unit is what a lane makes of one vector of x (of two, for fp32): its bytes in the payload.
MOEBIUS_HD constexpr int64_t out_unit(Encoding encoding) {
  return encoding == Encoding::kQuantise ? 8 : 16;
}
constexpr int kGroupUnits = kScaleGroup / 8;  // of a group of channels: half a warp

// What a lane has of x at a time.
template <Encoding kEncoding, Dtype kX>
struct Fetched {
  static constexpr bool kQuantises = kEncoding == Encoding::kQuantise;
  static constexpr int kVectors = kQuantises && kX == Dtype::kFp32 ? 2 : 1;
  // Of a lane. What quantises is long, and few of it in turn are sooner done than many at once.
  static constexpr int kPerLane = kQuantises ? kUnroll / 2 : kUnroll;
  static constexpr int kUnits = kPerLane * kWarp;
  Vec16 raw[kPerLane][kVectors];

  // Units [base, base + kUnits), as far as they are below `end`.
  MOEBIUS_DEVICE void fetch(const std::byte* row, int base, int end) {
    const Vec16* x = reinterpret_cast<const Vec16*>(row);
#pragma unroll
    for (int u = 0; u < kPerLane; ++u) {
      const int unit = base + u * kWarp + lane();
      for (int v = 0; v < kVectors; ++v) {
        raw[u][v] = Vec16{{0, 0, 0, 0}};
        if (unit < end) raw[u][v] = load_stream(x + unit * kVectors + v);
      }
    }
  }
};

// Those units as payload into the stage, which begins with unit `begin`; their scales into
// `scales`.
template <Encoding kEncoding, Dtype kX>
MOEBIUS_DEVICE void fill_stage(const Rank& self,
                               const Fetched<kEncoding, kX>& fetched,
                               int base,
                               int begin,
                               int end,
                               std::byte* stage,
                               float* scales) {
#pragma unroll
  for (int u = 0; u < Fetched<kEncoding, kX>::kPerLane; ++u) {
    const int unit = base + u * kWarp + lane();
    std::byte* to = stage + (unit - begin) * out_unit(kEncoding);
    if constexpr (kEncoding == Encoding::kCopy) {
      if (unit < end) store(reinterpret_cast<Vec16*>(to), fetched.raw[u][0]);
    } else {
      float f[8];
      for (int v = 0; v < Fetched<kEncoding, kX>::kVectors; ++v) {
        Numbers<kX>::widen(fetched.raw[u][v], f + v * Numbers<kX>::kCount);
      }
      float amax = kLeastAmax;
      for (int c = 0; c < 8; ++c) {
        const float a = float_of(bits_of(f[c]) & 0x7fffffffu);
        amax = a > amax ? a : amax;
      }
      for (int mask = 1; mask < kGroupUnits; mask *= 2) {
        const float other = shfl_xor(amax, mask);
        amax = other > amax ? other : amax;
      }
      const Scale scale = scale_of(amax, self.scale_format);
      uint32_t packed[2];
      for (int h = 0; h < 2; ++h) {
        const float* g = f + 4 * h;
        packed[h] = e4m3x2(mul(g[0], scale.inverse), mul(g[1], scale.inverse)) |
                    e4m3x2(mul(g[2], scale.inverse), mul(g[3], scale.inverse)) << 16;
      }
      if (unit < end) {
        store(reinterpret_cast<uint64_t*>(to), static_cast<uint64_t>(packed[1]) << 32 | packed[0]);
        if (lane() % kGroupUnits == 0) {
          const bool is_byte = self.scale_format == ScaleFormat::kUe8m0;
          store(scales + (unit - begin) / kGroupUnits,
                is_byte ? float_of(scale.exponent) : scale.scale);
        }
      }
    }
  }
}

}  // namespace moebius::cuda
