"""Mistakes planted in the kernels that send and receive."""

from __future__ import annotations

from .mutant import Mutant

DISPATCH = "cuda/dispatch.cu"
COMBINE = "cuda/combine.cu"
RANK = "cuda/rank.cuh"
TURNS = "cuda/turns.cuh"
BOTH = ("dispatch", "combine")

MUTANTS = [
    Mutant(
        "turns-one-too-many", TURNS,
        "taken < num ? taken : -1", "taken <= num ? taken : -1",
        "a part is done that there is not", "joined", ("combine",),
    ),
    Mutant(
        "turns-last-left-out", TURNS,
        "taken < num ? taken : -1", "taken + 1 < num ? taken : -1",
        "the last part is nobody's", "joined", ("combine",),
    ),
    Mutant(
        "turns-not-set-back", TURNS,
        "void end() const { store(num_taken(), 0u); }", "void end() const {}",
        "the next round finds no part left", "joined", ("dispatch",),
    ),
    Mutant(
        "turns-not-set-back-combine", TURNS,
        "void end() const { store(num_taken(), 0u); }", "void end() const {}",
        "the next round finds no part left", "joined", ("combine",),
    ),
    Mutant(
        "turns-no-barrier-before-the-first", TURNS,
        "    if (thread_index() == 0) ask();\n    sync_block();\n", "    if (thread_index() == 0) ask();\n",
        "a block begins with what its memory holds", "joined", ("combine",),
    ),
    Mutant(
        "turns-only-the-first", TURNS,
        "return num == 1 ? -1 : load(turn);", "return -1;",
        "parts that no block came for are not sent", "joined", ("combine",),
    ),
    Mutant(
        "joined-lists-not-cleared", DISPATCH,
        "    prepare_part(sending);\n  }", "  }",
        "a block's second part lists its tokens twice", "joined",
    ),
    Mutant(
        "joined-no-barrier-after-preparing", DISPATCH,
        "s.num_local_experts());\n  sync_block();\n", "s.num_local_experts());\n",
        "a failure is noted before the note is cleared", "joined-stopped",
    ),
    Mutant(
        "joined-round-of-the-kernels-end", DISPATCH,
        "const Begun begun{opening.epoch, self.layout.slot_of(opening.epoch), false, false};",
        "const uint64_t now = load(&control_of(self, self.rank)->epoch);\n"
        "  const Begun begun{now + 1, self.layout.slot_of(now + 1), false, false};",
        "the round after the one that was sent is received", "joined",
    ),
    Mutant(
        "joined-epoch-not-advanced", DISPATCH,
        "  close_sending(self, opening.epoch);\n", "  clear_awaiting(self);\n",
        "the next round has the same number", "joined",
    ),
    Mutant(
        "joined-epoch-early", DISPATCH,
        "  receive(l.recv, begun, receiving);\n",
        "  if (is_bookkeeper()) close_sending(self, opening.epoch);\n  receive(l.recv, begun, receiving);\n",
        "blocks that begin late send another round", "joined", timeout_s=15,
    ),
    Mutant(
        "joined-closed-by-all", DISPATCH,
        "  if (load(&receiving.ending->met) == 0 || !is_bookkeeper()) return;\n", "  if (!is_bookkeeper()) return;\n",
        "parts are dealt out anew before all blocks have asked", "joined",
    ),
    Mutant(
        "joined-combine-starts-over", COMBINE,
        "    reply_part<kMoves, kDtype>(l.send, begun, place, turns, &sequence, shared);",
        "    sequence = 0;\n    reply_part<kMoves, kDtype>(l.send, begun, place, turns, &sequence, shared);",
        "a stage of a block's second part is taken for filled", "joined-rows",
    ),
    Mutant(
        "joined-combine-ended-by-all", COMBINE,
        "  if (load(&own->receiving.met) != 0 && is_bookkeeper()) turns.end();", "  if (is_bookkeeper()) turns.end();",
        "parts are dealt out anew before all blocks have asked", "joined",
    ),
    Mutant(
        "turns-asked-for-twice", TURNS,
        "  MOEBIUS_DEVICE int next() const { return num == 1 ? -1 : load(turn); }",
        "  MOEBIUS_DEVICE int next() const { return first(); }",
        "a block leaves a part out that it has asked for", "joined", ("combine",),
    ),
    Mutant(
        "joined-deadline-while-unsent", RANK,
        "    if (!signal_arrived(load_acquire_sys(own), awaited_epoch)) {", "    if (false) {",
        "ranks are blamed that have yet to be told", "joined-stopped", BOTH, 400,
    ),
    Mutant(
        "joined-own-signal-not-looked-at", "cuda/combine_recv.cuh",
        "  if (owed == 0 && src != self.rank) return true;", "  if (owed == 0) return true;",
        "what was sent before a round was lost is summed", "joined-late", ("combine",), 400,
    ),
]  # fmt: skip
