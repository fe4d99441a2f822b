// A kernel that sends and then receives: no block of it may need another one to be resident
// (DESIGN.md, I6), though none receives before all parts are sent. So the parts are not dealt out
// beforehand: a block that is there takes one after the other until there are none left, and waits
// for other ranks only then.
#pragma once

#include "cuda/rank.cuh"

namespace moebius::cuda {

struct Turns {
  const Rank& self;
  Half half;
  int num;        // of parts
  int32_t* turn;  // of this block, in shared memory

  // One thread: which part this block does next.
  MOEBIUS_DEVICE void ask() const {
    const auto taken = static_cast<int>(fetch_add_relaxed_gpu(num_taken(), 1));
    store(turn, taken < num ? taken : -1);
  }
  // All threads: the first part of this block; -1: there are none left.
  MOEBIUS_DEVICE int first() const {
    if (thread_index() == 0) ask();
    sync_block();
    return load(turn);
  }
  // Likewise, after a part, at whose end one thread has asked.
  MOEBIUS_DEVICE int next() const { return num == 1 ? -1 : load(turn); }
  // One thread, once no block asks any more.
  MOEBIUS_DEVICE void end() const { store(num_taken(), 0u); }

 private:
  MOEBIUS_DEVICE uint32_t* num_taken() const {
    return &self.state->num_taken[static_cast<int>(half)];
  }
};

// Of a half with a kernel of its own, whose blocks have a part each.
struct NoTurns {
  MOEBIUS_DEVICE void ask() const {}
};

}  // namespace moebius::cuda
