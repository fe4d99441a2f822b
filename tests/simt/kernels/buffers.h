// What a round reads and writes on one rank, in one piece of memory of one layout: so a kernel can
// copy all of it, and results are compared field by field.
#pragma once

#include <cstddef>

#include "inputs.h"

namespace moebius::kernels_test {

enum Field {
  kX,
  kScales,
  kIds,
  kWeights,
  kValid,
  kNumInputs,
  kReceivedX = kNumInputs,
  kReceivedScales,
  kSrcInfo,
  kLayoutRange,
  kReceivedIds,
  kReceivedWeights,
  kExpertCounts,
  kSrcCounts,
  kExpertOut,
  kOut,
  kNumFields
};
const char* name_of(Field field);

struct BufferLayout {
  int64_t offset[kNumFields + 1];
  int64_t num_bytes[kNumFields];  // 0: not there

  static BufferLayout of(const Case& c, const Flavour& flavour);
  int64_t total() const { return offset[kNumFields]; }
  int64_t num_input_bytes() const { return offset[kNumInputs]; }
  // Null where there is none.
  template <class T>
  T* at(std::byte* base, Field field) const {
    return num_bytes[field] == 0 ? nullptr : reinterpret_cast<T*>(base + offset[field]);
  }
};

// What nobody has written.
constexpr int kPoison = 0xa5;

// Strides of received scales, of 4-byte elements.
void scale_strides(const Case& c, const Flavour& flavour, int64_t strides[3]);

// Inputs in place, everything else poisoned.
void fill(const Flavour& flavour,
          const BufferLayout& layout,
          const RoundInput& in,
          std::byte* base);

}  // namespace moebius::kernels_test
