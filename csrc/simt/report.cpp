// What is said of threads that do not get on.
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "simt/operations.h"

namespace moebius::simt {

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::kNone:
      return "(running)";
    case Wait::kRelax:
      return "relax";
    case Wait::kSyncBlock:
      return "sync_block";
    case Wait::kSyncGroup:
      return "sync_group";
    case Wait::kSyncWarp:
      return "sync_warp";
    case Wait::kBallot:
      return "ballot";
    case Wait::kShuffle:
      return "shfl";
    case Wait::kBarrier:
      return "barrier_wait";
    case Wait::kBulkRead:
      return "bulk_wait_read";
    case Wait::kBulkAll:
      return "bulk_wait_all";
    case Wait::kPreviousKernel:
      return "wait_for_previous_kernel";
  }
  return "?";
}

std::string World::name_of(const Thread& thread) {
  const Launch& launch = *thread.block->launch;
  return launch.recipe->name + " of rank " + std::to_string(launch.rank) + ", block " +
         std::to_string(thread.block->index) + ", thread " + std::to_string(thread.index);
}

namespace {

// "0-31, 64"
std::string ranges(const std::vector<int>& threads) {
  std::string text;
  for (size_t i = 0; i < threads.size();) {
    size_t end = i;
    while (end + 1 < threads.size() && threads[end + 1] == threads[end] + 1) ++end;
    if (!text.empty()) text += ", ";
    text += std::to_string(threads[i]);
    if (end != i) text += "-" + std::to_string(threads[end]);
    i = end + 1;
  }
  return text;
}

// Who is awaited where the others wait.
std::string missing(const Block& block, const Thread& waiting) {
  std::vector<int> threads;
  if (waiting.wait == Wait::kSyncBlock) {
    for (const auto& t : block.threads) {
      if (t->is_done || t->wait != Wait::kSyncBlock) threads.push_back(t->index);
    }
    return "; missing: " + ranges(threads);
  }
  if (waiting.wait == Wait::kSyncGroup) {
    const auto& meeting = *static_cast<const Meeting*>(waiting.awaited);
    return "; " + std::to_string(meeting.arrived.size()) + " of " +
           std::to_string(meeting.expected) + " threads have come to barrier " +
           std::to_string(&meeting - block.meetings);
  }
  if (waiting.wait == Wait::kSyncWarp || waiting.wait == Wait::kBallot ||
      waiting.wait == Wait::kShuffle) {
    const Warp& warp = block.warps[static_cast<size_t>(waiting.warp)];
    for (int l = 0; l < kWarpSize; ++l) {
      if ((warp.arrived >> l & 1) == 0) threads.push_back(warp.index * kWarpSize + l);
    }
    return "; missing: " + ranges(threads);
  }
  if (waiting.wait == Wait::kBarrier) {
    for (const PhaseBarrier& b : block.barriers) {
      if (b.address != waiting.awaited) continue;
      return b.has_arrived ? "; " + std::to_string(b.num_missing_bytes) + " bytes are missing"
                           : "; nothing was loaded in this phase";
    }
  }
  return "";
}

}  // namespace

std::string World::describe_blocked() const {
  std::string text;
  for (const Block* block : blocks_) {
    using Key = std::tuple<int, std::string, int, std::string, const void*>;
    std::map<Key, std::vector<const Thread*>> groups;
    std::vector<int> ended;
    for (const auto& t : block->threads) {
      if (t->is_done) {
        ended.push_back(t->index);
        continue;
      }
      groups[{static_cast<int>(t->wait), t->site.file, t->site.line, t->site.function, t->awaited}]
          .push_back(t.get());
    }
    const Launch& launch = *block->launch;
    text += launch.recipe->name + " of rank " + std::to_string(launch.rank) + ", block " +
            std::to_string(block->index) + " of " + std::to_string(launch.shape().num_blocks) +
            ":\n";
    for (const auto& [key, threads] : groups) {
      std::vector<int> indices;
      for (const Thread* t : threads) indices.push_back(t->index);
      const Thread& first = *threads.front();
      text += "  threads " + ranges(indices) + " in " + simt::name_of(first.wait) + " at " +
              first.site.file + ":" + std::to_string(first.site.line) + " (" + first.site.function +
              ")" + missing(*block, first) + "\n";
    }
    if (!ended.empty()) text += "  threads " + ranges(ended) + " have ended\n";
  }
  for (const Launch* launch : starting_) {
    text += launch->recipe->name + " of rank " + std::to_string(launch->rank) + ": " +
            std::to_string(launch->to_start.size()) + " blocks have not started\n";
  }
  return text;
}

}  // namespace moebius::simt
