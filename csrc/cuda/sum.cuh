// Sums of rows in fp32, in the order of the lanes, rounded once: bit for bit what the CPU engine
// computes.
#pragma once

#include "cuda/numbers.cuh"
#include "cuda/work.cuh"

namespace moebius::cuda {

// Slices of a row, for a warp each, of `unroll` vectors a lane; few rows are then spread over many
// warps.
MOEBIUS_HD constexpr int num_slices(int64_t row_bytes, int unroll = kSumUnroll) {
  return static_cast<int>((row_bytes / 16 + unroll * kWarp - 1) / (unroll * kWarp));
}

// One sum: out[v] = sum over the lanes in `which`, ascending, of weight * row[v], for the 16-byte
// vectors [begin, end) of a row.
struct Sum {
  std::byte* out;
  const std::byte* row;  // of this lane
  float weight;          // of this lane
  uint32_t which;
  int begin, end;
};

// This lane's vectors of the row of lane `from`; zeros if `is_empty`.
MOEBIUS_DEVICE void fetch_row(const Sum& sum, int from, bool is_empty, Vec16* raw) {
  const auto* vectors = reinterpret_cast<const Vec16*>(shfl(sum.row, from));
#pragma unroll
  for (int u = 0; u < kSumUnroll; ++u) {
    const int v = sum.begin + u * kWarp + lane();
    raw[u] = Vec16{{0, 0, 0, 0}};
    if (!is_empty && v < sum.end) raw[u] = load_last(vectors + v);
  }
}

// All sums that `items.next(&sum)` gives until it is false. While a row is added, the next one is
// on its way, be it of the next sum. The whole warp calls.
template <Dtype kDtype, bool kHasWeights, class Items>
MOEBIUS_DEVICE void sum_rows(Items& items) {
  constexpr int kCount = Numbers<kDtype>::kCount;
  Sum sum, after;
  if (!items.next(&sum)) return;
  Vec16 ahead[kSumUnroll];
  fetch_row(sum, lowest(sum.which) & (kWarp - 1), sum.which == 0, ahead);
  for (bool is_more = true; is_more; sum = after) {
    is_more = items.next(&after);
    float sums[kSumUnroll][kCount];
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) sums[u][c] = 0.0f;
    }
    uint32_t rest = sum.which;
    do {
      const float w = kHasWeights ? shfl(sum.weight, lowest(rest) & (kWarp - 1)) : 1.0f;
      rest &= rest - 1;
      Vec16 raw[kSumUnroll];
#pragma unroll
      for (int u = 0; u < kSumUnroll; ++u) raw[u] = ahead[u];
      if (rest != 0) {
        fetch_row(sum, lowest(rest), false, ahead);
      } else if (is_more) {
        fetch_row(after, lowest(after.which) & (kWarp - 1), after.which == 0, ahead);
      }
#pragma unroll
      for (int u = 0; u < kSumUnroll; ++u) {
        float f[kCount];
        Numbers<kDtype>::widen(raw[u], f);
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          sums[u][c] = add(sums[u][c], kHasWeights ? mul(f[c], w) : f[c]);
        }
      }
    } while (rest != 0);
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      const int v = sum.begin + u * kWarp + lane();
      if (v < sum.end)
        store(reinterpret_cast<Vec16*>(sum.out) + v, Numbers<kDtype>::narrow(sums[u]));
    }
  }
}

constexpr int kRowsAhead = 4;

// Likewise, where each sum is of one vector a lane: it has registers for many rows at a time, and
// waits for few of them one after the other.
template <Dtype kDtype, bool kHasWeights, class Items>
MOEBIUS_DEVICE void sum_narrow_rows(Items& items) {
  constexpr int kCount = Numbers<kDtype>::kCount;
  Sum sum;
#pragma unroll 1
  while (items.next(&sum)) {
    const int v = sum.begin + lane();
    float sums[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) sums[c] = 0.0f;
#pragma unroll 1
    for (uint32_t rest = sum.which; rest != 0;) {
      Vec16 raw[kRowsAhead];
      uint32_t left = rest;
#pragma unroll
      for (int r = 0; r < kRowsAhead; ++r, left &= left - 1) {
        const auto* row = reinterpret_cast<const Vec16*>(shfl(sum.row, lowest(left) & (kWarp - 1)));
        raw[r] = Vec16{{0, 0, 0, 0}};
        if (left != 0 && v < sum.end) raw[r] = load_last(row + v);
      }
#pragma unroll
      for (int r = 0; r < kRowsAhead; ++r) {
        if (rest == 0) break;
        const float w = kHasWeights ? shfl(sum.weight, lowest(rest)) : 1.0f;
        rest &= rest - 1;
        float f[kCount];
        Numbers<kDtype>::widen(raw[r], f);
#pragma unroll
        for (int c = 0; c < kCount; ++c) sums[c] = add(sums[c], kHasWeights ? mul(f[c], w) : f[c]);
      }
    }
    if (v < sum.end) store(reinterpret_cast<Vec16*>(sum.out) + v, Numbers<kDtype>::narrow(sums));
  }
}

}  // namespace moebius::cuda
