// Where threads of a block meet: barriers and warp functions.
#include <string.h>

#include "simt/operations.h"

namespace moebius::simt {
namespace {

void meet(int barrier, int num_threads, Wait wait, const Site& site) {
  touch();
  Thread& by = *current;
  Block& block = *by.block;
  Meeting& meeting = block.meetings[barrier];
  if (meeting.arrived.empty()) {
    meeting.expected = num_threads;
  } else if (meeting.expected != num_threads) {
    world().fail("barrier " + std::to_string(barrier) + " is awaited for " +
                 std::to_string(num_threads) + " threads, and for " +
                 std::to_string(meeting.expected) + " by those that came first");
  }
  by.site = site;
  meeting.arrived.push_back(&by);
  if (static_cast<int>(meeting.arrived.size()) < num_threads) {
    world().block_thread(by, wait, site, &meeting);
    return;
  }
  synchronise(meeting.arrived.data(), num_threads);
  for (Thread* t : meeting.arrived) {
    if (t != &by) world().wake(*t);
  }
  meeting.arrived.clear();
}

// True for the lane that completes the meeting; the others return once it has been completed.
template <class Complete>
void meet_warp(Wait wait, const Site& site, const Complete& complete) {
  Thread& by = *current;
  Warp& warp = by.block->warps[static_cast<size_t>(by.warp)];
  if (warp.done != 0) {
    world().fail(std::string("a lane is in ") + name_of(wait) +
                 " and another of its warp has ended");
  }
  if (warp.arrived == 0) {
    warp.meeting = wait;
    warp.votes = 0;
  } else if (warp.meeting != wait) {
    const Thread& other = *warp.lanes[__builtin_ctz(warp.arrived)];
    by.wait = wait;
    by.site = site;
    world().fail(std::string("divergent warp: a lane is in ") + name_of(wait) + " at " + site.file +
                 ":" + std::to_string(site.line) + ", lane " + std::to_string(other.lane) + " in " +
                 name_of(warp.meeting) + " at " + other.site.file + ":" +
                 std::to_string(other.site.line));
  }
  by.site = site;
  warp.arrived |= 1u << by.lane;
  if (warp.arrived != ~0u) {
    world().block_thread(by, wait, site, &warp);
    return;
  }
  complete(warp);
  warp.arrived = 0;
  warp.meeting = Wait::kNone;
  for (Thread* t : warp.lanes) {
    if (t != &by) world().wake(*t);
  }
}

}  // namespace

void sync_block(const Site& site) {
  meet(0, current->block->launch->shape().num_threads, Wait::kSyncBlock, site);
}

void sync_group(int barrier, int num_threads, const Site& site) {
  if (barrier < 0 || barrier >= kMaxNamedBarriers) {
    world().fail("no barrier " + std::to_string(barrier));
  }
  if (num_threads <= 0 || num_threads % kWarpSize != 0 ||
      num_threads > current->block->launch->shape().num_threads) {
    world().fail("sync_group for " + std::to_string(num_threads) + " threads");
  }
  meet(barrier, num_threads, Wait::kSyncGroup, site);
}

void sync_warp(const Site& site) {
  touch();
  meet_warp(Wait::kSyncWarp, site, [](Warp& warp) { synchronise(warp.lanes, kWarpSize); });
}

// Votes and shuffles carry values between registers; they order no memory.
uint32_t ballot(bool vote, const Site& site) {
  Thread& by = *current;
  Warp& warp = by.block->warps[static_cast<size_t>(by.warp)];
  warp.in[by.lane].bytes[0] = vote;
  meet_warp(Wait::kBallot, site, [](Warp& w) {
    uint32_t votes = 0;
    for (int l = 0; l < kWarpSize; ++l) votes |= uint32_t{w.in[l].bytes[0]} << l;
    for (int l = 0; l < kWarpSize; ++l) memcpy(w.out[l].bytes, &votes, sizeof votes);
    world().made_progress();
  });
  uint32_t votes;
  memcpy(&votes, warp.out[by.lane].bytes, sizeof votes);
  return votes;
}

void shuffle(LaneValue& value, int from, const Site& site) {
  Thread& by = *current;
  Warp& warp = by.block->warps[static_cast<size_t>(by.warp)];
  warp.in[by.lane] = value;
  warp.from[by.lane] = static_cast<uint8_t>(from);
  meet_warp(Wait::kShuffle, site, [](Warp& w) {
    for (int l = 0; l < kWarpSize; ++l) w.out[l] = w.in[w.from[l]];
    world().made_progress();
  });
  value = warp.out[by.lane];
}

uint64_t now_ns() {
  touch();
  return world().now_ns();
}

void relax(const Site& site) { world().relax(*current, site); }

void wait_for_previous_kernel(const Site& site) {
  touch();
  Thread& by = *current;
  Launch& launch = *by.block->launch;
  launch.has_waited = true;
  if (launch.previous == nullptr) return;
  if (!launch.previous->is_over) {
    launch.waiting.push_back(&by);
    world().block_thread(by, Wait::kPreviousKernel, site, launch.previous.get());
  }
  const int n = world().memory().num_ranks();
  by.seen.merge(launch.previous->end, n, 0);
  by.proxied.merge(launch.previous->end, n, 0);
}

void let_next_kernel_start() {
  touch();
  world().let_next_start(*current->block);
}

}  // namespace moebius::simt
