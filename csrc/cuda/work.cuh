// How the work of a kernel is dealt to its warps.
#pragma once

#include "cuda/rank.cuh"

namespace moebius::cuda {

// Which warp of how many: of a half, or of one block.
struct Share {
  int first, num_warps;

  MOEBIUS_DEVICE static Share of(const Place& place) {
    return {warp_index() * place.num + place.index, kWarpsPerBlock * place.num};
  }
  MOEBIUS_DEVICE static Share of_block() { return {warp_index(), kWarpsPerBlock}; }
};

// Items that stand source by source: `first[i]` of them before source i. The source of one: the
// last that begins at or before it.
MOEBIUS_DEVICE int find_source(const int32_t* first, int num_sources, int number) {
  int found = 0, end = num_sources;
  while (end - found > 1) {
    const int middle = (found + end) / 2;
    if (load(first + middle) <= number) {
      found = middle;
    } else {
      end = middle;
    }
  }
  return found;
}
// The same, by a warp, all lanes of which look for one item.
MOEBIUS_DEVICE int warp_find_source(const int32_t* first, int num_sources, int number) {
  if (num_sources > kWarp) return find_source(first, num_sources, number);
  const bool has_begun = lane() < num_sources && load(first + lane()) <= number;
  const int found = popcount(ballot(has_begun)) - 1;
  return found < 0 ? 0 : found;
}

// The items of [0, n) that a warp does. They are neighbours: what they have in common is found out
// once. Few items are spread over all blocks.
struct Run {
  int begin, end;

  MOEBIUS_DEVICE static Run of(const Share& share, int n) {
    const int each = n / share.num_warps, rest = n - each * share.num_warps;
    const int begin = share.first * each + static_cast<int>(min_of(share.first, rest));
    return {begin, begin + each + (share.first < rest ? 1 : 0)};
  }
};

// A part of something that has `num_parts`.
struct Part {
  int whole, part;

  MOEBIUS_DEVICE static Part at(int number, int num_parts) {
    const int whole = number / num_parts;
    return {whole, number - whole * num_parts};
  }
  MOEBIUS_DEVICE void advance(int num_parts) {
    if (++part < num_parts) return;
    part = 0;
    ++whole;
  }
};

// Whether a warp has one item at most: then the kernel is over as soon as it has begun, and the
// next one had better stand ready. The blocks of larger ones would be in its way, and it in theirs.
MOEBIUS_DEVICE bool is_short(int num_items) { return num_items <= kWarpsPerBlock * num_blocks(); }

}  // namespace moebius::cuda
