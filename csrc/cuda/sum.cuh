// Sums of rows in fp32, in the order of the lanes, rounded once: bit for bit what the CPU engine
// computes.
#pragma once

#include "cuda/numbers.cuh"
#include "cuda/rank.cuh"

namespace moebius::cuda {

// out[v] = sum over the lanes in `which`, ascending, of weight * row[v], for the 16-byte vectors
// [begin, end) of a row. `row` and `weight` are this lane's. The whole warp calls.
template <Dtype kDtype, bool kHasWeights>
MOEBIUS_DEVICE void sum_rows(
    std::byte* out, const std::byte* row, float weight, uint32_t which, int begin, int end) {
  constexpr int kCount = Numbers<kDtype>::kCount;
  float sums[kUnroll][kCount];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) sums[u][c] = 0.0f;
  }
  // Two rows are on their way at a time.
  const auto fetch = [&](uint32_t rest, Vec16* raw) {
    const auto* vectors = reinterpret_cast<const Vec16*>(shfl(row, lowest(rest) & (kWarp - 1)));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = begin + u * kWarp + lane();
      raw[u] = Vec16{{0, 0, 0, 0}};
      if (rest != 0 && v < end) raw[u] = load(vectors + v);
    }
  };
  Vec16 ahead[kUnroll];
  fetch(which, ahead);
  for (uint32_t rest = which; rest != 0; rest &= rest - 1) {
    const float w = kHasWeights ? shfl(weight, lowest(rest)) : 1.0f;
    Vec16 raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) raw[u] = ahead[u];
    fetch(rest & (rest - 1), ahead);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float f[kCount];
      Numbers<kDtype>::widen(raw[u], f);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        sums[u][c] = add(sums[u][c], kHasWeights ? mul(f[c], w) : f[c]);
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int v = begin + u * kWarp + lane();
    if (v < end) store(reinterpret_cast<Vec16*>(out) + v, Numbers<kDtype>::narrow(sums[u]));
  }
}

// Slices of a row, for a warp each; few rows are then spread over many warps.
MOEBIUS_HD constexpr int num_slices(int64_t row_bytes) {
  return static_cast<int>((row_bytes / 16 + kUnroll * kWarp - 1) / (kUnroll * kWarp));
}

}  // namespace moebius::cuda
