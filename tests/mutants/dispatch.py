"""Mistakes planted in the two halves of dispatch."""

from __future__ import annotations

from .mutant import Mutant

SEND = "cuda/dispatch_send.cu"
RECV = "cuda/dispatch_recv.cu"

MUTANTS = [
    Mutant(
        "ds-no-proxy-fence", SEND,
        "    fence_proxy_async();\n    sync_warp();\n    const auto num_bytes",
        "    sync_warp();\n    const auto num_bytes",
        "a bulk store reads what the stage held before", "plain",
    ),
    Mutant(
        "ds-no-warp-barrier", SEND,
        "    fence_proxy_async();\n    sync_warp();\n",
        "    fence_proxy_async();\n",
        "a bulk store is issued before the other lanes have filled the stage", "plain",
    ),
    Mutant(
        "ds-stage-reused-early", SEND,
        "    bulk_wait_read<1>();\n", "    bulk_wait_read<2>();\n",
        "a stage is filled again while it is read", "windows",
    ),
    Mutant(
        "ds-stages-start-over", SEND,
        "      send_tokens<kEncoding, kX>(l, slot, begin, end, shared, &stage_index);",
        "      stage_index = 0;\n      send_tokens<kEncoding, kX>(l, slot, begin, end, shared, &stage_index);",
        "the second chunk fills the stage that the first one's last copy reads", "chunks-send",
    ),
    Mutant(
        "ds-no-bulk-wait", SEND,
        "  bulk_wait_all();\n  let_next_kernel_start();", "  let_next_kernel_start();",
        "the signal overtakes the cells", "plain",
    ),
    Mutant(
        "ds-relaxed-signal", SEND,
        "      store_release_sys(signal_at(self, dst, slot, self.rank, SignalKind::kDispatch),",
        "      store_relaxed_sys(signal_at(self, dst, slot, self.rank, SignalKind::kDispatch),",
        "the signal does not carry the cells", "plain",
    ),
    Mutant(
        "ds-count-too-large", SEND,
        "signal_word(epoch, static_cast<uint64_t>(load(shared.num_sent + dst)))",
        "signal_word(epoch, static_cast<uint64_t>(load(shared.num_sent + dst)) + 1)",
        "one cell too many is read", "plain",
    ),
    Mutant(
        "ds-no-closing-wait", SEND,
        "      is_closed = poll(self, src, SignalKind::kCombine, closed, epoch, &word);",
        "      word = signal_word(closed, 0);",
        "cells are overwritten before they are read", "dispatch-only",
    ),
    Mutant(
        "ds-no-empty-combine", SEND,
        "const bool is_first = shfl(before, 0) != closed + 1;",
        "const bool is_first = before == 1 && false;",
        "a round that is never combined is never closed", "dispatch-only",
    ),
    Mutant(
        "ds-empty-combine-of-block-0", SEND,
        "const bool is_first = shfl(before, 0) != closed + 1;",
        "const bool is_first = block_index() == 0 || before == ~uint64_t{0};",
        "blocks that start before block 0 wait for each other across ranks", "dispatch-only",
        num_seeds=150,
    ),
    Mutant(
        "ds-epoch-early", SEND,
        "  read_ranks(self, shared);\n  sync_block();",
        "  read_ranks(self, shared);\n  sync_block();\n"
        "  if (block_index() == 0 && thread_index() == 0) {\n"
        "    store(&control_of(self, self.rank)->epoch, epoch + 1);\n  }",
        "blocks that start late take the round for the next one", "plain",
    ),
    Mutant(
        "ds-no-handle", SEND,
        "  store(p.handle, epoch);\n", "",
        "the later halves do not know their round", "plain",
    ),
    Mutant(
        "ds-handle-late", SEND,
        "  store(p.handle, epoch);\n", "  store(p.handle, epoch == 0 ? epoch : epoch - 1);\n",
        "the later halves work on the round before", "plain",
    ),
    Mutant(
        "ds-reply-base", SEND,
        "    store(shared.reply_base + dst, base);", "    store(shared.reply_base + dst, base / 2);",
        "replies of two ranks come to the same rows", "plain",
    ),
    Mutant(
        "ds-position-of-chunk", SEND,
        "shared.positions.find(d.dst, token - chunk_begin)", "shared.positions.find(d.dst, token)",
        "tokens of the second chunk go to wrong cells", "chunks-send",
    ),
    Mutant(
        "ds-rank-twice", SEND,
        "    if (k < lane() && other == d.dst) is_first = false;\n", "",
        "a rank that two choices name replies once, and is counted twice", "plain",
    ),
    Mutant(
        "ds-all-valid", SEND,
        "  return n < 0 ? 0 : min_of(n, p.num_tokens);", "  return n < 0 ? 0 : p.num_tokens;",
        "num_valid_tokens is ignored", "plain",
    ),
    Mutant(
        "ds-weights-reversed", SEND,
        "ids + s.num_topk) + lane(), d.weight);", "ids + s.num_topk) + s.num_topk - 1 - lane(), d.weight);",
        "weights belong to other choices", "plain",
    ),
    Mutant(
        "ds-replies-by-choice", SEND,
        "    num_below += is_first && other < d.dst ? 1 : 0;",
        "    num_below += is_first && k < lane() ? 1 : 0;",
        "replies are summed in another order", "four-ranks",
    ),
    Mutant(
        "ds-mask-ignored", SEND,
        "is_masked(self, r) ? 0 : 1", "is_masked(self, r) ? 1 : 1",
        "a rank that was given up is waited for again", "stopped",
    ),
    Mutant(
        "ds-no-wait-for-previous", SEND,
        "  wait_for_previous_kernel();\n", "",
        "the round is begun before the kernel ahead has ended", "plain",
    ),
    Mutant(
        "ds-no-barrier-before-count", SEND,
        "  sync_block();\n  const bool is_ours", "  const bool is_ours",
        "tokens are counted that are not listed yet", "plain",
    ),
    Mutant(
        "ds-no-barrier-before-sending", SEND,
        "thread_index() == 0) network_quiet();\n  sync_block();\n  int stage_index",
        "thread_index() == 0) network_quiet();\n  int stage_index",
        "tokens are sent before the bases are known", "plain",
    ),
    Mutant(
        "ds-last-bad-choice", SEND,
        "kMostChoices - static_cast<uint64_t>(min_of(at, kMostChoices));", "static_cast<uint64_t>(at);",
        "a place that nobody planted is recorded", "bad-ids",
    ),
    Mutant(
        "dr-no-proxy-fence", RECV,
        "  // The bulk loads below read what peers wrote.\n  fence_proxy_async();\n", "",
        "bulk loads read what the inbox held before", "plain",
    ),
    Mutant(
        "dr-no-barrier-after-poll", RECV,
        "  fence_proxy_async();\n  sync_block();\n}", "  fence_proxy_async();\n}",
        "cells are read by threads that know of no signal", "plain",
    ),
    Mutant(
        "dr-no-bulk-wait", RECV,
        "  bulk_wait_all();\n  let_next_kernel_start();", "  let_next_kernel_start();",
        "rows are read before they are written", "plain",
    ),
    Mutant(
        "dr-no-barrier-before-count", RECV,
        "  sync_block();\n  shared.positions.count();", "  shared.positions.count();",
        "cells are counted that are not listed yet", "plain",
    ),
    Mutant(
        "dr-no-barrier-between-chunks", RECV,
        "end == num_cells, shared);\n    sync_block();", "end == num_cells, shared);",
        "the lists of a chunk are cleared while they are read", "chunks",
    ),
    Mutant(
        "dr-row-of-wrong-choice", RECV,
        "store(rows + inbox * s.num_topk + lane(), at);",
        "store(rows + inbox * s.num_topk + (lane() + 1) % s.num_topk, at);",
        "combine takes a choice's row for another's", "plain",
    ),
    Mutant(
        "dr-expert-twice", RECV,
        "      if (k < lane() && other == id) is_first = false;",
        "      if (k < lane() && other == id) is_first = is_first;",
        "a token that names an expert twice counts twice", "token-major",
    ),
    Mutant(
        "dr-counts-not-reset", RECV,
        "      store(self.expert_counts + expert, 0);\n", "",
        "counts add up from round to round", "token-major",
    ),
    Mutant(
        "dr-unused-rows", RECV,
        "      store(p.topk_ids + src * per_src + i, -1);", "      store(p.topk_ids + src * per_src + i, 0);",
        "rows without a token read as routed", "token-major",
    ),
    Mutant(
        "dr-mask-ignored", RECV,
        "if (!begun.is_lost && !is_masked(self, src)) {", "if (!begun.is_lost) {",
        "a rank that was given up is waited for again", "stopped",
    ),
    Mutant(
        "dr-no-wait-for-previous", RECV,
        "  wait_for_previous_kernel();\n", "",
        "the handle is read before dispatch send has written it", "plain",
    ),
]  # fmt: skip
