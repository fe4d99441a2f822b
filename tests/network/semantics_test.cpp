// What the emulated network promises, and that it does everything else as badly as it claims: a
// network that is too kind finds no bugs.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "cpu/emulated_network.h"
#include "cpu/segment.h"
#include "cpu/wait.h"

using namespace moebius;
using namespace moebius::cpu;

namespace {

#define REQUIRE(condition)                                            \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "%s:%d: " #condition "\n", __FILE__, __LINE__); \
      abort();                                                        \
    }                                                                 \
  } while (false)

constexpr int kRanks = 3, kTokens = 8;
constexpr int64_t kSecond = 1'000'000'000;
constexpr LinkConditions kBad{7, 0, 1'000'000, 100, 0};
constexpr LinkConditions kFine{7, 0, 0, 0, 0};

struct World {
  explicit World(const LinkConditions& conditions)
      : layout(HeapLayout::of({kRanks, 3, 2, kTokens, 2, 256, 0, 256, true, true, true})) {
    std::vector<std::byte*> addresses;
    for (int r = 0; r < kRanks; ++r) {
      heaps.push_back(Segment::create(layout.total));
      addresses.push_back(heaps.back().data());
    }
    network = std::make_unique<EmulatedNetwork>(layout, addresses, conditions);
  }
  std::byte* at(int rank, int64_t offset) { return heaps[rank].data() + offset; }
  Signal& signal(int rank, int src, int slot = 0, SignalKind kind = SignalKind::kDispatch) {
    return *reinterpret_cast<Signal*>(at(rank, layout.signal(slot, src, kind)));
  }
  int64_t cells_bytes() const { return kTokens * layout.cell_bytes; }
  // All cells of a source, and the word.
  void put_cells(int src, int dst, const std::vector<std::byte>& data, uint64_t word) {
    network->way_out(src).put_signal(dst,
                                     layout.cell(0, src, 0),
                                     data.data(),
                                     static_cast<int64_t>(data.size()),
                                     layout.signal(0, src, SignalKind::kDispatch),
                                     word);
  }
  bool has(int rank, int src, std::byte value) {
    const std::byte* cells = at(rank, layout.cell(0, src, 0));
    for (int64_t i = 0; i < cells_bytes(); ++i) {
      if (cells[i] != value) return false;
    }
    return true;
  }
  void await(int rank, int src, uint64_t word) {
    const int64_t end = now_ns() + 20 * kSecond;
    while (load_signal(signal(rank, src)) < word) REQUIRE(now_ns() < end);
  }

  const HeapLayout layout;
  std::vector<Segment> heaps;
  std::unique_ptr<EmulatedNetwork> network;
};

std::vector<std::byte> filled(int64_t num_bytes, int value) {
  return std::vector<std::byte>(static_cast<size_t>(num_bytes), static_cast<std::byte>(value));
}

void test_a_word_comes_after_its_data() {
  World w(kBad);
  for (int i = 1; i <= 100; ++i) {
    const auto data = filled(w.cells_bytes(), i);
    w.put_cells(0, 1, data, static_cast<uint64_t>(i));
    w.await(1, 0, static_cast<uint64_t>(i));
    REQUIRE(w.has(1, 0, data[0]));
  }
  REQUIRE(w.network->num_refused() == 0);
}

void test_puts_of_a_pair_keep_their_order() {
  World w(kBad);
  std::vector<std::vector<std::byte>> data;
  for (int i = 1; i <= 60; ++i) data.push_back(filled(w.cells_bytes(), i));
  for (int i = 1; i <= 60; ++i) {
    const auto& all = data[i - 1];
    if (i % 3 == 0) {
      w.put_cells(0, 1, all, static_cast<uint64_t>(i));
      w.await(1, 0, static_cast<uint64_t>(i));
      REQUIRE(w.has(1, 0, all[0]));
    } else {
      w.network->way_out(0).put(
          1, w.layout.cell(0, 0, 0), all.data(), static_cast<int64_t>(all.size()));
    }
  }
}

void test_pairs_overtake() {
  World w(kBad);
  const auto data = filled(w.cells_bytes(), 1);
  bool has_overtaken = false;
  for (uint64_t i = 1; i <= 50; ++i) {
    w.put_cells(0, 1, data, i);
    w.put_cells(0, 2, data, i);
    w.await(2, 0, i);
    has_overtaken |= load_signal(w.signal(1, 0)) < i;
    w.await(1, 0, i);
  }
  REQUIRE(has_overtaken);
}

void test_data_may_change_after_quiet_and_not_before() {
  World w(kBad);
  bool is_late = false, is_spoilt = false;
  for (int i = 1; i <= 50; ++i) {
    auto data = filled(w.cells_bytes(), i);
    w.put_cells(0, 1, data, static_cast<uint64_t>(i));
    REQUIRE(w.network->way_out(0).quiet(20 * kSecond) == -1);
    is_late |= load_signal(w.signal(1, 0)) < static_cast<uint64_t>(i);
    std::fill(data.begin(), data.end(), std::byte{0xEE});
    w.await(1, 0, static_cast<uint64_t>(i));
    REQUIRE(w.has(1, 0, static_cast<std::byte>(i)));
  }
  REQUIRE(is_late);  // to have left is not to have arrived
  for (int i = 51; i <= 100; ++i) {
    auto data = filled(w.cells_bytes(), i);
    w.put_cells(0, 1, data, static_cast<uint64_t>(i));
    std::fill(data.begin(), data.end(), std::byte{0xEE});
    w.await(1, 0, static_cast<uint64_t>(i));
    is_spoilt |= !w.has(1, 0, static_cast<std::byte>(i));
  }
  REQUIRE(is_spoilt);
}

// A message arrives whole, or not at all.
void expect_refused(World& w, int64_t offset, int64_t num_bytes, int64_t signal) {
  const auto before = std::vector<std::byte>(w.at(1, 0), w.at(1, w.layout.total));
  const auto data = filled(num_bytes, 0x55);
  REQUIRE(!deliver(w.layout, w.at(1, 0), 0, {offset, data.data(), num_bytes, signal, 77}));
  REQUIRE(memcmp(before.data(), w.at(1, 0), before.size()) == 0);
}

void test_a_header_is_not_trusted() {
  World w(kFine);
  const HeapLayout& l = w.layout;
  const int64_t good = l.signal(0, 0, SignalKind::kDispatch);
  const std::vector<std::byte> data = filled(l.source_bytes(), 0x55);
  REQUIRE(deliver(l, w.at(1, 0), 0, {l.counts(1, 0), data.data(), l.source_bytes(), good, 77}));
  REQUIRE(load_signal(w.signal(1, 0)) == 77);
  expect_refused(w, l.cell(0, 1, 0), 16, good);                   // another rank's cells
  expect_refused(w, l.cell(0, 0, 0), w.cells_bytes() + 1, good);  // too long
  expect_refused(w, l.counts(0, 0) - 1, 16, good);
  expect_refused(w, l.counts(0, 1), 4, good);  // another rank's counts, which follow these cells
  expect_refused(w, l.cell(0, 0, 0), 16, l.signal(0, 1, SignalKind::kDispatch));
  expect_refused(w, l.cell(0, 0, 0), 16, good + 8);
  expect_refused(w, l.cell(0, 0, 0), 16, l.beat(2));
  expect_refused(w, l.control, 8, kNoSignal);
  expect_refused(w, l.masks, 4, kNoSignal);
  expect_refused(w, l.refusal(2), 4, kNoSignal);
  expect_refused(w, l.refusal(0), 8, kNoSignal);
  expect_refused(w, l.workspace, 4, kNoSignal);
  expect_refused(w, l.reply(1, kTokens * 2) - 8, 16, kNoSignal);
  expect_refused(w, INT64_MAX - 4, 16, kNoSignal);
  expect_refused(w, INT64_MIN, 16, kNoSignal);
  REQUIRE(!deliver(l, w.at(1, 0), -1, {0, nullptr, 0, good, 1}));
  REQUIRE(!deliver(l, w.at(1, 0), kRanks, {0, nullptr, 0, good, 1}));
  REQUIRE(!deliver(l, w.at(1, 0), 0, {l.cell(0, 0, 0), data.data(), -1, kNoSignal, 0}));
}

void test_messages_of_a_rank_given_up_are_dropped() {
  World w(kFine);
  reinterpret_cast<uint32_t*>(w.at(1, w.layout.masks))[0] = 1;
  const auto data = filled(w.cells_bytes(), 9);
  w.put_cells(0, 1, data, 5);
  REQUIRE(w.network->wait_idle(20 * kSecond));
  REQUIRE(w.has(1, 0, std::byte{0}) && load_signal(w.signal(1, 0)) == 0);
  w.put_cells(2, 1, data, 5);
  REQUIRE(w.network->wait_idle(20 * kSecond));
  REQUIRE(w.has(1, 2, data[0]) && load_signal(w.signal(1, 2)) == 5);
}

void test_a_pair_that_is_cut() {
  World w(kFine);
  const auto data = filled(w.cells_bytes(), 9);
  Network& out = w.network->way_out(0);
  w.network->cut(1, 0, 0, false);
  w.put_cells(0, 1, data, 5);
  w.put_cells(0, 2, data, 5);
  REQUIRE(out.quiet(20 * kSecond) == -1);
  w.await(2, 0, 5);
  REQUIRE(w.network->wait_idle(20 * kSecond));
  REQUIRE(load_signal(w.signal(1, 0)) == 0);

  w.network->cut(0, 2, 0, true);
  w.put_cells(0, 2, data, 6);
  REQUIRE(out.quiet(kSecond / 50) == 2);
  out.give_up(2, true);
  REQUIRE(out.quiet(20 * kSecond) == -1);
  REQUIRE(load_signal(w.signal(2, 0)) == 5);

  World later(kFine);
  later.network->cut(0, 1, kSecond / 10, false);
  later.put_cells(0, 1, data, 5);
  later.await(1, 0, 5);
}

void test_links_take_their_time() {
  World w({7, 3'000'000, 0, 0, 0.001});  // 3 ms, 1 byte a microsecond
  const auto data = filled(w.cells_bytes(), 9);
  const int64_t wire_ns = w.cells_bytes() * 1000;
  const int64_t start = now_ns();
  w.put_cells(0, 1, data, 5);
  w.put_cells(0, 2, data, 5);
  w.await(1, 0, 5);
  REQUIRE(now_ns() - start >= wire_ns + 3'000'000);
  w.await(2, 0, 5);
  REQUIRE(now_ns() - start >= 2 * wire_ns + 3'000'000);  // one way out for both
}

void test_requests_are_counted() {
  World w(kFine);
  const auto data = filled(w.cells_bytes(), 9);
  w.put_cells(0, 1, data, 5);
  w.network->way_out(0).put(2, w.layout.cell(0, 0, 0), data.data(), 32);
  const Traffic t = w.network->traffic(0);
  REQUIRE(t.num_put_signals == 1 && t.num_puts == 1 && t.num_bytes == w.cells_bytes() + 32);
  REQUIRE(w.network->traffic(1).num_put_signals == 0);
  REQUIRE(w.network->wait_idle(20 * kSecond));
}

}  // namespace

int main() {
  test_a_word_comes_after_its_data();
  test_puts_of_a_pair_keep_their_order();
  test_pairs_overtake();
  test_data_may_change_after_quiet_and_not_before();
  test_a_header_is_not_trusted();
  test_messages_of_a_rank_given_up_are_dropped();
  test_a_pair_that_is_cut();
  test_links_take_their_time();
  test_requests_are_counted();
  printf("all ok\n");
  return 0;
}
