"""Mistakes planted in what the kernels share."""

from __future__ import annotations

from .mutant import Mutant

RANK = "cuda/rank.cuh"
MOVER = "cuda/mover.cuh"
WORK = "cuda/work.cuh"
LAYOUT = "layout.h"
DISPATCH = ("dispatch_send", "dispatch_recv")
RECEIVE = ("dispatch_recv", "combine_recv")
RELAXED = (
    "add_acq_rel_gpu(num_done, mine) + mine;",
    "update(num_done, simt::Order::kRelaxed, simt::Scope::kGpu, [&](uint32_t v) { return v + mine; }) + mine;",
)

MUTANTS = [
    Mutant(
        "mover-wrong-parity", MOVER,
        "served / kMoverStages % 2", "served % 2",
        "a stage is taken for filled", "chunks", ("dispatch_recv",),
    ),
    Mutant(
        "mover-no-load-wait", MOVER,
        "      barrier_wait(shared.filled + served % kMoverStages, served / kMoverStages % 2);\n", "",
        "a stage is stored from before it is filled", "plain", ("dispatch_recv",),
    ),
    Mutant(
        "mover-stage-reused-early", MOVER,
        "      bulk_wait_read<0>();  // the stage", "      bulk_wait_read<1>();  // the stage",
        "a stage is filled again while it is read", "windows", ("dispatch_recv",),
    ),
    Mutant(
        "mover-wrong-window", MOVER,
        "      next.advance(num_windows);\n",
        "      next.advance(num_windows);\n      next.advance(num_windows);\n",
        "windows are left out", "windows", ("dispatch_recv",),
    ),
    Mutant(
        "poll-relaxed", RANK,
        "  return load_acquire_sys(signal_at(self, self.rank, self.layout.slot_of(epoch)",
        "  return load_relaxed_sys(signal_at(self, self.rank, self.layout.slot_of(epoch)",
        "what was signalled before the first look is not seen", "plain", RECEIVE,
    ),
    Mutant(
        "spin-relaxed", RANK,
        "  for (;;) {\n    word = load_acquire_sys(awaited);", "  for (;;) {\n    word = load_relaxed_sys(awaited);",
        "what was signalled after the first look is not seen", "plain", RECEIVE,
    ),
    Mutant(
        "poll-any-epoch", LAYOUT,
        "(word & kLowMask) != 0 && signal_epoch(word) >= epoch", "(word & kLowMask) != 0 && epoch + 1 != 0",
        "the signal of an earlier round is taken for this one's", "plain", ("dispatch_recv",),
    ),
    Mutant(
        "awaiting-of-block-0", RANK,
        "    store_release_sys(&control_of(self, self.rank)->awaiting, signal_word(awaited_epoch, whom));\n",
        "    if (block_index() == 0) {\n"
        "      store_release_sys(&control_of(self, self.rank)->awaiting, signal_word(awaited_epoch, whom));\n    }\n",
        "a rank whose block 0 has not begun is blamed for what it waits for", "stopped", num_seeds=150,
    ),
    Mutant(
        "slot-of-another-round", LAYOUT,
        "epoch & (depth - 1)", "epoch & (depth - 1) & 2",
        "rounds that are open at once share a slot", "interleaved", num_seeds=60,
    ),
    Mutant(
        "done-before-the-block", RANK,
        "  sync_block();\n  if (num == 1) return", "  if (num == 1) sync_block();\n"
        "  if (num == 1) return",
        "a block is counted before its threads are done", "plain", ("dispatch_send",),
    ),
    Mutant(
        "done-with-the-first-block", RANK,
        "== static_cast<uint32_t>(num);", "== 1u;",
        "the signal is sent by the first block to be done", "plain", ("dispatch_send",),
    ),
    Mutant(
        "done-counted-relaxed", RANK,
        *RELAXED,
        "the last block does not know what the others wrote", "plain", ("dispatch_send",),
    ),
    Mutant(
        "done-counted-relaxed-combine-send", RANK,
        *RELAXED,
        "the last block does not know what the others wrote", "plain", ("combine_send",),
    ),
    Mutant(
        "done-one-block-no-barrier", RANK,
        "  sync_block();\n  if (num == 1) return", "  if (num != 1) sync_block();\n"
        "  if (num == 1) return",
        "the only block signals before its threads are done", "plain", ("dispatch_send",),
    ),
    Mutant(
        "done-one-block-no-barrier-combine", RANK,
        "  sync_block();\n  if (num == 1) return", "  if (num != 1) sync_block();\n"
        "  if (num == 1) return",
        "the only block signals before its threads are done", "plain", ("combine_send",),
    ),
    Mutant(
        "done-one-block-never-fails", RANK,
        "return kIsLast | (load(&ending->has_failed) != 0 ? kAnyFailed : 0);", "return kIsLast;",
        "a grid of one block announces a round that it has given up", "stopped", ("dispatch_send",),
    ),
    Mutant(
        "done-failures-not-told", RANK,
        "(all >= kOneFailed ? kAnyFailed : 0)", "0",
        "the last block announces a round that is given up", "stopped", ("dispatch_send",),
    ),
    Mutant(
        "done-failures-count-as-blocks", RANK,
        "all % kOneFailed == static_cast", "all == static_cast",
        "no block of a failed kernel is the last one", "stopped", ("dispatch_send",),
    ),
    Mutant(
        "done-no-barrier-before-met", RANK,
        "turns.ask();\n  sync_block();\n", "turns.ask();\n",
        "threads of the last block do not know that it is", "plain", ("dispatch_send",),
    ),
    Mutant(
        "run-loses-one", WORK,
        "(share.first < rest ? 1 : 0)", "(share.first + 1 < rest ? 1 : 0)",
        "an item is left out", "plain", ("dispatch_send",),
    ),
    Mutant(
        "run-loses-one-window", WORK,
        "(share.first < rest ? 1 : 0)", "(share.first + 1 < rest ? 1 : 0)",
        "an item is left out", "plain", ("dispatch_recv",),
    ),
    Mutant(
        "run-one-too-many", WORK,
        "(share.first < rest ? 1 : 0)", "1",
        "an item is moved that there is not", "token-major", ("dispatch_recv",),
    ),
    Mutant(
        "run-begins-early", WORK,
        " + static_cast<int>(min_of(share.first, rest));", ";",
        "items at the end are left out", "plain", ("dispatch_send",),
    ),
    Mutant(
        "part-without-carry", WORK,
        "    part = 0;\n    ++whole;", "    part = 0;",
        "a warp stays with its first row", "windows", ("dispatch_recv",),
    ),
    Mutant(
        "part-without-carry-dispatch-send", WORK,
        "    part = 0;\n    ++whole;", "    part = 0;",
        "a warp stays with its first token", "windows", ("dispatch_send",),
    ),
    Mutant(
        "part-not-set-back", WORK,
        "    part = 0;\n    ++whole;", "    ++whole;",
        "a warp leaves its rows behind their ends", "windows", ("dispatch_recv",),
    ),
    Mutant(
        "mover-row-of-the-next", MOVER,
        "      item = ahead;\n      ahead = after;", "      item = after;",
        "what was asked for is stored to another row", "plain", ("dispatch_recv",),
    ),
    Mutant(
        "mover-row-not-begun", MOVER,
        "      if (now.whole != row) rows.begin", "      if (row < 0) rows.begin",
        "a warp's second row is stored over its first one", "plain", ("dispatch_recv",),
    ),
    Mutant(
        "scan-adds-itself", RANK,
        "    if (lane() >= delta) value += below;", "    value += below;",
        "the cells of the first sources count several times", "plain", ("dispatch_recv",),
    ),
    Mutant(
        "given-up-in-another-round", RANK,
        "return load_relaxed_sys(&failure.claimed) == epoch + 1;", "return load_relaxed_sys(&failure.claimed) != 0;",
        "a round is lost because an earlier one of its slot was", "stopped",
    ),
    Mutant(
        "done-not-reset", RANK,
        "  if (is_last) store(num_done, 0u);\n", "",
        "no block is the last one in the next round", "plain", ("combine_send",),
    ),
    Mutant(
        "stale-too-late", RANK,
        "next - begun.epoch > depth", "next - begun.epoch > depth + 1",
        "a handle whose slot was taken is used", "stale", ("dispatch_recv", "combine_send", "combine_recv"),
    ),
    Mutant(
        "stale-too-early", RANK,
        "next - begun.epoch > depth", "next - begun.epoch >= depth",
        "a round cannot be received once D - 1 others have begun", "interleaved",
        ("dispatch_recv", "combine_send", "combine_recv"),
    ),
    Mutant(
        "abort-not-sent", RANK,
        "    if (!is_combined) send", "    if (!is_combined && epoch == ~uint64_t{0}) send",
        "peers wait for a round that is lost", "stopped",
    ),
    Mutant(
        "abort-names-the-sender", RANK,
        "abort_word(epoch, static_cast<uint64_t>(culprit))", "abort_word(epoch, static_cast<uint64_t>(self.rank))",
        "the bearer of the news is blamed", "stopped",
    ),
    Mutant(
        "abort-taken-for-a-count", RANK,
        "if (is_expected && !is_abort && value <= limit) return value;",
        "if (is_expected && value <= limit) return value;",
        "a lost round goes on", "stopped",
    ),
    Mutant(
        "culprit-not-followed", RANK,
        "    if (word == 0) return culprit;", "    if (word != ~uint64_t{0}) return culprit;",
        "who waits for the stopped rank is blamed", "stopped",
    ),
    Mutant(
        "culprit-not-masked", RANK,
        "    store(in_heap<uint32_t>(self, self.rank, self.layout.masks) + culprit, 1u);\n", "",
        "a rank that stopped is waited for in every round", "stopped",
    ),
    Mutant(
        "awaiting-not-said", RANK,
        "    store_release_sys(&control_of(self, self.rank)->awaiting, signal_word(awaited_epoch, whom));\n",
        "    if (whom == ~uint64_t{0}) return false;\n",
        "who waits for the stopped rank is blamed", "stopped",
    ),
    Mutant(
        "lost-forgotten", RANK,
        "  begun.is_lost = shfl(lost, begun.slot) == begun.epoch + 1;",
        "  begun.is_lost = false;",
        "the halves of a lost round wait again", "stopped",
    ),
    Mutant(
        "positions-of-first-words", "cuda/positions.cuh",
        "base += shfl(sum, kWarp - 1);", "base += shfl(sum, 0);",
        "items behind a chunk's first word are not counted", "many-tokens", ("dispatch_send",),
    ),
    Mutant(
        "positions-of-the-first-word", "cuda/positions.cuh",
        "sum += popcount(load(bits + at));", "sum += popcount(load(bits + c * num_words));",
        "words of a column count as its first one", "chunks-send", ("dispatch_send",),
    ),
    Mutant(
        "lost-of-another-slot", RANK,
        "  begun.is_lost = shfl(lost, begun.slot) == begun.epoch + 1;",
        "  begun.is_lost = shfl(lost, 0) == begun.epoch + 1;",
        "a lost round of another slot is not known to be", "stopped",
    ),
    Mutant(
        "received-lost-not-told", RANK,
        "  const bool is_lost = has_failed(self, begun.epoch) && !was_lost;\n",
        "  const bool is_lost = false;\n",
        "nobody acts on a round that the receive half has lost", "stopped",
    ),
    Mutant(
        "mover-next-row-not-asked-for", MOVER,
        "      if (item.part.whole >= 0 && item.part.whole != row) rows.ask(item.found, item.part.part == 0);\n", "",
        "a warp's second row goes where its first one went", "plain", ("dispatch_recv",),
    ),
    Mutant(
        "scale-of-half-a-group", "cuda/payload.cuh",
        "mask < kGroupUnits", "mask * 2 < kGroupUnits",
        "channels of a group have different scales", "fp8",
    ),
]  # fmt: skip
