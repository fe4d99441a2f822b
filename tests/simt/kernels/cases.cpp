#include "cases.h"

namespace moebius::kernels_test {
namespace {

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFp32 ? 4 : 2; }

constexpr Dtype kBf16 = Dtype::kBf16, kFp16 = Dtype::kFp16, kFp32 = Dtype::kFp32;
constexpr ScaleFormat kPlainScale = ScaleFormat::kFp32;

}  // namespace

int64_t Case::x_bytes() const {
  return payload == Payload::kQuantised ? hidden * bytes_of(dtype) : payload_bytes();
}

int64_t Case::payload_bytes() const {
  switch (payload) {
    case Payload::kRows:
      return hidden * bytes_of(dtype);
    case Payload::kOpaque:
      return hidden / 2 + 48;  // no power of two
    default:
      return hidden;
  }
}

int64_t Case::scale_bytes() const {
  switch (payload) {
    case Payload::kRows:
      return 0;
    case Payload::kOpaque:
      return 20;
    default:
      return hidden / kScaleGroup * (scale_format == ScaleFormat::kUe8m0 ? 1 : 4);
  }
}

int64_t Case::reply_bytes() const { return hidden * bytes_of(output_dtype); }

Shape Case::shape() const {
  return {num_ranks,
          num_experts,
          num_topk,
          max_num_tokens,
          depth,
          payload_bytes(),
          scale_bytes(),
          reply_bytes(),
          has_weights,
          !is_token_major};
}

const std::vector<Case>& all_cases() {
  using O = Order;
  using P = Payload;
  constexpr ScaleFormat kPow2 = ScaleFormat::kPow2, kUe8m0 = ScaleFormat::kUe8m0;
  constexpr bool kDispatch = true, kCombine = false;  // where the weights are given
  constexpr bool kTokenMajor = true, kExpertMajor = false;
  // clang-format off
  static const std::vector<Case> cases = {
    // name, order, R, E, K, M, D, payload, dtype, output, scales, H, weights at, layout, rounds
    {"plain", O::kPlain, 3, 6, 3, 6, 2, P::kRows, kBf16, kBf16, kPlainScale, 256, kDispatch, kExpertMajor, 4},
    {"interleaved", O::kInterleaved, 3, 6, 2, 5, 2, P::kRows, kBf16, kBf16, kPlainScale, 128, kDispatch, kExpertMajor, 6},
    {"deep", O::kInterleaved, 2, 4, 4, 5, 3, P::kRows, kFp32, kFp32, kPlainScale, 128, kDispatch, kExpertMajor, 8},
    {"shallow", O::kPlain, 3, 6, 2, 5, 1, P::kRows, kFp16, kFp16, kPlainScale, 128, kDispatch, kExpertMajor, 5},
    {"dispatch-only", O::kDispatchOnly, 3, 6, 2, 5, 2, P::kRows, kBf16, kBf16, kPlainScale, 128, kDispatch, kExpertMajor, 8},
    {"rows", O::kInterleaved, 3, 6, 3, 5, 2, P::kRows, kBf16, kBf16, kPlainScale, 128, kCombine, kExpertMajor, 5},
    {"rows-fp32", O::kPlain, 2, 4, 4, 6, 2, P::kRows, kFp32, kFp32, kPlainScale, 128, kCombine, kExpertMajor, 4},
    {"rows-many", O::kPlain, 2, 8, 7, 3, 2, P::kRows, kFp32, kFp32, kPlainScale, 160, kCombine, kExpertMajor, 4},
    {"token-major", O::kInterleaved, 3, 6, 3, 5, 2, P::kRows, kBf16, kBf16, kPlainScale, 128, kDispatch, kTokenMajor, 5},
    {"token-major-fp8", O::kDispatchOnly, 2, 8, 4, 7, 2, P::kQuantised, kBf16, kBf16, kPow2, 256, kDispatch, kTokenMajor, 5},
    {"fp8", O::kInterleaved, 3, 6, 3, 5, 2, P::kQuantised, kBf16, kBf16, kPlainScale, 256, kDispatch, kExpertMajor, 5},
    {"fp8-pow2", O::kPlain, 2, 4, 2, 6, 2, P::kQuantised, kFp16, kFp16, kPow2, 384, kCombine, kExpertMajor, 4},
    {"fp8-ue8m0", O::kPlain, 2, 4, 2, 5, 2, P::kQuantised, kFp32, kBf16, kUe8m0, 512, kDispatch, kExpertMajor, 4},
    {"fp8-scaled", O::kInterleaved, 2, 6, 3, 6, 2, P::kScaled, kBf16, kFp16, kPlainScale, 256, kDispatch, kExpertMajor, 5},
    {"opaque", O::kInterleaved, 4, 4, 1, 5, 2, P::kOpaque, kBf16, kFp32, kPlainScale, 128, kDispatch, kExpertMajor, 5},
    {"one-rank", O::kInterleaved, 1, 4, 8, 12, 2, P::kRows, kBf16, kBf16, kPlainScale, 128, kDispatch, kExpertMajor, 6},
    {"four-ranks", O::kInterleaved, 4, 16, 8, 6, 2, P::kRows, kFp32, kFp32, kPlainScale, 128, kDispatch, kExpertMajor, 4},
    {"many-ranks", O::kPlain, 34, 68, 2, 2, 2, P::kRows, kBf16, kBf16, kPlainScale, 16, kDispatch, kExpertMajor, 2},
    {"windows", O::kPlain, 2, 4, 3, 5, 2, P::kRows, kFp32, kFp32, kPlainScale, 1088, kDispatch, kExpertMajor, 4},
    {"windows-rows", O::kInterleaved, 2, 4, 3, 4, 2, P::kRows, kBf16, kFp32, kPlainScale, 576, kCombine, kExpertMajor, 4},
    {"windows-token", O::kPlain, 2, 4, 2, 5, 2, P::kRows, kFp32, kFp32, kPlainScale, 576, kDispatch, kTokenMajor, 4},
    {"windows-fp8", O::kPlain, 2, 4, 2, 4, 2, P::kQuantised, kBf16, kBf16, kPlainScale, 2176, kDispatch, kExpertMajor, 3},
    {"wide", O::kPlain, 2, 2, 1, 2, 2, P::kQuantised, kBf16, kBf16, kPlainScale, 16896, kDispatch, kExpertMajor, 2},
    {"chunks", O::kInterleaved, 2, 16, 3, 40, 2, P::kRows, kBf16, kBf16, kPlainScale, 16, kDispatch, kExpertMajor, 4},
    {"chunks-send", O::kPlain, 4, 8, 2, 72, 2, P::kRows, kFp16, kFp16, kPlainScale, 8, kDispatch, kExpertMajor, 3},
    {"many-tokens", O::kPlain, 2, 4, 2, 100, 2, P::kRows, kFp16, kFp16, kPlainScale, 8, kDispatch, kTokenMajor, 3},
    {"captured", O::kCaptured, 2, 4, 2, 4, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kExpertMajor, 8},
    {"captured-token", O::kCaptured, 2, 4, 2, 4, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kTokenMajor, 7},
    {"stopped", O::kStopped, 3, 6, 2, 3, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kExpertMajor, 10},
    {"stopped-token", O::kStopped, 4, 8, 2, 3, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kTokenMajor, 10},
    {"stopped-rows", O::kStopped, 3, 6, 2, 3, 3, P::kRows, kBf16, kBf16, kPlainScale, 64, kCombine, kExpertMajor, 12},
    {"late", O::kLate, 3, 6, 2, 3, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kExpertMajor, 10},
    {"late-rows", O::kLate, 3, 6, 2, 3, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kCombine, kExpertMajor, 10},
    {"bad-ids", O::kBadIds, 2, 4, 4, 8, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kExpertMajor, 4},
    {"bad-cell", O::kBadCell, 3, 6, 3, 6, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kExpertMajor, 2},
    {"bad-cell-rows", O::kBadCell, 2, 4, 4, 6, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kCombine, kExpertMajor, 2},
    {"bad-cell-token", O::kBadCell, 3, 6, 3, 6, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kTokenMajor, 2},
    {"stale", O::kStale, 2, 4, 2, 4, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kExpertMajor, 6},
    {"stale-token", O::kStale, 2, 4, 2, 4, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kTokenMajor, 6},
    {"joined", O::kPlain, 3, 6, 3, 6, 2, P::kRows, kBf16, kBf16, kPlainScale, 256, kDispatch, kExpertMajor, 4, true},
    {"joined-interleaved", O::kInterleaved, 3, 6, 2, 5, 2, P::kRows, kBf16, kBf16, kPlainScale, 128, kDispatch, kExpertMajor, 6, true},
    {"joined-rows", O::kPlain, 3, 6, 3, 5, 2, P::kRows, kBf16, kBf16, kPlainScale, 576, kCombine, kExpertMajor, 5, true},
    {"joined-token", O::kPlain, 2, 4, 2, 5, 2, P::kRows, kFp32, kFp32, kPlainScale, 576, kDispatch, kTokenMajor, 4, true},
    {"joined-fp8", O::kPlain, 2, 4, 2, 4, 2, P::kQuantised, kBf16, kBf16, kPlainScale, 2176, kDispatch, kExpertMajor, 3, true},
    {"joined-one-rank", O::kPlain, 1, 4, 8, 12, 2, P::kRows, kFp16, kFp16, kPlainScale, 128, kDispatch, kExpertMajor, 6, true},
    {"joined-chunks", O::kPlain, 2, 16, 3, 40, 2, P::kRows, kBf16, kBf16, kPlainScale, 16, kDispatch, kExpertMajor, 4, true},
    {"joined-dispatch-only", O::kDispatchOnly, 3, 6, 2, 5, 2, P::kRows, kBf16, kBf16, kPlainScale, 128, kDispatch, kExpertMajor, 8, true},
    {"joined-captured", O::kCaptured, 2, 4, 2, 4, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kExpertMajor, 8, true},
    {"joined-stopped", O::kStopped, 3, 6, 2, 3, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kExpertMajor, 10, true},
    {"joined-stopped-token", O::kStopped, 4, 8, 2, 3, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kTokenMajor, 10, true},
    {"joined-late", O::kLate, 3, 6, 2, 3, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kExpertMajor, 10, true},
    {"joined-late-rows", O::kLate, 3, 6, 2, 3, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kCombine, kExpertMajor, 10, true},
    {"joined-bad-ids", O::kBadIds, 2, 4, 4, 8, 2, P::kRows, kBf16, kBf16, kPlainScale, 64, kDispatch, kExpertMajor, 4, true},
  };
  // clang-format on
  return cases;
}

}  // namespace moebius::kernels_test
