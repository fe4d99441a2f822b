"""Mistakes planted in the two halves of dispatch."""

from __future__ import annotations

from .mutant import Mutant

SEND = "cuda/dispatch_send.cu"
RECV = "cuda/dispatch_recv.cu"
DESTINATIONS = "cuda/destinations.cuh"
SCALES = "cuda/scales.cuh"
ARRIVE_EXPERT_MAJOR = (
    "    if (end == num_cells && is_bookkeeper()) arrive(p.self, Half::kDispatchRecv, shared.ending);\n"
)

MUTANTS = [
    Mutant(
        "ds-no-proxy-fence", SEND,
        "    fence_proxy_async_shared();\n", "",
        "a bulk store reads what the stage held before", "plain",
    ),
    Mutant(
        "ds-no-warp-barrier", SEND,
        "    fence_proxy_async_shared();\n    sync_warp();\n", "    fence_proxy_async_shared();\n",
        "a bulk store is issued before the other lanes have filled the stage", "plain",
    ),
    Mutant(
        "ds-stage-reused-early", SEND,
        "    bulk_wait_read<1>();\n", "    bulk_wait_read<2>();\n",
        "a stage is filled again while it is read", "windows",
    ),
    Mutant(
        "ds-stages-start-over", SEND,
        "    send_tokens<kEncoding, kX>(l, slot, begin, end, shared, &sender);",
        "    sender.stage = 0;\n    send_tokens<kEncoding, kX>(l, slot, begin, end, shared, &sender);",
        "the second chunk fills the stage that the first one's last copy reads", "chunks-send", num_seeds=150,
    ),
    Mutant(
        "ds-filled-with-the-next", SEND,
        "fill_stage(p.self, now, base,", "fill_stage(p.self, sender->fetched, base,",
        "a stage is filled with what was asked for after it", "plain",
    ),
    Mutant(
        "ds-not-fetched-after-a-gap", SEND,
        "      sender->advance(l);\n      continue;",
        "      --sender->num_left;\n      sender->next.advance(l.num_slices);\n      continue;",
        "the token after one that goes nowhere is sent as that one", "plain",
    ),
    Mutant(
        "ds-destinations-kept", SEND,
        "    if (item.whole != token) {", "    if (token < 0) {",
        "a warp's second token goes where its first one went", "plain",
    ),
    Mutant(
        "ds-combined-of-slot-0", SEND,
        "take_slot(self, epoch, slot, shfl(combined, slot), shared);",
        "take_slot(self, epoch, slot, shfl(combined, 0), shared);",
        "a round is taken for one that was never combined", "interleaved",
    ),
    Mutant(
        "ds-failures-dropped", SEND,
        "(met & kAnyFailed) != 0, shared)", "false, shared)",
        "a round that could not begin is announced", "stopped",
    ),
    Mutant(
        "ds-refusal-ignored", SEND,
        "    if (is_refused) {", "    if (is_refused && epoch == ~uint64_t{0}) {",
        "a rank that was given up begins a round all the same", "late",
    ),
    Mutant(
        "ds-no-bulk-wait", SEND,
        "  bulk_wait_all();\n  if (!is_ready) let_next_kernel_start();\n  const uint32_t met",
        "  if (!is_ready) let_next_kernel_start();\n  const uint32_t met",
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
        "        word = spin(self, src, SignalKind::kCombine, closed, epoch);",
        "        word = signal_word(closed, 0);",
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
        "  read_ranks(self, shared);\n  const int slot",
        "  read_ranks(self, shared);\n"
        "  if (block_index() == 0 && thread_index() == 0) {\n"
        "    store(&control_of(self, self.rank)->epoch, epoch + 1);\n  }\n"
        "  const int slot",
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
        "ds-position-of-chunk", DESTINATIONS,
        "shared.positions.find(d.dst, token - chunk_begin)", "shared.positions.find(d.dst, token)",
        "tokens of the second chunk go to wrong cells", "chunks-send",
    ),
    Mutant(
        "ds-rank-twice", DESTINATIONS,
        "    if (k < lane() && other == d.dst) is_first = false;\n", "",
        "a rank that two choices name replies once, and is counted twice", "plain",
    ),
    Mutant(
        "ds-all-valid", SEND,
        "  return n < 0 ? 0 : min_of(n, p.num_tokens);", "  return n < 0 ? 0 : p.num_tokens;",
        "num_valid_tokens is ignored", "plain",
    ),
    Mutant(
        "ds-weights-reversed", DESTINATIONS,
        "ids + s.num_topk) + lane(), d.weight);", "ids + s.num_topk) + s.num_topk - 1 - lane(), d.weight);",
        "weights belong to other choices", "plain",
    ),
    Mutant(
        "ds-replies-by-choice", DESTINATIONS,
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
        "  sync_block();\n  // From here on this kernel", "  // From here on this kernel",
        "tokens are counted that are not listed yet", "plain",
    ),
    Mutant(
        "ds-no-barrier-before-sending", SEND,
        "thread_index() == 0) network_quiet();\n  sync_block();\n",
        "thread_index() == 0) network_quiet();\n",
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
        "dr-fence-of-shared-memory", RECV,
        "  fence_proxy_async();\n", "  fence_proxy_async_shared();\n",
        "bulk loads read what the inbox held before", "plain",
    ),
    Mutant(
        "dr-started-before-the-fence", RECV,
        "  fence_proxy_async();\n  sync_block();\n}", "  sync_block();\n}",
        "the first rows are asked for before what peers wrote is known to bulk loads", "plain",
        also=(
            (
                "behind in the queue\n    shared.positions.count();",
                "behind in the queue\n    fence_proxy_async();\n    shared.positions.count();",
            ),
        ),
    ),
    Mutant(
        "dr-token-started-before-the-fence", RECV,
        "  fence_proxy_async();\n  sync_block();\n}", "  sync_block();\n}",
        "the first rows are asked for before what peers wrote is known to bulk loads", "token-major",
        also=(("  mover.start(num_cells);\n", "  mover.start(num_cells);\n  fence_proxy_async();\n"),),
    ),
    Mutant(
        "dr-no-barrier-after-poll", RECV,
        "  fence_proxy_async();\n  sync_block();\n}", "  fence_proxy_async();\n}",
        "cells are read by threads that know of no signal", "plain",
    ),
    Mutant(
        "dr-no-bulk-wait", RECV,
        "  bulk_wait_all();\n  if (!is_ready)", "  if (!is_ready)",
        "rows are read before they are written", "plain",
    ),
    Mutant(
        "dr-no-barrier-before-count", RECV,
        "    if (!is_good) fail_cell(self, begun.epoch, cell.src);\n  }\n  sync_block();\n",
        "    if (!is_good) fail_cell(self, begun.epoch, cell.src);\n  }\n",
        "cells are counted that are not listed yet", "plain",
    ),
    Mutant(
        "dr-no-barrier-between-chunks", RECV,
        "    begin = end;\n    sync_block();\n", "    begin = end;\n",
        "the lists of a chunk are cleared while they are read", "chunks",
    ),
    Mutant(
        "dr-row-of-wrong-choice", RECV,
        "store(rows + inbox * s.num_topk + choice, at);",
        "store(rows + inbox * s.num_topk + (choice + 1) % s.num_topk, at);",
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
    Mutant(
        "dr-no-barrier-after-count", RECV,
        "    shared.positions.count();\n    sync_block();\n", "    shared.positions.count();\n",
        "rows are looked up in lists that are not counted yet", "plain",
    ),
    Mutant(
        "dr-odd-id-not-masked", RECV,
        "        if (2 * (first + i) + 1 == s.num_topk) ids[i] |= ~uint64_t{0} << 32;\n", "",
        "with an odd number of choices, what follows the ids is taken for one", "plain",
    ),
    Mutant(
        "dr-last-id-masked", RECV,
        "(first + i) + 1 == s.num_topk)", "(first + i) + 2 >= s.num_topk)",
        "with an even number of choices, the last one is lost", "interleaved",
    ),
    Mutant(
        "dr-second-pair-is-the-first", RECV,
        "load(pairs + first + i) : ~uint64_t{0}", "load(pairs + first) : ~uint64_t{0}",
        "the second pair of ids of a cell is taken for its first", "four-ranks",
    ),
    Mutant(
        "dr-range-from-the-start", RECV,
        "      from = load(range) >> 32;  // of a chunk before\n", "",
        "rows of a source that go on in another chunk seem to begin at none", "chunks",
    ),
    Mutant(
        "ds-heads-of-the-first-slice", SEND,
        "      if (item.part == who) send_head", "      if (item.part == 0 && who == 0) send_head",
        "only some cells get a head", "windows",
    ),
    Mutant(
        "ds-ranks-of-the-token-before", SEND,
        "      if (token != sender->found) d = find_ranks", "      if (sender->found < 0) d = find_ranks",
        "a token goes where the warp's first one went", "plain",
    ),
    Mutant(
        "dr-cell-of-the-source-before", RECV,
        "    if (load(shared.first_cell + middle) <= number) {", "    if (load(shared.first_cell + middle) < number) {",
        "the first cell of a source is looked for at the one before", "plain",
    ),
    Mutant(
        "dr-arrives-before-it-waits", RECV,
        "  await_cells(p, begun, shared);\n",
        "  if (is_bookkeeper() && !self.is_token_major) arrive(self, Half::kDispatchRecv, shared.ending);\n"
        "  await_cells(p, begun, shared);\n",
        "the last block does not know what the others failed for", "stopped",
        also=((ARRIVE_EXPERT_MAJOR, ""),),
    ),
    Mutant(
        "dr-arrives-before-the-barrier", RECV,
        "  // The bulk loads below read what peers wrote.\n",
        "  if (is_bookkeeper() && !self.is_token_major) arrive(self, Half::kDispatchRecv, shared.ending);\n",
        "the last block does not know what the others failed for", "stopped",
        also=((ARRIVE_EXPERT_MAJOR, ""), ("  sync_block();\n  if (warp_index() == 0) {\n    const bool is_lost",
              "  if (warp_index() == 0) {\n    const bool is_lost")),
    ),
    Mutant(
        "dr-arrives-before-the-list", RECV,
        "    list_cells(p.self, begun, begin, end, shared);\n",
        ARRIVE_EXPERT_MAJOR + "    list_cells(p.self, begun, begin, end, shared);\n",
        "the last block does not know which cell another could not read", "bad-cell",
        also=(("from here on: the blocks meet while the rows are on their way.\n" + ARRIVE_EXPERT_MAJOR,
               "from here on: the blocks meet while the rows are on their way.\n"),), num_seeds=150,
    ),
    Mutant(
        "dr-bad-id-taken", RECV,
        "        if (id < -1 || id >= num_local) {", "        if (id < -1) {",
        "an expert that there is not gets a row", "bad-cell",
    ),
    Mutant(
        "dr-bad-id-left-out", RECV,
        "          is_good = false;\n", "",
        "a cell that names no expert is received as if it were good", "bad-cell",
    ),
    Mutant(
        "dr-reply-row-not-looked-at", RECV,
        "    bool is_good = is_sane(self, cell.at);\n", "    bool is_good = true;\n",
        "a reply would go anywhere", "bad-cell",
    ),
    Mutant(
        "dr-wrong-source-blamed", RECV,
        "    if (!is_good) fail_cell(self, begun.epoch, cell.src);\n",
        "    if (!is_good) fail_cell(self, begun.epoch, cell.src ^ 1);\n",
        "a rank is blamed for another's cell", "bad-cell",
    ),
    Mutant(
        "dr-token-bad-id-left-out", RECV,
        "      fail_cell(p.self, begun.epoch, cell.src);\n      id = -1;", "      id = -1;",
        "a cell that names no expert is received as if it were good", "bad-cell-token",
    ),
    Mutant(
        "dr-token-reply-row-not-looked-at", RECV,
        "    if (lane() == 0 && !is_sane(p.self, cell.at)) fail_cell(p.self, begun.epoch, cell.src);\n", "",
        "a reply would go anywhere", "bad-cell-token",
    ),
    Mutant(
        "dr-token-arrives-before-the-barrier", RECV,
        "  sync_block();\n  if (is_bookkeeper()) arrive(p.self, Half::kDispatchRecv, shared.ending);\n  mover.run();",
        "  if (is_bookkeeper()) arrive(p.self, Half::kDispatchRecv, shared.ending);\n  mover.run();",
        "the last block reads counts to which others have not added", "token-major", num_seeds=1500,
    ),
    Mutant(
        "dr-arrives-with-every-chunk", RECV,
        "    if (end == num_cells && is_bookkeeper()) arrive", "    if (is_bookkeeper()) arrive",
        "a block with several chunks counts as several", "chunks",
    ),
    Mutant(
        "dr-no-barrier-before-met", RECV,
        "  sync_block();\n  if (load(&shared.ending->met) != 0)", "  if (load(&shared.ending->met) != 0)",
        "threads of the last block do not know that it is", "plain",
    ),
    Mutant(
        "dr-awaiting-kept", RECV,
        "  if (is_bookkeeper()) clear_awaiting(self);\n", "",
        "a rank says that it waits when it does not", "dispatch-only",
    ),
    Mutant(
        "dr-scales-of-the-first-words", SCALES,
        "put(i * kWarp + lane(), words[i]);", "put(i * kWarp + lane(), words[0]);",
        "long rows of scales repeat their beginning", "wide",
    ),
    Mutant(
        "dr-scales-cut-off", SCALES,
        "    for (int w = kAhead * kWarp + lane(); w < num_words(p); w += kWarp) put(w, load(from + w));\n", "",
        "the end of long rows of scales is not written", "wide",
    ),
    Mutant(
        "dr-scales-of-later-windows", RECV,
        "    if (is_first && p.scales != nullptr) scales.read(p, from(row));",
        "    if (!is_first && p.scales != nullptr) scales.read(p, from(row));",
        "a row's scales are not written", "fp8",
    ),
]  # fmt: skip
