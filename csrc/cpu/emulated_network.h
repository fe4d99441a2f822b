// A network inside one process, for tests and simulation: it promises what network.h says, and does
// everything else as badly as it can.
//
// A message first leaves (its data is copied out of the outbox: local completion), then arrives, in
// pieces and in any order, then its word is published. One thread does it all, at times drawn from
// the seed; pairs are independent of one another, so their messages overtake.
#pragma once

#include <stdint.h>

#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <queue>
#include <random>
#include <thread>
#include <vector>

#include "cpu/network.h"
#include "layout.h"

namespace moebius::cpu {

struct LinkConditions {
  uint64_t seed = 0;
  int64_t latency_ns = 0;       // from leaving to arriving
  int64_t max_delay_ns = 0;     // and at most that much more: before leaving, and of each piece
  int64_t max_piece_bytes = 0;  // a message arrives in pieces of at most that; 0: whole
  double bytes_per_ns = 0;      // through each rank's way out, and through its way in; 0: any
};

// What a rank has asked its network for.
struct Traffic {
  int64_t num_put_signals = 0;
  int64_t num_puts = 0;
  int64_t num_bytes = 0;
};

class EmulatedNetwork {
 public:
  // `heaps[r]` is rank r's heap; they must outlive this.
  EmulatedNetwork(const HeapLayout& layout,
                  std::vector<std::byte*> heaps,
                  const LinkConditions& conditions);
  EmulatedNetwork(const EmulatedNetwork&) = delete;
  EmulatedNetwork& operator=(const EmulatedNetwork&) = delete;
  ~EmulatedNetwork();  // what is still under way is dropped

  Network& way_out(int rank);

  // From `after_ns` from now on nothing arrives between two ranks, in either direction. Messages
  // vanish, or, with `is_stalled`, never leave.
  void cut(int a, int b, int64_t after_ns, bool is_stalled);
  Traffic traffic(int rank) const;
  // Messages that `is_allowed` refused, so far.
  int64_t num_refused() const;
  // Waits until nothing is under way (stalled messages aside); false after `timeout_ns`.
  bool wait_idle(int64_t timeout_ns);

 private:
  class WayOut;
  struct Transfer {
    int src, dst;
    int64_t offset;
    const std::byte* data;
    int64_t num_bytes;
    int64_t signal;
    uint64_t word;
    int64_t turn;                    // number within its pair
    std::vector<std::byte> content;  // once it has left
  };
  struct Pair {
    int64_t next_turn = 0;
    int64_t first_turn = 0;               // those before it are dropped if they have not left
    int64_t num_waiting = 0;              // that have not left
    int64_t left_ns = 0, settled_ns = 0;  // the last one's
    int64_t cut_ns = INT64_MAX;
    bool is_stalled = false, is_given_up = false;
  };
  enum class Step { kLeave, kPiece, kSettle };
  struct Event {
    int64_t time_ns;
    int64_t number;  // in the order of making, where times are equal
    Step step;
    std::shared_ptr<Transfer> transfer;
    int64_t begin, end;  // of a piece
    bool operator<(const Event& other) const {
      return time_ns != other.time_ns ? time_ns > other.time_ns : number > other.number;
    }
  };

  Pair& pair(int src, int dst) { return pairs_[static_cast<size_t>(src) * heaps_.size() + dst]; }
  int64_t some(int64_t most) {
    return most > 0 ? std::uniform_int_distribution<int64_t>(0, most)(random_) : 0;
  }
  void post(Transfer transfer);
  void add(
      int64_t time_ns, Step step, std::shared_ptr<Transfer> transfer, int64_t begin, int64_t end);
  void run();
  void leave(const std::shared_ptr<Transfer>& transfer, int64_t now);
  void arrive(const Event& event);
  int first_waiting(int src);  // a rank that messages of `src` have not left for, or -1

  const HeapLayout layout_;
  const std::vector<std::byte*> heaps_;
  const LinkConditions conditions_;
  mutable std::mutex mutex_;  // guards all below
  std::condition_variable has_work_, has_left_;
  std::mt19937_64 random_;
  std::priority_queue<Event> events_;
  std::vector<Pair> pairs_;           // [R, R]
  std::vector<int64_t> out_free_ns_;  // [R] when the way out is free again
  std::vector<int64_t> in_free_ns_;   // [R]
  std::vector<Traffic> traffic_;      // [R]
  int64_t num_refused_ = 0, num_events_ = 0;
  bool is_ending_ = false;
  std::vector<std::unique_ptr<WayOut>> ways_out_;  // [R]
  std::thread thread_;
};

}  // namespace moebius::cpu
