// Dispatch receive: the scales of a row.
#pragma once

#include "cuda/rank.cuh"

namespace moebius::cuda {

// The scales of a cell on their way to its rows. A lane has read the first of them; there are more
// only where H is above 16384.
struct Scales {
  static constexpr int kAhead = 4;
  const uint32_t* from = nullptr;  // null: nothing to write
  uint32_t words[kAhead] = {};

  MOEBIUS_DEVICE static int num_words(const DispatchRecvParams& p) {
    return static_cast<int>(p.self.layout.shape.scale_bytes / 4);
  }
  MOEBIUS_DEVICE void read(const DispatchRecvParams& p, const std::byte* cell) {
    from = reinterpret_cast<const uint32_t*>(cell + p.self.layout.scales_in_cell);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int w = i * kWarp + lane();
      words[i] = w < num_words(p) ? load(from + w) : 0;
    }
  }
  MOEBIUS_DEVICE void write(const DispatchRecvParams& p, int64_t expert, int64_t row) const {
    std::byte* to = p.scales + expert * p.scale_strides[0] + row * p.scale_strides[1];
    const auto put = [&](int w, uint32_t word) {
      if (w < num_words(p)) store(reinterpret_cast<uint32_t*>(to + w * p.scale_strides[2]), word);
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) put(i * kWarp + lane(), words[i]);
    for (int w = kAhead * kWarp + lane(); w < num_words(p); w += kWarp) put(w, load(from + w));
  }
};

}  // namespace moebius::cuda
