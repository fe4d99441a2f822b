// The kernels over vectors of MOEBIUS_SIMD_BYTES, included once per instruction set. The vectors
// are the compiler's own (GCC and clang), so the same lines serve x86 and arm64.

namespace moebius::cpu {
namespace {

constexpr int kWidth = MOEBIUS_SIMD_BYTES / 4;
constexpr int kGroup = 128;  // channels of one FP8 scale; a multiple of every width

typedef float F32 __attribute__((vector_size(MOEBIUS_SIMD_BYTES)));
typedef int32_t I32 __attribute__((vector_size(MOEBIUS_SIMD_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(MOEBIUS_SIMD_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(MOEBIUS_SIMD_BYTES / 2)));
typedef uint8_t U8 __attribute__((vector_size(MOEBIUS_SIMD_BYTES / 4)));

inline U32 bits_of(F32 f) { return (U32)f; }
inline F32 float_of(U32 u) { return (F32)u; }
inline U32 splat(uint32_t u) { return U32{} + u; }
inline U32 select(I32 mask, U32 yes, U32 no) { return ((U32)mask & yes) | (~(U32)mask & no); }
inline F32 select(I32 mask, F32 yes, F32 no) {
  return float_of(select(mask, bits_of(yes), bits_of(no)));
}
inline U32 magnitude(U32 u) { return u & 0x7fffffffu; }
// Signed comparison is right for magnitudes, whose top bit is clear, and is the one the CPU has.
inline I32 is_above(U32 magnitude_bits, uint32_t limit) {
  return (I32)magnitude_bits > (int32_t)limit;
}

template <class V>
inline V read(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void write(void* p, V v) {
  memcpy(p, &v, sizeof v);
}

// How a vector of a dtype becomes `kParts` vectors of fp32, and back. The parts may hold the
// elements in any order, the same both ways: a sum does not mind.
template <Dtype kDtype>
struct Format;

template <>
struct Format<Dtype::kFp32> {
  using Raw = F32;
  static constexpr int kParts = 1;
  static void widen(Raw raw, F32* parts) { parts[0] = raw; }
  static Raw narrow(const F32* parts) { return parts[0]; }
};

// Round to nearest even, to the upper half of each lane; a NaN stays one.
inline U32 round_to_bf16(F32 f) {
  const U32 u = bits_of(f);
  const U32 rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return select(is_above(magnitude(u), 0x7f800000u), splat(0x7fc00000u), rounded);
}

template <>
struct Format<Dtype::kBf16> {
  // Pairs, even elements in the low halves: a shift and a mask take them apart without moving a
  // lane.
  using Raw = U32;
  static constexpr int kParts = 2;
  static void widen(Raw raw, F32* parts) {
    parts[0] = float_of(raw << 16);
    parts[1] = float_of(raw & 0xffff0000u);
  }
  static Raw narrow(const F32* parts) {
    return (round_to_bf16(parts[0]) >> 16) | (round_to_bf16(parts[1]) & 0xffff0000u);
  }
};

template <>
struct Format<Dtype::kFp16> {
  using Raw = U16;
  static constexpr int kParts = 1;
  static void widen(Raw raw, F32* parts) { parts[0] = widen(raw); }
  static Raw narrow(const F32* parts) { return narrow(parts[0]); }
  // Moves the fields into place and lets a multiplication mend the exponent, subnormals included.
  static F32 widen(Raw raw) {
    const U32 u = __builtin_convertvector(raw, U32);
    const U32 fields = (u & 0x7fffu) << 13;
    const U32 finite = bits_of(float_of(fields) * 0x1p112f);
    const I32 is_special = is_above(fields, (0x7c00u << 13) - 1);  // infinity and NaN
    return float_of(select(is_special, fields | 0x7f800000u, finite) | ((u & 0x8000u) << 16));
  }
  static Raw narrow(F32 f) {
    const U32 u = bits_of(f);
    const U32 a = magnitude(u);
    // 65520 and above round to infinity, which the carry into the exponent yields by itself below
    // 65536.
    const U32 normal = (a + (0xfffu - (112u << 23)) + ((a >> 13) & 1u)) >> 13;
    // Adding 0.5 leaves the subnormal's 10 bits at the bottom of the mantissa, rounded by the
    // addition.
    const U32 tiny = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
    const U32 special = select(is_above(a, 0x7f800000u), splat(0x7e00u), splat(0x7c00u));
    const U32 finite = select(is_above(a, 0x387fffffu), normal, tiny);
    return __builtin_convertvector(
        select(is_above(a, 0x477fffffu), special, finite) | ((u >> 16) & 0x8000u), U16);
  }
};

// `kVectors` vectors at `offset`, kept in registers across the rows.
template <Dtype kDtype, int kVectors>
inline void sum_block(
    std::byte* out, const void* const* rows, const float* weights, int num_rows, int64_t offset) {
  using F = Format<kDtype>;
  F32 sums[kVectors][F::kParts] = {};
  for (int r = 0; r < num_rows; ++r) {
    const std::byte* row = static_cast<const std::byte*>(rows[r]) + offset;
    for (int v = 0; v < kVectors; ++v) {
      F32 parts[F::kParts];
      F::widen(read<typename F::Raw>(row + v * sizeof(typename F::Raw)), parts);
      for (int p = 0; p < F::kParts; ++p) {
        sums[v][p] = sums[v][p] + (weights != nullptr ? parts[p] * weights[r] : parts[p]);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    write(out + offset + v * sizeof(typename F::Raw), F::narrow(sums[v]));
  }
}

template <Dtype kDtype>
void sum_rows(
    void* out, const void* const* rows, const float* weights, int num_rows, int64_t hidden) {
  using F = Format<kDtype>;
  constexpr int kStep = sizeof(typename F::Raw);
  constexpr int kVectors = 4;
  std::byte* const dst = static_cast<std::byte*>(out);
  const int64_t num_bytes = hidden * (kStep / (kWidth * F::kParts));
  int64_t offset = 0;
  for (; offset + kVectors * kStep <= num_bytes; offset += kVectors * kStep) {
    sum_block<kDtype, kVectors>(dst, rows, weights, num_rows, offset);
  }
  for (; offset + kStep <= num_bytes; offset += kStep) {
    sum_block<kDtype, 1>(dst, rows, weights, num_rows, offset);
  }
  if (offset == num_bytes) return;
  // The tail, padded: one row at a time through a vector on the stack.
  const size_t tail_bytes = static_cast<size_t>(num_bytes - offset);
  F32 sums[F::kParts] = {};
  for (int r = 0; r < num_rows; ++r) {
    alignas(MOEBIUS_SIMD_BYTES) std::byte padded[kStep] = {};
    memcpy(padded, static_cast<const std::byte*>(rows[r]) + offset, tail_bytes);
    F32 parts[F::kParts];
    F::widen(read<typename F::Raw>(padded), parts);
    for (int p = 0; p < F::kParts; ++p) {
      sums[p] = sums[p] + (weights != nullptr ? parts[p] * weights[r] : parts[p]);
    }
  }
  const typename F::Raw raw = F::narrow(sums);
  memcpy(dst + offset, &raw, tail_bytes);
}

void weighted_sum(void* out,
                  const void* const* rows,
                  const float* weights,
                  int num_rows,
                  int64_t hidden,
                  Dtype dtype) {
  switch (dtype) {
    case Dtype::kBf16:
      return sum_rows<Dtype::kBf16>(out, rows, weights, num_rows, hidden);
    case Dtype::kFp16:
      return sum_rows<Dtype::kFp16>(out, rows, weights, num_rows, hidden);
    case Dtype::kFp32:
      return sum_rows<Dtype::kFp32>(out, rows, weights, num_rows, hidden);
  }
}

// e4m3 (OCP FP8: bias 7, 3 mantissa bits, no infinity, NaN 0x7f), nearest even, saturating at 448.
inline U8 e4m3_of(F32 f) {
  const U32 u = bits_of(f);
  const U32 full = magnitude(u);
  const I32 is_nan = is_above(full, 0x7f800000u);
  const U32 a = select(is_above(full, 0x43e00000u), splat(0x43e00000u), full);  // 448
  const U32 normal = (a + (0x7ffffu - (120u << 23)) + ((a >> 20) & 1u)) >> 20;
  // Adding 2^14 leaves the subnormal's 3 bits at the bottom of the mantissa, rounded by the
  // addition.
  const U32 tiny = bits_of(float_of(a) + 16384.0f) - 0x46800000u;
  const U32 finite = select(is_above(a, 0x3c7fffffu), normal, tiny);  // 2^-6 and above are normal
  return __builtin_convertvector(select(is_nan, splat(0x7fu), finite) | ((u >> 24) & 0x80u), U8);
}

// kWidth elements in order, as quantising needs them.
template <Dtype kDtype>
inline F32 load(const std::byte* p) {
  if constexpr (kDtype == Dtype::kFp32) return read<F32>(p);
  if constexpr (kDtype == Dtype::kFp16) return Format<kDtype>::widen(read<U16>(p));
  return float_of(__builtin_convertvector(read<U16>(p), U32) << 16);
}

template <Dtype kDtype>
void quantise_rows(const void* x, int64_t hidden, ScaleFormat format, uint8_t* out, void* scales) {
  constexpr int kStep = kWidth * (kDtype == Dtype::kFp32 ? 4 : 2);
  constexpr int kVectors = kGroup / kWidth;
  const std::byte* src = static_cast<const std::byte*>(x);
  for (int64_t group = 0; group < hidden / kGroup; ++group) {
    F32 values[kVectors];
    F32 largest = F32{} + 1e-4f;  // as DeepEP: keeps the scale of an all-zero group finite
    for (int v = 0; v < kVectors; ++v, src += kStep) {
      values[v] = load<kDtype>(src);
      const F32 a = float_of(magnitude(bits_of(values[v])));
      largest = select(a > largest, a, largest);
    }
    float amax = largest[0];
    for (int lane = 1; lane < kWidth; ++lane) amax = largest[lane] > amax ? largest[lane] : amax;

    float scale = amax / 448.0f;
    float inverse = 448.0f / amax;
    if (format != ScaleFormat::kFp32) {
      uint32_t u;
      memcpy(&u, &scale, sizeof u);
      const uint32_t exponent = (u >> 23) + ((u & 0x7fffffu) != 0);  // rounded up to a power of two
      const uint32_t up = exponent << 23;
      memcpy(&scale, &up, sizeof scale);
      inverse = 1.0f / scale;
      if (format == ScaleFormat::kUe8m0)
        static_cast<uint8_t*>(scales)[group] = static_cast<uint8_t>(exponent);
    }
    if (format != ScaleFormat::kUe8m0) static_cast<float*>(scales)[group] = scale;
    for (int v = 0; v < kVectors; ++v, out += kWidth) write(out, e4m3_of(values[v] * inverse));
  }
}

void quantise(
    const void* x, Dtype dtype, int64_t hidden, ScaleFormat format, uint8_t* out, void* scales) {
  switch (dtype) {
    case Dtype::kBf16:
      return quantise_rows<Dtype::kBf16>(x, hidden, format, out, scales);
    case Dtype::kFp16:
      return quantise_rows<Dtype::kFp16>(x, hidden, format, out, scales);
    case Dtype::kFp32:
      return quantise_rows<Dtype::kFp32>(x, hidden, format, out, scales);
  }
}

}  // namespace

extern const Kernels MOEBIUS_SIMD_TABLE;
const Kernels MOEBIUS_SIMD_TABLE = {MOEBIUS_SIMD_NAME, weighted_sum, quantise};

}  // namespace moebius::cpu
