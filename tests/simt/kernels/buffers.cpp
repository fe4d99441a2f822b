#include "buffers.h"

#include <cstring>

namespace moebius::kernels_test {

const char* name_of(Field field) {
  constexpr const char* kNames[] = {"x",
                                    "scales",
                                    "topk_ids",
                                    "topk_weights",
                                    "num_valid_tokens",
                                    "received x",
                                    "received scales",
                                    "src_info",
                                    "layout_range",
                                    "received topk_ids",
                                    "received topk_weights",
                                    "expert_num_tokens",
                                    "src_num_tokens",
                                    "expert_out",
                                    "out"};
  static_assert(sizeof kNames / sizeof *kNames == kNumFields);
  return kNames[field];
}

BufferLayout BufferLayout::of(const Case& c, const Flavour& flavour) {
  const int64_t m = c.max_num_tokens, k = c.num_topk, cells = c.num_cells();
  const int64_t local = c.num_local_experts();
  const int64_t lists = c.is_token_major ? 1 : local;
  const bool has_given_scales = c.payload == Payload::kOpaque || c.payload == Payload::kScaled;
  BufferLayout b{};
  b.num_bytes[kX] = m * flavour.x_stride;
  b.num_bytes[kScales] = has_given_scales ? m * c.scale_bytes() : 0;
  b.num_bytes[kIds] = m * k * (flavour.has_int64_ids ? 8 : 4);
  b.num_bytes[kWeights] = m * k * 4;
  b.num_bytes[kValid] = flavour.has_valid ? 8 : 0;
  b.num_bytes[kReceivedX] = lists * cells * c.payload_bytes();
  b.num_bytes[kReceivedScales] = lists * cells * c.scale_bytes();
  b.num_bytes[kSrcInfo] = c.is_token_major ? 0 : local * cells * 4;
  b.num_bytes[kLayoutRange] = c.is_token_major ? 0 : local * c.num_ranks * 8;
  b.num_bytes[kReceivedIds] = c.is_token_major ? cells * k * 4 : 0;
  b.num_bytes[kReceivedWeights] = b.num_bytes[kReceivedIds];
  b.num_bytes[kExpertCounts] = local * 4;
  b.num_bytes[kSrcCounts] = c.num_ranks * 4;
  b.num_bytes[kExpertOut] = lists * cells * c.reply_bytes();
  b.num_bytes[kOut] = m * c.reply_bytes();
  int64_t at = 0;
  for (int f = 0; f < kNumFields; ++f) {
    b.offset[f] = at;
    at = align_up(at + b.num_bytes[f], 64);
  }
  b.offset[kNumFields] = at;
  return b;
}

void scale_strides(const Case& c, const Flavour& flavour, int64_t strides[3]) {
  strides[0] = c.num_cells() * c.scale_bytes();
  strides[1] = flavour.has_columns_of_scales ? 4 : c.scale_bytes();
  strides[2] = flavour.has_columns_of_scales ? c.num_cells() * int64_t{4} : 4;
}

void fill(const Flavour& flavour,
          const BufferLayout& layout,
          const RoundInput& in,
          std::byte* base) {
  memset(base, kPoison, static_cast<size_t>(layout.total()));
  memcpy(base + layout.offset[kX], in.x.data(), in.x.size());
  if (layout.num_bytes[kScales] != 0) {
    memcpy(base + layout.offset[kScales], in.scales.data(), in.scales.size());
  }
  for (size_t i = 0; i < in.topk_ids.size(); ++i) {
    if (flavour.has_int64_ids) {
      layout.at<int64_t>(base, kIds)[i] = in.topk_ids[i];
    } else {
      layout.at<int32_t>(base, kIds)[i] = static_cast<int32_t>(in.topk_ids[i]);
    }
  }
  if (!in.topk_weights.empty()) {
    memcpy(base + layout.offset[kWeights], in.topk_weights.data(), 4 * in.topk_weights.size());
  }
  if (!flavour.has_valid) return;
  if (flavour.has_int64_valid) {
    *layout.at<int64_t>(base, kValid) = in.num_valid;
  } else {
    *layout.at<int32_t>(base, kValid) = static_cast<int32_t>(in.num_valid);
  }
}

}  // namespace moebius::kernels_test
