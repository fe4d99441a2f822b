"""Bugs to plant in the network path: each must be caught. The texts live here; nothing in csrc/ knows them."""

from __future__ import annotations

import dataclasses

SEMANTICS = ""  # the program that holds the emulated network to its promises
BAD, EACH, CHUNKS, NARROW = "2 x 2, reduced", "4 x 1, each row", "4 x 1, token_major, chunks", "2 + 1, narrow"
HOT, HOT_EACH, PAIRED = "4 x 1, hot, reduced", "4 x 1, hot, each row", "4 x 1, two in flight"
STOPS, STALLS = "3 x 1, a rank stops", "2 x 2, a rank stalls"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        name: what it breaks.
        file: in csrc/cpu.
        text: occurs once in it.
        replacement: what stands there instead.
        case: of tests/sanitize/core_test.cpp, or `SEMANTICS`.
    """

    name: str
    file: str
    text: str
    replacement: str
    case: str


MUTANTS = (
    # The emulated network: a wrong one would find no bugs, or wrong ones.
    Mutant(
        "signal-before-data",
        "emulated_network.cpp",
        "pair_of.settled_ns = settled_ns + some(conditions_.max_delay_ns);",
        "pair_of.settled_ns = arrival_ns;",
        SEMANTICS,
    ),
    Mutant("signal-before-data-seen-by-an-engine", "emulated_network.cpp", "settled_ns + some(", "some(", BAD),
    Mutant(
        "puts-of-a-pair-overtake",
        "emulated_network.cpp",
        "std::max(arrival_ns + conditions_.latency_ns, pair_of.settled_ns)",
        "arrival_ns + conditions_.latency_ns",
        SEMANTICS,
    ),
    Mutant(
        "quiet-does-not-wait",
        "emulated_network.cpp",
        "const int waiting = network_.first_waiting(rank_);",
        "const int waiting = -1;",
        SEMANTICS,
    ),
    Mutant(
        "pieces-all-at-the-start", "emulated_network.cpp", "t.offset + event.begin", "t.offset + 0 * event.begin", BAD
    ),
    Mutant(
        "stalled-messages-vanish",
        "emulated_network.cpp",
        "is_cut && pair_of.is_stalled && !is_dropped",
        "is_cut && pair_of.is_stalled && is_dropped",
        SEMANTICS,
    ),
    Mutant("given-up-still-counts-for-quiet", "emulated_network.cpp", "&& !one.is_given_up", "&& true", SEMANTICS),
    Mutant("cut-is-one-way", "emulated_network.cpp", "{&pair(a, b), &pair(b, a)}", "{&pair(a, b)}", SEMANTICS),
    Mutant(
        "links-take-no-time",
        "emulated_network.cpp",
        "std::max(free_ns, pair_of.left_ns) + wire_ns(transfer.num_bytes)",
        "std::max(free_ns, pair_of.left_ns)",
        SEMANTICS,
    ),
    # The receiver.
    Mutant(
        "header-is-trusted",
        "network.cpp",
        "if (!is_allowed(layout, src, message)) return false;",
        "",
        SEMANTICS,
    ),
    Mutant("any-signal-is-its-own", "network.cpp", "!is_own_signal(layout, src, message.signal)", "false", SEMANTICS),
    Mutant("bounds-overflow", "network.cpp", "num_bytes <= end - offset", "offset + num_bytes <= end + 1", SEMANTICS),
    Mutant(
        "given-up-still-writes",
        "network.cpp",
        "__ATOMIC_ACQUIRE) != 0) return true;",
        "__ATOMIC_ACQUIRE) > 1) return true;",
        SEMANTICS,
    ),
    # The outbox.
    Mutant(
        "outbox-reused-before-it-has-left",
        "dispatch.cpp",
        "if (!clear_outbox(epoch)) return lose(epoch);",
        "",
        NARROW,
    ),
    Mutant(
        "replies-reused-before-they-have-left",
        "combine.cpp",
        "if (!clear_outbox(epoch)) return lose(epoch);",
        "outbox_used_ = 0;",
        PAIRED,
    ),
    Mutant(
        "wave-does-not-wait", "remote.cpp", "  return clear_outbox(epoch);", "  outbox_used_ = 0;\n  return true;", HOT
    ),
    Mutant(
        "wave-of-rows-does-not-wait",
        "remote.cpp",
        "  return clear_outbox(epoch);",
        "  outbox_used_ = 0;\n  return true;",
        HOT_EACH,
    ),
    Mutant(
        "outbox-overflows", "remote.cpp", "outbox_used_ + num_rows <= config_.shape.outbox_rows()", "true", HOT_EACH
    ),
    Mutant("peers-share-the-outbox", "remote.cpp", "outbox_cell(dst, reply_base_[dst])", "outbox_cell(0, 0)", BAD),
    Mutant("replies-share-the-outbox", "combine.cpp", "outbox_used_ += num_tokens;", "", BAD),
    Mutant("rows-share-the-outbox", "combine.cpp", "outbox_reply(outbox_used_++)", "outbox_reply(outbox_used_)", EACH),
    # Where messages go.
    Mutant(
        "wrong-reply-range",
        "combine.cpp",
        "layout_.reply(slot, head_of(slot, src, 0).reply_row),\n                         rows",
        "layout_.reply(slot, 0),\n                         rows",
        BAD,
    ),
    Mutant(
        "replies-into-another-slot",
        "combine.cpp",
        "network_->put(src, layout_.reply(slot, row)",
        "network_->put(src, layout_.reply((slot + 1) % 2, row)",
        EACH,
    ),
    Mutant(
        "cells-into-another-slot",
        "remote.cpp",
        "network_->put_signal(dst,\n                       layout_.cell(slot, rank_, num_put)",
        "network_->put_signal(dst,\n                       layout_.cell((slot + 1) % 2, rank_, num_put)",
        BAD,
    ),
    Mutant(
        "dispatch-word-of-another-slot",
        "remote.cpp",
        "layout_.signal(slot, rank_, SignalKind::kDispatch)",
        "layout_.signal((slot + 1) % 2, rank_, SignalKind::kDispatch)",
        BAD,
    ),
    Mutant(
        "combine-word-of-another-slot",
        "combine.cpp",
        "layout_.signal(slot, rank_, SignalKind::kCombine);\n  const uint64_t word",
        "layout_.signal((slot + 1) % 2, rank_, SignalKind::kCombine);\n  const uint64_t word",
        NARROW,
    ),
    Mutant(
        "empty-combine-of-another-slot",
        "remote.cpp",
        "layout_.signal(slot, rank_, kind), word);\n  } else",
        "layout_.signal((slot + 1) % 2, rank_, kind), word);\n  } else",
        BAD,
    ),
    Mutant(
        "word-before-the-rows",
        "combine.cpp",
        "const bool is_sent = place_each(",
        "network_->put_signal(src, 0, nullptr, 0, signal_at, word);\n  const bool is_sent = place_each(",
        EACH,
    ),
    Mutant(
        "last-cell-left-out",
        "remote.cpp",
        "(num_tokens - num_put) * cell_bytes",
        "(num_tokens - num_put - (num_tokens > num_put)) * cell_bytes",
        BAD,
    ),
    Mutant(
        "chunk-left-out", "remote.cpp", "    num_put = i + 1;", "    num_put = std::min(i + 2, num_tokens);", CHUNKS
    ),
    Mutant(
        "chunks-all-at-the-start",
        "remote.cpp",
        "layout_.cell(slot, rank_, num_put),\n                  cells",
        "layout_.cell(slot, rank_, 0),\n                  cells",
        CHUNKS,
    ),
    Mutant(
        "no-word-where-nothing-is-sent",
        "combine.cpp",
        "if (is_sent) network_->put_signal(",
        "if (is_sent && num_tokens > 0) network_->put_signal(",
        HOT_EACH,
    ),
    # When a rank is lost.
    Mutant(
        "abort-not-sent",
        "engine.cpp",
        "if (!is_dead(dst)) send_signal(",
        "if (!is_dead(dst) && !is_remote(dst)) send_signal(",
        STOPS,
    ),
    Mutant("stalled-rank-holds-the-outbox", "remote.cpp", "  network_->give_up(rank, is_given_up);\n", "", STALLS),
    Mutant("refusal-says-the-opposite", "remote.cpp", "is_given_up ? 1 : 0", "is_given_up ? 0 : 1", STOPS),
)
