"""Mistakes planted in the two halves of combine."""

from __future__ import annotations

from .mutant import Mutant

REPLIES = "cuda/replies.cuh"
SEND = "cuda/combine_send.cuh"
RECV = "cuda/combine_recv.cuh"
SUM = "cuda/sum.cuh"
RANK = "cuda/rank.cuh"
WORK = "cuda/work.cuh"
MEET = "  if (is_bookkeeper()) arrive_received(self, begun, Half::kCombineRecv, ending);\n"

MUTANTS = [
    Mutant(
        "cs-relaxed-signal", SEND,
        "    store_release_sys(\n        signal_at(self, load(shared.order + i)",
        "    store_relaxed_sys(\n        signal_at(self, load(shared.order + i)",
        "the signal does not carry the rows", "plain",
    ),
    Mutant(
        "cs-no-bulk-wait", SEND,
        "  *sequence = mover.served;\n  bulk_wait_all();", "  *sequence = mover.served;",
        "the signal overtakes the rows", "token-major",
    ),
    Mutant(
        "cs-no-wait-for-previous", "cuda/combine_send.cu",
        "  wait_for_previous_kernel();\n", "",
        "rows are sent before the experts have written them", "plain",
    ),
    Mutant(
        "cs-combined-not-noted", SEND,
        "  store(&control_of(self, self.rank)->combined[begun.slot], begun.epoch + 1);\n", "",
        "an empty combine overwrites one that was not read yet", "shallow",
    ),
    Mutant(
        "cs-weights-reversed", SEND,
        "load(weights + lane()) : 0.0f;", "load(weights + num_topk - 1 - lane()) : 0.0f;",
        "rows are summed with the weights of other choices", "plain",
    ),
    Mutant(
        "cs-count-too-large", SEND,
        "signal_word(begun.epoch, static_cast<uint64_t>(n))", "signal_word(begun.epoch, static_cast<uint64_t>(n) + 1)",
        "more replies are announced than are owed", "plain",
    ),
    Mutant(
        "cs-no-barrier-before-sending", SEND,
        "  sync_block();\n  const int choices =", "  const int choices =",
        "cells are looked up in lists that are not there yet", "plain",
    ),
    Mutant(
        "cs-silent-where-nothing-is-owed", SEND,
        "    store_release_sys(\n        signal_at(self, load(shared.order + i)",
        "    if (n == 0) continue;\n    store_release_sys(\n        signal_at(self, load(shared.order + i)",
        "a round is never closed", "plain",
    ),
    Mutant(
        "cs-wrong-slot", REPLIES,
        "layout.reply(slot, reply.row + choice)", "layout.reply(slot ^ 1, reply.row + choice)",
        "rows come to the inbox of another round", "plain",
    ),
    Mutant(
        "cr-no-wait", RECV,
        "    if (!await_rows(p, begun, src)) store(&ending->has_failed, 1u);\n", "",
        "rows are summed before they have come", "plain",
    ),
    Mutant(
        "cr-no-barrier-after-poll", RECV,
        "  sync_block();\n  // So few", "  // So few",
        "rows are summed by threads that know of no signal", "plain",
    ),
    Mutant(
        "cr-no-wait-for-previous", "cuda/combine_recv.cu",
        "  wait_for_previous_kernel();\n", "",
        "the handle and the rows to come are read too early", "plain",
    ),
    Mutant(
        "cr-all-valid", RECV,
        "item < num_items && token < num_valid && lane() < replies",
        "item < num_items && num_valid != 0 && lane() < replies",
        "tokens that were not sent get rows of an earlier round", "plain",
    ),
    Mutant(
        "cr-awaiting-kept", RANK,
        "(is_lost ? kAnyFailed : 0));\n  clear_awaiting(self);\n", "(is_lost ? kAnyFailed : 0));\n",
        "a rank says that it waits when it does not", "stopped", ("combine_recv",),
    ),
    Mutant(
        "cr-arrives-before-the-barrier", RECV,
        "  sync_block();\n  // So few",
        MEET + "  sync_block();\n  // So few",
        "the last block does not know what the others failed for", "stopped",
        also=((MEET + "  const bool is_lost",
               "  const bool is_lost"),),
    ),
    Mutant(
        "cr-no-barrier-before-met", RECV,
        "  sync_block();\n  if ((load(&ending->met) &", "  if ((load(&ending->met) &",
        "threads of the last block do not know that it is", "stopped",
    ),
    Mutant(
        "cr-weights-of-the-next", RECV,
        "    sum->weight = weight;\n", "",
        "a token's rows are summed with the weights of the warp's next one", "rows",
        also=(("    find();\n    return true;", "    find();\n    sum->weight = weight;\n    return true;"),),
    ),
    Mutant(
        "cs-failures-dropped", SEND,
        "  if ((met & kAnyFailed) != 0) return lose(self, Half::kCombineSend, begun.epoch);\n", "",
        "a rank that was given up says that it has answered", "late",
    ),
    Mutant(
        "cs-refusal-ignored", SEND,
        "is_masked(self, src) || !is_refused_by(self, src)) continue;", "is_masked(self, src) || src >= 0) continue;",
        "a rank that was given up answers all the same", "late-rows",
    ),
    Mutant(
        "cs-refusal-not-told", SEND,
        "    store(&shared.ending->has_failed, 1u);\n    fail(", "    fail(",
        "a rank that was given up says that it has answered", "late",
    ),
    Mutant(
        "cs-refusals-of-the-first-ranks", SEND,
        "  for (int src = thread_index() - kWarp; src", "  for (int src = thread_index(); src",
        "nobody looks at the refusals of the first ranks", "late",
    ),
    Mutant(
        "cs-same-sum-again", SEND,
        "      item += wave.share.num_warps;\n      find();\n", "      find();\n      item += wave.share.num_warps;\n",
        "a warp sends its first sum twice, and not its last one", "plain",
    ),
    Mutant(
        "cs-slice-of-the-first", SEND,
        "    ahead.begin = part.part * kSumUnroll * kWarp;", "    ahead.begin = 0;",
        "only the beginning of long rows is summed", "windows",
    ),
    Mutant(
        "cs-reply-of-the-source-before", WORK,
        "load(first + lane()) <= number;", "load(first + lane()) < number;",
        "the first cell of a source is answered to the one before", "plain", ("combine_send",),
    ),
    Mutant(
        "cs-reply-of-the-source-before-of-many", WORK,
        "    if (load(first + middle) <= number) {", "    if (load(first + middle) < number) {",
        "with more ranks than lanes, the first cell of a source is answered to the one before", "many-ranks",
        ("combine_send",), num_seeds=10,
    ),
    Mutant(
        "cr-narrow-rows-left-out", SUM,
        "      for (int r = 0; r < kRowsAhead; ++r, left &= left - 1) {",
        "      for (int r = 0; r + 1 < kRowsAhead; ++r, left &= left - 1) {",
        "the last of a batch of rows is summed as zeros", "rows-many", ("combine_recv",),
    ),
    Mutant(
        "cr-narrow-one-batch", SUM,
        "    for (uint32_t rest = sum.which; rest != 0;) {",
        "    for (uint32_t rest = sum.which; rest == sum.which && rest != 0;) {",
        "rows after the first batch are left out", "rows-many", ("combine_recv",),
    ),
    Mutant(
        "cr-narrow-slices-are-wide", RECV,
        "is_narrow ? 1 : kSumUnroll);", "kSumUnroll);",
        "the second half of a slice is not summed", "rows-many", ("combine_recv",),
    ),
    Mutant(
        "sum-next-of-the-same", SUM,
        "fetch_row(after, lowest(after.which) & (kWarp - 1)", "fetch_row(sum, lowest(after.which) & (kWarp - 1)",
        "a sum begins with a row of the one before", "plain", ("combine_recv",),
    ),
    Mutant(
        "sum-next-not-fetched", SUM,
        "      } else if (is_more) {", "      } else if (is_more && after.which == 0) {",
        "a sum begins with the last row of the one before", "plain", ("combine_send",),
    ),
    Mutant(
        "sum-fetched-before-it-is-taken", SUM,
        "      for (int u = 0; u < kSumUnroll; ++u) raw[u] = ahead[u];\n", "",
        "a row is added in place of the one before it", "plain", ("combine_recv",),
        also=(("        float f[kCount];\n        Numbers<kDtype>::widen(raw[u], f);",
               "        float f[kCount];\n        raw[u] = ahead[u];\n        Numbers<kDtype>::widen(raw[u], f);"),),
    ),
    Mutant(
        "sum-of-nothing-fetched", SUM,
        "after.which == 0, ahead);", "false, ahead);",
        "a row is read that there is not", "plain", ("combine_recv",),
    ),
    Mutant(
        "sum-of-the-last-row", SUM,
        "    uint32_t rest = sum.which;", "    uint32_t rest = sum.which & (0u - sum.which);",
        "only the first row is summed", "plain", ("combine_recv",),
    ),
]  # fmt: skip
