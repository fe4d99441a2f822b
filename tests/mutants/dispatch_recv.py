"""Mistakes planted in the receive half of dispatch."""

from __future__ import annotations

from .mutant import Mutant

RECV = "cuda/dispatch_recv.cuh"
EXPERTS = "cuda/experts.cuh"
CELLS = "cuda/cells.cuh"
SCALES = "cuda/scales.cuh"
WORK = "cuda/work.cuh"
RANK = "cuda/rank.cuh"
MEET = "  if (is_bookkeeper()) arrive_received(p.self, begun, Half::kDispatchRecv, shared.ending);\n"
# That of expert_major, by what follows.
ARRIVE_EXPERT_MAJOR = MEET + "  if (block_index() == 0) note_ranges"
ARRIVE_EARLY = (
    "  if (is_bookkeeper() && !self.is_token_major) {\n"
    "    arrive_received(self, begun, Half::kDispatchRecv, shared.ending);\n  }\n"
)
NO_ARRIVAL = "  if (block_index() == 0) note_ranges"

MUTANTS = [
    Mutant(
        "dr-no-proxy-fence",
        RECV,
        "  // The bulk loads below read what peers wrote.\n  fence_proxy_async();\n",
        "",
        "bulk loads read what the inbox held before",
        "plain",
    ),
    Mutant(
        "dr-fence-of-shared-memory",
        RECV,
        "  fence_proxy_async();\n",
        "  fence_proxy_async_shared();\n",
        "bulk loads read what the inbox held before",
        "plain",
    ),
    Mutant(
        "dr-started-before-the-fence",
        RECV,
        "  fence_proxy_async();\n  sync_block();\n}",
        "  sync_block();\n}",
        "the first rows are asked for before what peers wrote is known to bulk loads",
        "plain",
        also=(
            (
                "  const int step = Share::of(Place::of_block()).num_warps * kWarp;\n",
                "  fence_proxy_async();\n  const int step = Share::of(Place::of_block()).num_warps * kWarp;\n",
            ),
        ),
    ),
    Mutant(
        "dr-token-started-before-the-fence",
        RECV,
        "  fence_proxy_async();\n  sync_block();\n}",
        "  sync_block();\n}",
        "the first rows are asked for before what peers wrote is known to bulk loads",
        "token-major",
        also=(("  mover.start(num_cells);\n", "  mover.start(num_cells);\n  fence_proxy_async();\n"),),
    ),
    Mutant(
        "dr-no-barrier-after-poll",
        RECV,
        "  fence_proxy_async();\n  sync_block();\n}",
        "  fence_proxy_async();\n}",
        "cells are read by threads that know of no signal",
        "plain",
    ),
    Mutant(
        "dr-no-bulk-wait",
        RECV,
        "  bulk_wait_all();\n  if (!is_ready)",
        "  if (!is_ready)",
        "rows are read before they are written",
        "plain",
    ),
    Mutant(
        "dr-expert-twice",
        RECV,
        "      if (k < lane() && other == id) is_first = false;",
        "      if (k < lane() && other == id) is_first = is_first;",
        "a token that names an expert twice counts twice",
        "token-major",
    ),
    Mutant(
        "dr-counts-not-reset",
        RECV,
        "      store(self.expert_counts + expert, 0);\n",
        "",
        "counts add up from round to round",
        "token-major",
    ),
    Mutant(
        "dr-unused-rows",
        RECV,
        "      store(p.topk_ids + src * per_src + i, -1);",
        "      store(p.topk_ids + src * per_src + i, 0);",
        "rows without a token read as routed",
        "token-major",
    ),
    Mutant(
        "dr-mask-ignored",
        RECV,
        "    if (!begun.is_lost && !is_dead) {",
        "    if (!begun.is_lost) {",
        "a rank that was given up is waited for again",
        "stopped",
    ),
    Mutant(
        "dr-no-wait-for-previous",
        "cuda/dispatch_recv.cu",
        "  wait_for_previous_kernel();\n",
        "",
        "the handle is read before dispatch send has written it",
        "plain",
    ),
    Mutant(
        "dr-arrives-before-it-waits",
        RECV,
        "  await_cells(p, begun, shared);\n",
        ARRIVE_EARLY + "  await_cells(p, begun, shared);\n",
        "the last block does not know what the others failed for",
        "stopped",
        also=((ARRIVE_EXPERT_MAJOR, NO_ARRIVAL),),
    ),
    Mutant(
        "dr-arrives-before-the-barrier",
        RECV,
        "  // The bulk loads below read what peers wrote.\n",
        ARRIVE_EARLY,
        "the last block does not know what the others failed for",
        "stopped",
        also=(
            (ARRIVE_EXPERT_MAJOR, NO_ARRIVAL),
            (
                "  sync_block();\n  if (warp_index() == 0) {\n    const bool is_lost",
                "  if (warp_index() == 0) {\n    const bool is_lost",
            ),
        ),
    ),
    Mutant(
        "dr-arrives-before-the-choices",
        RECV,
        "  const int step = Share::of(Place::of_block()).num_warps * kWarp;\n",
        MEET + "  const int step = Share::of(Place::of_block()).num_warps * kWarp;\n",
        "the last block does not know which cell another could not read",
        "bad-cell",
        also=((ARRIVE_EXPERT_MAJOR, NO_ARRIVAL),),
        num_seeds=150,
    ),
    Mutant(
        "dr-cell-of-the-source-before",
        WORK,
        "load(first + lane()) <= number;",
        "load(first + lane()) < number;",
        "the first cell of a source is looked for at the one before",
        "plain",
        ("dispatch_recv",),
    ),
    Mutant(
        "dr-choice-of-the-source-before",
        WORK,
        "    if (load(first + middle) <= number) {",
        "    if (load(first + middle) < number) {",
        "what is noted of the first cell of a source is noted of the one before",
        "plain",
        ("dispatch_recv",),
    ),
    Mutant(
        "dr-scales-of-later-windows",
        EXPERTS,
        "    if (is_first && p.scales != nullptr) scales.read(p, cell.at);",
        "    if (!is_first && p.scales != nullptr) scales.read(p, cell.at);",
        "a row's scales are not written",
        "fp8",
    ),
    Mutant(
        "dr-sources-not-noted",
        RECV,
        "    note_sources(p, begun, false, shared);\n",
        "",
        "nobody is answered",
        "plain",
    ),
    Mutant(
        "dr-lost-not-counted-out",
        RECV,
        "  if (!is_lost && !self.is_token_major && p.expert_stats == nullptr) return;\n",
        "  if (!self.is_token_major && p.expert_stats == nullptr) return;\n",
        "a lost round shows tokens",
        "bad-cell",
    ),
    Mutant(
        "dr-awaiting-kept",
        RANK,
        "(is_lost ? kAnyFailed : 0));\n  clear_awaiting(self);\n",
        "(is_lost ? kAnyFailed : 0));\n",
        "a rank says that it waits when it does not",
        "dispatch-only",
        ("dispatch_recv",),
    ),
    Mutant(
        "dr-token-bad-id-left-out",
        RECV,
        "      fail_cell(p.self, begun.epoch, cell.src);\n      id = -1;",
        "      id = -1;",
        "a cell that names no expert is received as if it were good",
        "bad-cell-token",
    ),
    Mutant(
        "dr-token-reply-row-not-looked-at",
        RECV,
        "    if (lane() == 0 && !s.is_reply_row(load(&head->reply_row))) {",
        "    if (lane() == 0 && load(&head->reply_row) > 1 << 30) {",
        "a reply would go anywhere",
        "bad-cell-token",
    ),
    Mutant(
        "dr-token-arrives-before-the-barrier",
        RECV,
        "  sync_block();\n" + MEET + "  mover.run();",
        MEET + "  mover.run();",
        "the last block reads counts to which others have not added",
        "token-major",
        num_seeds=1500,
    ),
    Mutant(
        "dr-no-barrier-before-met",
        RECV,
        "  sync_block();\n  if (load(&shared.ending->met) != 0)",
        "  if (load(&shared.ending->met) != 0)",
        "threads of the last block do not know that it is",
        "plain",
    ),
    Mutant(
        "dr-scales-of-the-first-words",
        SCALES,
        "put(i * kWarp + lane(), words[i]);",
        "put(i * kWarp + lane(), words[0]);",
        "long rows of scales repeat their beginning",
        "wide",
    ),
    Mutant(
        "dr-scales-cut-off",
        SCALES,
        "    for (int w = kAhead * kWarp + lane(); w < num_words(p); w += kWarp) put(w, load(from + w));\n",
        "",
        "the end of long rows of scales is not written",
        "wide",
    ),
]
