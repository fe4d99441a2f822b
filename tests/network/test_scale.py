"""The protocol at the sizes it is made for, in one process: EP64 and EP256, eight ranks to a host.

`python -m pytest tests/network/test_scale.py -s` prints what came out.
"""

from __future__ import annotations

import time

import pytest

import moebius
from moebius import AllToAll, VirtualNetwork, native
from moebius.wire import shape_of
from tests.helpers.cases import Case
from tests.helpers.rounds import Halves, check_rank, expect, of_rank
from tests.helpers.schedules import HALVES

RANKS_PER_HOST = 8
ROUNDS = 3  # a slot is used again; of two that differ, for it is the reference that takes the time


@pytest.mark.parametrize("mode", ["expert", "token"])
@pytest.mark.parametrize("num_ranks", [64, 256])
def test_large_groups(num_ranks: int, mode: str) -> None:
    """The reference's bits, the planned memory, and one request for each remote rank and half."""
    case = Case(
        num_ranks=num_ranks,
        num_experts=num_ranks,
        num_topk=8,
        hidden=16,
        max_num_tokens=2,
        payload="fp32",
        mode=mode,
        timeout_s=60.0,
    )
    start = time.monotonic()
    expected = [expect(case, number) for number in range(ROUNDS - 1)]
    expected.append(expected[-1])
    expected_s = time.monotonic() - start
    network = VirtualNetwork(RANKS_PER_HOST, seed=num_ranks, max_delay_us=200.0, max_piece_bytes=200)
    planned = native.core().HeapLayout(shape_of(case.config(), num_ranks, has_outbox=True))
    start = time.monotonic()
    ranks = [AllToAll(group, case.config()) for group in moebius.virtual_ranks(num_ranks, network)]
    made_s = time.monotonic() - start
    halves = [Halves(a2a, of_rank(expected, rank)) for rank, a2a in enumerate(ranks)]
    start = time.monotonic()
    for number in range(ROUNDS):
        for half in HALVES:
            for one in halves:
                getattr(one, half)(number)
    ran_s = time.monotonic() - start
    num_remote = num_ranks - RANKS_PER_HOST
    for rank, got in enumerate(halves):
        check_rank(case.config(), rank, got, expected)
        assert ranks[rank].heap_bytes == planned.total
        asked = network.requests(rank)
        assert (asked.put_signals, asked.puts) == (2 * ROUNDS * num_remote, 0)
    assert network.num_refused == 0
    num_bytes = sum(network.requests(rank).num_bytes for rank in range(num_ranks))
    print(
        f"\nEP{num_ranks} {mode}: {ROUNDS} rounds right on {num_ranks} ranks; {num_remote} requests a rank and half, "
        f"for {num_remote} remote ranks; heap {planned.total / 1e6:.2f} MB a rank as planned; "
        f"{num_bytes / ROUNDS / num_ranks / 1e3:.1f} kB a rank and round over the network; "
        f"{made_s:.1f} s to make, {ran_s:.1f} s to run, {expected_s:.1f} s for the reference"
    )
    for a2a in ranks:
        a2a.close()
