"""Mistakes planted in the two halves of combine."""

from __future__ import annotations

from .mutant import Mutant

REPLIES = "cuda/replies.cuh"
SEND = "cuda/combine_send.cu"
RECV = "cuda/combine_recv.cu"

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
        "cs-no-wait-for-previous", SEND,
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
        "sum.weight = load(weights + lane());", "sum.weight = load(weights + num_topk - 1 - lane());",
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
        "    if (!await_rows(p, begun, src, owed)) store(scratch, 1u);\n", "",
        "rows are summed before they have come", "plain",
    ),
    Mutant(
        "cr-no-barrier-after-poll", RECV,
        "  sync_block();\n  const bool is_lost = begun", "  const bool is_lost = begun",
        "rows are summed by threads that know of no signal", "plain",
    ),
    Mutant(
        "cr-no-wait-for-previous", RECV,
        "  wait_for_previous_kernel();\n", "",
        "the handle and the rows to come are read too early", "plain",
    ),
    Mutant(
        "cr-all-valid", RECV,
        "item < num_items && token < num_valid && lane() < replies",
        "item < num_items && !is_lost && lane() < replies",
        "tokens that were not sent get rows of an earlier round", "plain",
    ),
    Mutant(
        "cr-awaiting-kept", RECV,
        "  clear_awaiting(self);\n", "",
        "a rank says that it waits when it does not", "stopped",
    ),
]  # fmt: skip
