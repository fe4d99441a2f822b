#include "run.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace moebius::kernels_test {
namespace {

// Within kAwayNs all others have given a rank up, and are through with the rounds.
constexpr int64_t kAwayNs = 600'000'000;
constexpr int64_t kTimeoutNs = 100'000'000, kShortTimeoutNs = 30'000'000;  // virtual

}  // namespace

Run::Run(const Case& c, uint64_t seed)
    : case_(c),
      seed_(seed),
      random_(seed ^ 0x5851f42d4c957f2du),
      plan_(make_plan(c, seed)),
      timeout_ns_(c.is_left_by_one() ? kShortTimeoutNs : kTimeoutNs) {
  simt::Options options;
  options.seed = seed;
  options.num_ranks = c.num_ranks;
  options.is_bounds_checked = true;
  options.longest_jump_ns = timeout_ns_ / 20;
  simt::World::process().reset(options);
  for (int r = 0; r < c.num_ranks; ++r) flavours_.push_back(make_flavour(c, seed, r));
  make_heaps();
  make_rounds();
  expect();
}

Run::~Run() {
  // What failed is not to go on when the streams are freed.
  simt::World::process().reset(simt::World::process().options());
}

void Run::make_heaps() {
  const int64_t num_bytes = HeapLayout::of(case_.shape()).total;
  std::vector<std::byte*> addresses;
  for (int r = 0; r < case_.num_ranks; ++r) {
    heaps_.push_back(std::make_unique<cuda::Memory>(0, static_cast<size_t>(num_bytes)));
    addresses.push_back(heaps_.back()->data());
    simt::World::process().register_memory(r, addresses.back(), static_cast<size_t>(num_bytes));
  }
  for (int r = 0; r < case_.num_ranks; ++r) {
    seats_.push_back(std::make_unique<Seat>(
        case_, flavours_[static_cast<size_t>(r)], r, addresses, 1 + random_.below(3), timeout_ns_));
  }
}

void Run::make_rounds() {
  for (int round = 0; round < case_.num_rounds; ++round) {
    inputs_.emplace_back();
    for (int r = 0; r < case_.num_ranks; ++r) {
      inputs_.back().push_back(make_input(case_,
                                          flavours_[static_cast<size_t>(r)],
                                          seed_,
                                          r,
                                          round,
                                          case_.order == Order::kCaptured));
    }
  }
  for (int r = 0; r < case_.num_ranks; ++r) {
    const BufferLayout& layout = seat(r).layout();
    const auto rounds = static_cast<int64_t>(case_.num_rounds) + 1;
    memory_.push_back(
        std::make_unique<cuda::Memory>(0, static_cast<size_t>(rounds * (layout.total() + 64))));
    std::vector<std::byte*> replayed;
    for (int round = 0; round < case_.num_rounds; ++round) {
      fill(flavours_[static_cast<size_t>(r)], layout, input(round, r), buffers(round, r));
      if (plan_.is_replayed[static_cast<size_t>(round)]) replayed.push_back(buffers(round, r));
    }
    memset(buffers(case_.num_rounds, r), kPoison, static_cast<size_t>(layout.total()));
    if (case_.order == Order::kCaptured) seat(r).capture(replayed);
  }
  if (case_.order == Order::kStale) num_stale_halves_ = 1 + random_.below(7);
}

std::byte* Run::buffers(int round, int rank) const {
  const auto r = static_cast<size_t>(rank);
  return memory_[r]->data() + round * seats_[r]->layout().total();
}

// Behind the buffers of all rounds, a line each.
uint64_t* Run::handle(int round, int rank) const {
  return reinterpret_cast<uint64_t*>(buffers(case_.num_rounds + 1, rank) + 64 * round);
}

void Run::expect() {
  Reference reference(case_, flavours_);
  expert_stats_.assign(static_cast<size_t>(case_.num_ranks),
                       std::vector<int64_t>(static_cast<size_t>(case_.num_local_experts())));
  remote_bytes_.assign(static_cast<size_t>(case_.num_ranks), 0);
  const int64_t cell_bytes = HeapLayout::of(case_.shape()).cell_bytes;
  bool has_given_up = false;
  for (int round = 0; round < case_.num_rounds; ++round) {
    const auto i = static_cast<size_t>(round);
    expected_.emplace_back();
    if (plan_.is_without[i] && !has_given_up) {
      reference.give_up(plan_.stopped_rank);
      has_given_up = true;
    }
    std::vector<std::byte*> addresses;
    for (int r = 0; r < case_.num_ranks; ++r) {
      const std::byte* filled = buffers(round, r);
      expected_.back().emplace_back(filled, filled + seat(r).layout().total());
      addresses.push_back(expected_.back().back().data());
    }
    std::vector<int64_t> before;
    for (int r = 0; r < case_.num_ranks; ++r) before.push_back(reference.remote_bytes(r));
    reference.run(inputs_[i], addresses);
    for (int r = 0; r < case_.num_ranks; ++r) {
      const auto* counts =
          seat(r).layout().at<int32_t>(addresses[static_cast<size_t>(r)], kExpertCounts);
      std::vector<int64_t>& stats = expert_stats_[static_cast<size_t>(r)];
      for (size_t l = 0; l < stats.size(); ++l) stats[l] += counts[l];
      const auto* from =
          seat(r).layout().at<int32_t>(addresses[static_cast<size_t>(r)], kSrcCounts);
      if (plan_.is_combined[i]) {
        const auto at = static_cast<size_t>(r);
        remote_bytes_[at] += reference.remote_bytes(r) - before[at];
        continue;
      }
      // The reference has combined, the kernels do not.
      for (int src = 0; src < case_.num_ranks; ++src) {
        if (src != r) remote_bytes_[static_cast<size_t>(src)] += from[src] * cell_bytes;
      }
    }
  }
}

void Run::launch_stale(int round, int rank) {
  uint64_t* const word = handle(case_.num_rounds, rank);
  // Of a round that was, or of none at all.
  *word = rank % 2 == 0 ? static_cast<uint64_t>(round) : uint64_t{1} << 30;
  const RoundMemory memory{buffers(case_.num_rounds, rank), word, case_.max_num_tokens};
  if ((num_stale_halves_ & 1) != 0) seat(rank).launch(Step::kDispatchRecv, memory);
  if ((num_stale_halves_ & 2) != 0) seat(rank).launch(Step::kCombineSend, memory);
  if ((num_stale_halves_ & 4) != 0) seat(rank).launch(Step::kCombineRecv, memory);
}

void Run::launch(size_t i, int rank) {
  const Action& action = plan_.actions[i];
  if (action.step == Step::kReplay) return seat(rank).replay();
  if (action.step == Step::kStale) return launch_stale(action.round, rank);
  if (i > 0 && joins(i - 1, rank)) return;
  Step step = action.step;
  if (joins(i, rank)) step = step == Step::kDispatchSend ? Step::kDispatch : Step::kCombine;
  seat(rank).launch(step,
                    {buffers(action.round, rank),
                     handle(action.round, rank),
                     input(action.round, rank).num_tokens});
}

bool Run::joins(size_t i, int rank) const {
  if (!case_.is_joined || i + 1 >= plan_.actions.size()) return false;
  const Action &now = plan_.actions[i], &next = plan_.actions[i + 1];
  const bool is_send = now.step == Step::kDispatchSend || now.step == Step::kCombineSend;
  if (!is_send || next.round != now.round) return false;
  return !Random(seed_ + 131 * i + 17 * static_cast<size_t>(rank)).one_in(4);
}

// Writes into a cell of the last round, or the counts before it, what no rank would: an expert, a
// row of replies, a row of an expert or a number of rows that there is not.
void Run::spoil() {
  const int round = case_.num_rounds - 1, rank = random_.below(case_.num_ranks);
  const int first = random_.below(case_.num_ranks);
  const HeapLayout heap = HeapLayout::of(case_.shape());
  std::byte* const expected =
      expected_[static_cast<size_t>(round)][static_cast<size_t>(rank)].data();
  const auto* counts = seat(rank).layout().at<int32_t>(expected, kSrcCounts);
  for (int i = 0; i < case_.num_ranks; ++i) {
    const int src = (first + i) % case_.num_ranks;
    if (counts[src] == 0) continue;
    spoilt_rank_ = rank;
    spoilt_src_ = src;
    const int slot = heap.slot_of(static_cast<uint64_t>(round));
    std::byte* const memory = heaps_[static_cast<size_t>(rank)]->data();
    std::byte* const cell = memory + heap.cell(slot, src, random_.below(counts[src]));
    auto* const head = reinterpret_cast<CellHead*>(cell + heap.head_in_cell);
    auto* const ids = reinterpret_cast<int32_t*>(cell + heap.ids_in_cell());
    auto* const positions = reinterpret_cast<int32_t*>(cell + heap.positions_in_cell());
    auto* const rows = reinterpret_cast<int32_t*>(memory + heap.counts(slot, src));
    const bool is_low = random_.one_in(2);
    int choice = random_.below(case_.num_topk);
    const auto write = [](int32_t* at, int32_t word) { cuda::copy(at, &word, sizeof word); };
    switch (random_.below(heap.shape.has_positions ? 5 : 3)) {
      case 0:
        return write(&head->reply_row, is_low ? -1 : case_.max_num_tokens * case_.num_topk);
      case 3:
        while (ids[choice] < 0) choice = (choice + 1) % case_.num_topk;
        return write(positions + choice, is_low ? -1 : rows[ids[choice]]);
      case 4:
        return write(rows + random_.below(case_.num_local_experts()),
                     is_low ? -1 : counts[src] + 1);
      default:
        return write(ids + choice, is_low ? -2 : case_.num_local_experts());
    }
  }
}

void Run::launch_all() {
  const auto num_actions = static_cast<int>(plan_.actions.size());
  // A rank may be late, by less than a deadline all in all.
  std::vector<int> delayed(static_cast<size_t>(case_.num_ranks), -1);
  for (int& at : delayed) {
    if (random_.one_in(2)) at = random_.below(num_actions);
  }
  const int most_delay = plan_.stopped_rank >= 0 ? 70 : 20;
  // In which the host waits for all that it launched; so nobody would be late.
  const bool has_pauses = random_.one_in(4) && case_.order != Order::kLate;
  for (int i = 0; i < num_actions; ++i) {
    const Action& action = plan_.actions[static_cast<size_t>(i)];
    if (case_.order == Order::kBadCell && action.round == case_.num_rounds - 1 &&
        action.step == Step::kDispatchRecv) {
      simt::World::process().run_until_idle();
      spoil();
    }
    for (int r = 0; r < case_.num_ranks; ++r) {
      if (is_stopped(r, static_cast<size_t>(i))) {
        if (case_.order == Order::kStopped) continue;
        if (static_cast<size_t>(i) == plan_.stop) seat(r).delay(kAwayNs);
      }
      if (delayed[static_cast<size_t>(r)] == i) {
        seat(r).delay(kShortTimeoutNs / 100 * (1 + random_.below(most_delay)));
      }
      launch(static_cast<size_t>(i), r);
    }
    if (has_pauses && random_.one_in(5)) simt::World::process().run_until_idle();
  }
  simt::World::process().run_until_idle();
}

std::string Run::go() {
  try {
    launch_all();
  } catch (const simt::Error& e) {
    return e.what();
  }
  num_steps_ = simt::World::process().counters().num_switches;
  for (int r = 0; r < case_.num_ranks && wrong_.empty(); ++r) {
    check_faults(r);
    for (int round = 0; round < case_.num_rounds; ++round) check_round(round, r);
    if (case_.order == Order::kStale) check_stale(r);
    check_totals(r);
  }
  return wrong_;
}

void Run::require(bool is_good, const char* format, ...) {
  if (is_good || !wrong_.empty()) return;
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  wrong_ = text;
}

}  // namespace moebius::kernels_test
