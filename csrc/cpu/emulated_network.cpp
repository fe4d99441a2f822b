#include "cpu/emulated_network.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "cpu/wait.h"

namespace moebius::cpu {
namespace {

using Lock = std::unique_lock<std::mutex>;

constexpr int64_t kWholeBytes = 16;  // smaller messages are not broken up

// On the wall clock: ThreadSanitizer does not know waits on the monotonic one.
void wait_for(std::condition_variable& condition, Lock& lock, int64_t ns) {
  condition.wait_until(lock, std::chrono::system_clock::now() + std::chrono::nanoseconds(ns));
}

}  // namespace

class EmulatedNetwork::WayOut : public Network {
 public:
  WayOut(EmulatedNetwork& network, int rank) : network_(network), rank_(rank) {}

  void put_signal(int dst,
                  int64_t offset,
                  const std::byte* data,
                  int64_t num_bytes,
                  int64_t signal,
                  uint64_t word) override {
    network_.post({rank_, dst, offset, data, num_bytes, signal, word, 0, {}});
  }

  void put(int dst, int64_t offset, const std::byte* data, int64_t num_bytes) override {
    network_.post({rank_, dst, offset, data, num_bytes, kNoSignal, 0, 0, {}});
  }

  int quiet(int64_t timeout_ns) override {
    const int64_t deadline_ns = now_ns() + timeout_ns;
    Lock lock(network_.mutex_);
    for (;;) {
      const int waiting = network_.first_waiting(rank_);
      const int64_t left_ns = deadline_ns - now_ns();
      if (waiting < 0 || left_ns <= 0) return waiting;
      wait_for(network_.has_left_, lock, left_ns);
    }
  }

  void give_up(int dst, bool is_given_up) override {
    const Lock lock(network_.mutex_);
    Pair& pair = network_.pair(rank_, dst);
    pair.is_given_up = is_given_up;
    if (is_given_up) pair.first_turn = pair.next_turn;
    network_.has_left_.notify_all();
  }

 private:
  EmulatedNetwork& network_;
  const int rank_;
};

EmulatedNetwork::EmulatedNetwork(const HeapLayout& layout,
                                 std::vector<std::byte*> heaps,
                                 const LinkConditions& conditions)
    : layout_(layout),
      heaps_(std::move(heaps)),
      conditions_(conditions),
      random_(conditions.seed),
      pairs_(heaps_.size() * heaps_.size()),
      out_free_ns_(heaps_.size()),
      in_free_ns_(heaps_.size()),
      traffic_(heaps_.size()) {
  for (size_t rank = 0; rank < heaps_.size(); ++rank) {
    ways_out_.push_back(std::make_unique<WayOut>(*this, static_cast<int>(rank)));
  }
  thread_ = std::thread([this] { run(); });
}

EmulatedNetwork::~EmulatedNetwork() {
  {
    const Lock lock(mutex_);
    is_ending_ = true;
    has_work_.notify_all();
  }
  thread_.join();
}

Network& EmulatedNetwork::way_out(int rank) { return *ways_out_[rank]; }

void EmulatedNetwork::cut(int a, int b, int64_t after_ns, bool is_stalled) {
  const Lock lock(mutex_);
  for (Pair* one : {&pair(a, b), &pair(b, a)}) {
    one->cut_ns = now_ns() + after_ns;
    one->is_stalled = is_stalled;
  }
}

Traffic EmulatedNetwork::traffic(int rank) const {
  const Lock lock(mutex_);
  return traffic_[rank];
}

int64_t EmulatedNetwork::num_refused() const {
  const Lock lock(mutex_);
  return num_refused_;
}

bool EmulatedNetwork::wait_idle(int64_t timeout_ns) {
  const int64_t deadline_ns = now_ns() + timeout_ns;
  Lock lock(mutex_);
  while (!events_.empty()) {
    const int64_t left_ns = deadline_ns - now_ns();
    if (left_ns <= 0) return false;
    wait_for(has_left_, lock, std::min<int64_t>(left_ns, 1'000'000));
  }
  return true;
}

void EmulatedNetwork::post(Transfer transfer) {
  const Lock lock(mutex_);
  Traffic& traffic = traffic_[transfer.src];
  (transfer.signal == kNoSignal ? traffic.num_puts : traffic.num_put_signals) += 1;
  traffic.num_bytes += transfer.num_bytes;
  Pair& pair_of = pair(transfer.src, transfer.dst);
  transfer.turn = pair_of.next_turn++;
  ++pair_of.num_waiting;
  pair_of.left_ns = std::max(pair_of.left_ns, now_ns() + some(conditions_.max_delay_ns));
  add(pair_of.left_ns, Step::kLeave, std::make_shared<Transfer>(std::move(transfer)), 0, 0);
}

void EmulatedNetwork::add(
    int64_t time_ns, Step step, std::shared_ptr<Transfer> transfer, int64_t begin, int64_t end) {
  const bool is_first = events_.empty() || time_ns < events_.top().time_ns;
  events_.push({time_ns, num_events_++, step, std::move(transfer), begin, end});
  if (is_first) has_work_.notify_one();
}

void EmulatedNetwork::run() {
  Lock lock(mutex_);
  while (!is_ending_) {
    if (events_.empty()) {
      has_work_.wait(lock);
      continue;
    }
    const int64_t now = now_ns();
    if (events_.top().time_ns > now) {
      wait_for(has_work_, lock, events_.top().time_ns - now);
      continue;
    }
    const Event event = events_.top();
    events_.pop();
    if (event.step == Step::kLeave) {
      leave(event.transfer, now);
    } else {
      arrive(event);
    }
  }
}

void EmulatedNetwork::leave(const std::shared_ptr<Transfer>& transfer, int64_t now) {
  Transfer& t = *transfer;
  Pair& pair_of = pair(t.src, t.dst);
  const bool is_dropped = t.turn < pair_of.first_turn;
  const bool is_cut = now >= pair_of.cut_ns;
  if (is_cut && pair_of.is_stalled && !is_dropped) return;  // counts as waiting for ever
  --pair_of.num_waiting;
  if (first_waiting(t.src) < 0) has_left_.notify_all();
  if (is_dropped || is_cut) return;
  t.content.assign(t.data, t.data + t.num_bytes);

  int64_t arrival_ns = now;
  if (conditions_.bytes_per_ns > 0) {
    const auto taken_ns = static_cast<int64_t>(t.num_bytes / conditions_.bytes_per_ns);
    int64_t& out = out_free_ns_[t.src];
    int64_t& in = in_free_ns_[t.dst];
    out = std::max(out, now) + taken_ns;
    in = std::max(in + taken_ns, out);  // both ways carry it at once
    arrival_ns = in;
  }
  arrival_ns = std::max(arrival_ns + conditions_.latency_ns, pair_of.settled_ns);
  int64_t settled_ns = arrival_ns;
  for (int64_t begin = 0; begin < t.num_bytes;) {
    int64_t end = t.num_bytes;
    if (conditions_.max_piece_bytes > 0 && t.num_bytes > kWholeBytes) {
      end = std::min(end, begin + 1 + some(conditions_.max_piece_bytes - 1));
    }
    const int64_t time_ns = arrival_ns + some(conditions_.max_delay_ns);
    add(time_ns, Step::kPiece, transfer, begin, end);
    settled_ns = std::max(settled_ns, time_ns);
    begin = end;
  }
  pair_of.settled_ns = settled_ns + some(conditions_.max_delay_ns);
  add(pair_of.settled_ns, Step::kSettle, transfer, 0, 0);
}

void EmulatedNetwork::arrive(const Event& event) {
  const Transfer& t = *event.transfer;
  if (now_ns() >= pair(t.src, t.dst).cut_ns) return;
  Message message{0, nullptr, 0, kNoSignal, 0};
  if (event.step == Step::kPiece) {
    message.offset = t.offset + event.begin;
    message.data = t.content.data() + event.begin;
    message.num_bytes = event.end - event.begin;
  } else {
    message.signal = t.signal;
    message.word = t.word;
  }
  if (!deliver(layout_, heaps_[t.dst], t.src, message)) ++num_refused_;
}

int EmulatedNetwork::first_waiting(int src) {
  for (int dst = 0; dst < static_cast<int>(heaps_.size()); ++dst) {
    const Pair& one = pair(src, dst);
    if (one.num_waiting > 0 && !one.is_given_up) return dst;
  }
  return -1;
}

}  // namespace moebius::cpu
