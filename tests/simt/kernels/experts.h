// Stands for the experts: each word of a row's output depends on a word of the row, on the expert
// and on the place. The same code runs as a kernel and, for the reference, on the host.
#pragma once

#include "cuda/device.cuh"
#include "formats.h"

namespace moebius::kernels_test {

using cuda::Vec16;

struct ExpertsParams {
  const std::byte* x;                // as dispatch receive wrote it
  const int32_t* expert_num_tokens;  // [L]
  const int32_t* src_num_tokens;     // [R]
  const int32_t* topk_ids;           // token_major: [R*M, K]
  const float* topk_weights;         // likewise
  std::byte* out;                    // [L, R*M] rows, or [R*M] rows
  int64_t payload_bytes, reply_bytes;
  int32_t num_ranks, max_num_tokens, num_topk, num_local_experts, first_expert;
  Dtype dtype;
  bool is_token_major;
};

inline uint32_t mix(uint32_t h) {
  h = (h ^ h >> 16) * 0x7feb352du;
  h = (h ^ h >> 15) * 0x846ca68bu;
  return h ^ h >> 16;
}

// A number, or two, of moderate size from 32 bits.
inline uint32_t as_numbers(uint32_t h, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFp32:
      return (h & 0x807fffffu) | (124u + (h >> 23 & 3u)) << 23;
    case Dtype::kBf16:
      return (h & 0x807f807fu) | (124u + (h >> 7 & 3u)) << 7 | (124u + (h >> 23 & 3u)) << 23;
    default:
      return (h & 0x83ff83ffu) | (12u + (h >> 10 & 3u)) << 10 | (12u + (h >> 26 & 3u)) << 26;
  }
}

// Its share of the rows; `load` and `store` as in cuda/device.cuh.
template <class Access>
void run_experts(const ExpertsParams& p, int first, int step, const Access& access) {
  const int rows = p.num_ranks * p.max_num_tokens;
  const int vectors = static_cast<int>(p.reply_bytes / 16);
  const int64_t payload_vectors = p.payload_bytes / 16;
  const int num_lists = p.is_token_major ? 1 : p.num_local_experts;
  for (int list = 0; list < num_lists; ++list) {
    const int end = p.is_token_major ? rows : access.load(p.expert_num_tokens + list);
    for (int row = first; row < end; row += step) {
      const int src = row / p.max_num_tokens;
      uint32_t salt = static_cast<uint32_t>(p.first_expert + list) * 7919;
      if (p.is_token_major) {
        if (row % p.max_num_tokens >= access.load(p.src_num_tokens + src)) continue;
        for (int k = 0; k < p.num_topk; ++k) {
          const int at = row * p.num_topk + k;
          salt = mix(salt ^ static_cast<uint32_t>(access.load(p.topk_ids + at)));
          salt = mix(salt ^ access.load(reinterpret_cast<const uint32_t*>(p.topk_weights) + at));
        }
      }
      const int64_t at = int64_t{list} * rows + row;
      const auto* x = reinterpret_cast<const Vec16*>(p.x + at * p.payload_bytes);
      auto* out = reinterpret_cast<Vec16*>(p.out + at * p.reply_bytes);
      for (int v = 0; v < vectors; ++v) {
        Vec16 value = access.load(x + v * payload_vectors / vectors);
        for (int j = 0; j < 4; ++j) {
          const uint32_t place = static_cast<uint32_t>(4 * v + j) * 40503u;
          value.w[j] = as_numbers(mix(value.w[j] ^ mix(salt + place)), p.dtype);
        }
        access.store(out + v, value);
      }
    }
  }
}

}  // namespace moebius::kernels_test
