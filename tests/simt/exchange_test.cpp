// The exchange over many seeds, right and with each mistake planted.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <chrono>
#include <memory>
#include <string>

#include "exchange.h"

using namespace moebius;
using namespace moebius::simt_test;

namespace {

struct Planted {
  Bug bug;
  const char* name;
};
constexpr Planted kPlanted[] = {
    {Bug::kNone, "none"},
    {Bug::kNoBlockBarrier, "no block barrier before the count"},
    {Bug::kNoBulkWait, "signal before bulk stores are waited for"},
    {Bug::kNoBulkWaitRead, "staging reused before it was read"},
    {Bug::kNoCommit, "bulk stores not committed"},
    {Bug::kNoWriterProxyFence, "no proxy fence before a bulk store"},
    {Bug::kNoWarpSync, "no warp barrier before a bulk store"},
    {Bug::kSignalFirst, "signal by the first block to be done"},
    {Bug::kRelaxedSignal, "relaxed signal"},
    {Bug::kNoSysFence, "device scope where the system's is needed"},
    {Bug::kRelaxedPoll, "relaxed poll"},
    {Bug::kNoReaderBarrier, "no block barrier after the poll"},
    {Bug::kNoReaderProxyFence, "no proxy fence after the poll"},
    {Bug::kWrongParity, "wrong parity"},
    {Bug::kNoLoadWait, "bulk load not waited for"},
    {Bug::kRelaxedCount, "relaxed count of blocks"},
    {Bug::kNoWaitForPrevious, "no wait for the previous kernel"},
    {Bug::kOverwriteEarly, "slot written before it was read"},
    {Bug::kMisaligned, "misaligned bulk store"},
    {Bug::kTwoArrivals, "two arrivals in one phase"},
    {Bug::kNoInitFence, "no fence after barrier_init"},
    {Bug::kNoInitSync, "barrier used before its initialisation is known"},
};

constexpr int kEnough = 3;  // seeds that catch a mistake
constexpr int kRanks = 3, kRounds = 8;

uint32_t word(int rank, int row, int i) {
  return static_cast<uint32_t>(rank * 1000003 + row * 4099 + i * 17);
}

// And what the receiver's warp functions make of it.
uint32_t sum_of_head(int round, int row) {
  return static_cast<uint32_t>(16 + 4 * (round * 100000 + row * 100) + 6);
}

// Empty if all came out right.
std::string run(uint64_t seed, Bug bug, simt::Counters* counters) {
  simt::Options options;
  options.seed = seed;
  options.num_ranks = kRanks;
  simt::World world(options);
  std::vector<std::unique_ptr<Box>> boxes;
  std::vector<std::vector<uint32_t>> x(kRanks);
  std::vector<simt::Stream*> streams;
  // Aligned as the rows that bulk copies and vectors take.
  for (int r = 0; r < kRanks; ++r) {
    boxes.push_back(std::make_unique<Box>());
    memset(boxes.back().get(), 0, sizeof(Box));
    world.register_memory(r, boxes.back().get(), sizeof(Box));
    for (int row = 0; row < kNumRows; ++row) {
      for (int i = 0; i < kRowWords; ++i) x[r].push_back(word(r, row, i));
    }
    streams.push_back(world.new_stream(r));
  }
  constexpr int64_t kTimeoutNs = 1000000000;
  std::string wrong;
  try {
    for (int round = 0; round < kRounds; ++round) {
      const auto e = static_cast<uint64_t>(round);
      for (int r = 0; r < kRanks; ++r) {
        Box* const self = boxes[r].get();
        Box* const next = boxes[(r + 1) % kRanks].get();
        Box* const previous = boxes[(r + kRanks - 1) % kRanks].get();
        launch(send_kernel,
               LaunchShape{2, 96, kExchangeSharedBytes},
               SendParams{self, next, x[r].data(), e, bug, kTimeoutNs},
               streams[r]);
        launch(recv_kernel,
               LaunchShape{2, 128, kExchangeSharedBytes},
               RecvParams{self, previous, e, bug, kTimeoutNs},
               streams[r]);
        launch(sum_kernel, LaunchShape{1, 64, 0}, SumParams{self, bug}, streams[r]);
      }
      if (round % 4 != 3) continue;  // so that kernels of several rounds are under way
      world.run_until_idle();
      for (int r = 0; r < kRanks && wrong.empty(); ++r) {
        const int from = (r + kRanks - 1) % kRanks;
        for (int row = 0; row < kNumRows; ++row) {
          if (boxes[r]->sum[row] != sum_of_head(round, row)) wrong = "a wrong head";
          for (int i = 0; i < kRowWords; ++i) {
            if (boxes[r]->out[row][i] != word(from, row, i) + static_cast<uint32_t>(round)) {
              wrong = "a wrong row";
            }
          }
        }
        uint32_t total = 0;
        for (int past = 0; past <= round; ++past) {
          for (int row = 0; row < kNumRows; ++row) {
            total += sum_of_head(past, row);
            for (int i = 0; i < kRowWords; ++i) {
              total += word(from, row, i) + static_cast<uint32_t>(past);
            }
          }
        }
        if (boxes[r]->total != total) wrong = "a wrong total";
        if (boxes[r]->num_late != 0) wrong = "late";
      }
    }
  } catch (const simt::Error& e) {
    wrong = e.what();
  }
  if (counters != nullptr) {
    counters->num_switches += world.counters().num_switches;
    counters->num_bulk_steps += world.counters().num_bulk_steps;
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  const int num_seeds = argc > 1 ? atoi(argv[1]) : 200;
  const uint64_t only = argc > 2 ? strtoull(argv[2], nullptr, 0) : 0;
  bool is_good = true;
  for (const Planted& planted : kPlanted) {
    if (only != 0 && planted.bug != Bug::kNone) break;
    simt::Counters counters;
    const auto start = std::chrono::steady_clock::now();
    int num_wrong = 0, num_run = 0;
    std::string first;
    uint64_t first_seed = 0;
    for (int i = 0; i < num_seeds; ++i) {
      const uint64_t seed = only != 0 ? only : static_cast<uint64_t>(i);
      const std::string wrong = run(seed, planted.bug, &counters);
      ++num_run;
      if (wrong.empty()) continue;
      if (num_wrong++ == 0) {
        first = wrong;
        first_seed = seed;
      }
      if (planted.bug != Bug::kNone && num_wrong == kEnough) break;
    }
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const bool is_right = planted.bug == Bug::kNone ? num_wrong == 0 : num_wrong != 0;
    is_good = is_good && is_right;
    printf("%-50s %3d of %3d seeds wrong, %.1f ms a seed, %s\n",
           planted.name,
           num_wrong,
           num_run,
           1e3 * seconds / num_run,
           is_right ? "ok" : "NOT OK");
    if (num_wrong != 0) {
      printf("    seed %llu: %s\n",
             static_cast<unsigned long long>(first_seed),
             first.substr(0, 300).c_str());
    }
    fflush(stdout);
  }
  return is_good ? 0 : 1;
}
