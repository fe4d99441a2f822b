#include "exchange.h"

namespace moebius::simt_test {

MOEBIUS_KERNEL(128) send_kernel(MOEBIUS_PARAMS SendParams p) {
  wait_for_previous_kernel();
  const int slot = static_cast<int>(p.round % kDepth);
  int* const is_open = reinterpret_cast<int*>(shared_memory());
  if (thread_index() == 0) {
    // The slot is free once its last rows were taken.
    bool ok = true;
    if (p.round >= kDepth && p.bug != Bug::kOverwriteEarly) {
      ok = await(&p.self->taken, p.round - kDepth + 1, p.timeout_ns, true);
    }
    store(is_open, ok ? 1 : 0);
  }
  sync_block();
  if (load(is_open) == 0) return;
  auto* const staging =
      reinterpret_cast<uint32_t*>(shared_memory() + 128 + warp_index() * kRowBytes);
  const int num_warps = num_blocks() * (num_threads() / kWarp);
  for (int row = block_index() * (num_threads() / kWarp) + warp_index(); row < kNumRows;
       row += num_warps) {
    if (p.bug != Bug::kNoBulkWaitRead) bulk_wait_read<0>();
    const auto* const from = reinterpret_cast<const Vec16*>(p.x + row * kRowWords);
    if (lane() < kRowBytes / 16) {
      Vec16 v = load_stream(from + lane());
      for (uint32_t& w : v.w) w += static_cast<uint32_t>(p.round);
      store(reinterpret_cast<Vec16*>(staging) + lane(), v);
    }
    if (p.bug != Bug::kNoWriterProxyFence) fence_proxy_async();
    if (p.bug != Bug::kNoWarpSync) sync_warp();
    const int offset = p.bug == Bug::kMisaligned ? 2 : 0;
    warp_bulk_store(p.next->rows[slot][row] + offset, staging, kRowBytes);
    if (p.bug != Bug::kNoCommit) bulk_commit();
    if (lane() < 4) {
      store(&p.next->heads[slot][row][lane()],
            static_cast<uint32_t>(p.round * 100000 + row * 100 + lane()));
    }
  }
  if (p.bug == Bug::kNoBulkWait) {
    bulk_wait_read<0>();
  } else {
    bulk_wait_all();
  }
  if (p.bug == Bug::kNoCommit) {
    bulk_commit();
    bulk_wait_read<0>();
  }
  let_next_kernel_start();
  if (p.bug != Bug::kNoBlockBarrier) sync_block();
  if (thread_index() != 0) return;
  uint32_t num_before;
  if (p.bug == Bug::kRelaxedCount) {
    num_before = load_relaxed_sys(&p.self->num_done[0]);
    add_relaxed_gpu(reinterpret_cast<int32_t*>(&p.self->num_done[0]), 1);
  } else {
    num_before = add_acq_rel_gpu(&p.self->num_done[0], 1);
  }
  const uint32_t awaited = p.bug == Bug::kSignalFirst ? 0 : static_cast<uint32_t>(num_blocks()) - 1;
  if (p.bug == Bug::kSignalFirst && num_before == static_cast<uint32_t>(num_blocks()) - 1) {
    store(&p.self->num_done[0], 0u);
  }
  if (num_before != awaited) return;
  if (p.bug != Bug::kSignalFirst) store(&p.self->num_done[0], 0u);
  switch (p.bug) {
    case Bug::kRelaxedSignal:
      store_relaxed_sys(&p.next->signal, p.round + 1);
      break;
    case Bug::kNoSysFence:
      store_relaxed_sys(&p.next->signal, p.round + 1);
      break;
    default:
      if (p.round % 2 == 0) {
        store_release_sys(&p.next->signal, p.round + 1);
      } else {
        fence_acq_rel_sys();
        store_relaxed_sys(&p.next->signal, p.round + 1);
      }
  }
}

MOEBIUS_KERNEL(128) recv_kernel(MOEBIUS_PARAMS RecvParams p) {
  wait_for_previous_kernel();
  const int slot = static_cast<int>(p.round % kDepth);
  auto* const barriers = reinterpret_cast<Barrier*>(shared_memory() + 64);
  int* const is_there = reinterpret_cast<int*>(shared_memory());
  Barrier* const barrier = barriers + warp_index();
  if (p.bug == Bug::kNoInitSync) {
    if (thread_index() == 0) {
      for (int w = 0; w < num_threads() / kWarp; ++w) barrier_init(barriers + w);
      fence_barrier_init();
    }
  } else if (lane() == 0) {
    barrier_init(barrier);
    if (p.bug != Bug::kNoInitFence) fence_barrier_init();
  }
  if (thread_index() == 0) {
    const bool ok = await(&p.self->signal, p.round + 1, p.timeout_ns, p.bug != Bug::kRelaxedPoll);
    store(is_there, ok ? 1 : 0);
  }
  if (p.bug == Bug::kNoReaderBarrier) {
    while (load(is_there) != 1) relax();  // garbage at first, seen without order
  } else if (p.bug != Bug::kNoInitSync) {
    sync_block();
  }
  if (p.bug != Bug::kNoInitSync && load(is_there) == 0) {
    if (thread_index() == 0) add_relaxed_gpu(reinterpret_cast<int32_t*>(&p.self->num_late), 1);
    return;
  }
  if (p.bug != Bug::kNoReaderProxyFence) fence_proxy_async();
  auto* const staging =
      reinterpret_cast<uint32_t*>(shared_memory() + 128 + warp_index() * kRowBytes);
  uint32_t parity = p.bug == Bug::kWrongParity ? 1 : 0;
  const int num_warps = num_blocks() * (num_threads() / kWarp);
  for (int row = block_index() * (num_threads() / kWarp) + warp_index(); row < kNumRows;
       row += num_warps) {
    warp_bulk_load(staging, p.self->rows[slot][row], kRowBytes, barrier);
    if (p.bug == Bug::kTwoArrivals) {
      warp_bulk_load(staging, p.self->rows[slot][row], kRowBytes, barrier);
    }
    if (p.bug != Bug::kNoLoadWait) barrier_wait(barrier, parity);
    parity ^= 1;
    uint32_t head = 0;
    if (lane() < 4) head = load(&p.self->heads[slot][row][lane()]);
    if (lane() < kRowBytes / 16) {
      store(reinterpret_cast<Vec16*>(p.self->out[row]) + lane(),
            load(reinterpret_cast<const Vec16*>(staging) + lane()));
    }
    for (int l = 1; l < 4; l *= 2) head += shfl_xor(head, l);
    head = shfl(head, 0);
    const uint32_t votes = ballot(lane() % 2 == 0);
    if (lane() == 5) store(&p.self->sum[row], head + static_cast<uint32_t>(popcount(votes)));
    sync_warp();  // before the next load overwrites what lanes read
  }
  let_next_kernel_start();
  sync_block();
  if (thread_index() != 0) return;
  if (add_acq_rel_gpu(&p.self->num_done[1], 1) + 1 != static_cast<uint32_t>(num_blocks())) return;
  store(&p.self->num_done[1], 0u);
  store_release_sys(&p.previous->taken, p.round + 1);
}

// Reads what the kernel ahead of it wrote.
MOEBIUS_KERNEL(128) sum_kernel(MOEBIUS_PARAMS SumParams p) {
  let_next_kernel_start();
  if (p.bug != Bug::kNoWaitForPrevious || thread_index() >= kWarp) wait_for_previous_kernel();
  if (block_index() != 0 || warp_index() != 0) return;
  uint32_t sum = 0;
  for (int row = 0; row < kNumRows; ++row) {
    if (lane() < kRowBytes / 16) {
      const Vec16 v = load(reinterpret_cast<const Vec16*>(p.self->out[row]) + lane());
      for (const uint32_t w : v.w) sum += w;
    }
    if (lane() == 0) sum += load(&p.self->sum[row]);
  }
  for (int l = 16; l > 0; l /= 2) sum += shfl_xor(sum, l);
  if (lane() == 0) store(&p.self->total, load(&p.self->total) + sum);
}

}  // namespace moebius::simt_test
