// Number formats that travel, and their codes in Python (backend/wire.py).
#pragma once

#include <stdint.h>

namespace moebius {

enum class Dtype : int32_t { kBf16 = 0, kFp16 = 1, kFp32 = 2 };

enum class ScaleFormat : int32_t { kFp32 = 0, kPow2 = 1, kUe8m0 = 2 };

// How x becomes a payload.
enum class Encoding : int32_t { kCopy = 0, kQuantise = 1 };

}  // namespace moebius
