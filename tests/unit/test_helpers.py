"""The helpers themselves: they must fail where they should, and end what they began."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.helpers.compare import assert_same
from tests.helpers.launch import RankError, RankPool, in_threads
from tests.helpers.payload import label_of, labelled, labelled_bytes
from tests.helpers.routing import ROUTINGS, Shape
from tests.helpers.schedules import HALVES, drifting, legal_orders
from tests.helpers.shared_memory import SHM, left_since, orphans
from tests.helpers.skew import Skew

if TYPE_CHECKING:
    from collections.abc import Callable


def test_compare_names_the_first_difference() -> None:
    want = labelled(3, 4, 16, torch.bfloat16, torch.Generator().manual_seed(0))
    got = want.clone()
    got[2] = want[1]
    with pytest.raises(
        AssertionError, match=r"x\[2, 2\]: expected 2\.0 \(got 1\.0\).*of rank 3, token 2 \(got .*token 1"
    ):
        assert_same(got, want, "x", label=label_of)
    assert_same(want.clone(), want, "x")


def test_compare_tells_zeros_and_nans_apart() -> None:
    zeros = torch.zeros(2)
    with pytest.raises(AssertionError, match=r"x\[0\]"):
        assert_same(-zeros, zeros, "x")
    nan, other = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert_same(nan, nan, "x")
    assert_same(nan, other, "x", any_nan=True)
    with pytest.raises(AssertionError):
        assert_same(nan, other, "x")
    with pytest.raises(AssertionError, match="NaN: expected 0"):
        assert_same(nan, zeros[0], "x", any_nan=True)
    with pytest.raises(AssertionError, match="dtype"):
        assert_same(zeros, zeros.double(), "x")
    with pytest.raises(AssertionError, match="shape"):
        assert_same(zeros, zeros[:1], "x")


def test_labels_name_their_token() -> None:
    numbers = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert label_of(labelled(7, 300, 16, dtype, numbers)[291]) == "rank 7, token 291"
    assert label_of(labelled_bytes(7, 300, 16, numbers)[291]) == "rank 7, token 291"
    assert label_of(torch.zeros(16)) == "no label"


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_routings_are_what_their_names_say(name: str, num_ranks: int) -> None:
    shape = Shape(num_ranks, 4 * num_ranks, ROUTINGS[name].num_topk or 3, 12)
    routed = ROUTINGS[name].make(shape, torch.Generator().manual_seed(1))
    again = ROUTINGS[name].make(shape, torch.Generator().manual_seed(1))
    assert len(routed) == num_ranks
    for ids, same in zip(routed, again, strict=True):
        assert torch.equal(ids, same)
        assert ids.dim() == 2
        assert ids.shape[0] <= shape.max_num_tokens
        assert ids.shape[1] == shape.num_topk
        assert ((ids >= -1) & (ids < shape.num_experts)).all()
        distinct = all(len(set(row)) == len(row) for row in ids.tolist() if -1 not in row)
        assert distinct or name in ("duplicates", "any")
    hits = torch.zeros(num_ranks, num_ranks, dtype=torch.bool)  # [from, to]
    for rank, ids in enumerate(routed):
        hits[rank, ids[ids >= 0] // shape.num_local] = True
    sizes = [ids.shape[0] for ids in routed]
    claims: dict[str, Callable[[], Any]] = {
        "hot": lambda: all((ids == shape.num_experts // 2).sum(dim=1).eq(1).all() for ids in routed),
        "one-rank": lambda: not hits[:, :-1].any() and hits[:, -1].all(),
        "local": lambda: torch.equal(hits, torch.eye(num_ranks, dtype=torch.bool)),
        "empty-rank": lambda: not hits[:, 0].any() and bool(hits[:, 1:].all()),
        "idle-rank": lambda: sizes[-1] == 0 and all(sizes[:-1]),
        "idle-all": lambda: not any(sizes),
        "holes": lambda: any((ids == -1).any() for ids in routed),
        "unrouted": lambda: not hits.any(),
        "duplicates": lambda: any(len(set(row)) < len(row) for ids in routed for row in ids.tolist()),
        "k1": lambda: shape.num_topk == 1,
        "full": lambda: sizes == [shape.max_num_tokens] * num_ranks,
        "ragged": lambda: num_ranks == 1 or len(set(sizes)) > 1,
        "any": lambda: num_ranks == 1 or len(set(sizes)) > 1,
    }
    assert claims.get(name, lambda: all(sizes))()


def test_orders_are_the_legal_ones() -> None:
    orders = list(legal_orders((True, True), 2))
    assert len(orders) == len(set(orders)) == 35  # 8! / (4! 4!) / 2: the first dispatch goes first
    assert len(list(legal_orders((True,) * 3, 2))) == 295
    for order in legal_orders((True, False, True), 2):
        assert [half for half, number in order if number == 1] == list(HALVES[:2])
        assert order.index(("combine_receive", 0)) < order.index(("dispatch_send", 2))


def test_drifting_keeps_the_order_of_each_rank() -> None:
    numbers = Skew(0)
    assert numbers.delays(0) is not None
    import random

    for order in list(legal_orders((True,) * 3, 2))[::20]:
        sequence = drifting(order, 3, 2, random.Random(5))
        for rank in range(3):
            assert tuple(half for who, half in sequence if who == rank) == order


def test_skew_is_seeded() -> None:
    def first(seed: int, rank: int) -> list[float]:
        delays = Skew(seed).delays(rank)
        return [next(delays) for _ in range(50)]

    assert first(1, 0) == first(1, 0)
    assert first(1, 0) != first(1, 1)
    assert first(1, 0) != first(2, 0)
    assert 0 <= min(first(1, 0)) < max(first(1, 0)) <= Skew(1).longest_s


def test_threads_raise_the_first_error() -> None:
    assert in_threads(3, lambda rank: rank * 2) == [0, 2, 4]
    released = threading.Event()

    def fail(rank: int) -> None:
        if rank == 1:
            raise KeyError("first")
        released.wait(30.0)

    with pytest.raises(KeyError, match="first"):
        in_threads(3, fail, timeout_s=20.0)
    with pytest.raises(RankError, match=r"ranks \[0, 2\]"):
        in_threads(3, lambda rank: released.wait(30.0) if rank != 1 else None, timeout_s=0.2)
    released.set()


def where(group: Any, value: int) -> tuple[int, int, int]:
    import torch.distributed as dist

    return dist.get_rank(group), dist.get_world_size(group), value


def fail_on_one(group: Any, failing: bool) -> None:
    if failing:
        raise KeyError("told to")
    time.sleep(60.0)


def die_on_one(group: Any, dying: bool) -> int:
    if dying:
        os.kill(os.getpid(), signal.SIGKILL)
    return 5


def test_pool_runs_on_groups_and_survives_jobs() -> None:
    with RankPool(3, groups=[(0, 2)]) as pool:
        assert pool.run(where, [(7,), (8,), (9,)]) == [(0, 3, 7), (1, 3, 8), (2, 3, 9)]
        assert pool.run(where, [(7,), (9,)], members=(0, 2)) == [(0, 2, 7), (1, 2, 9)]
        assert pool.run(die_on_one, [(False,), (True,), (False,)], absent=(1,)) == [5, None, 5]
        processes = pool.processes
    assert not any(process.is_alive() for process in processes)


def test_pool_raises_the_traceback_and_leaves_nobody() -> None:
    pool = RankPool(2)
    with pytest.raises(RankError, match=r"\[rank 1\] (?s:.*)fail_on_one(?s:.*)told to"):
        pool.run(fail_on_one, [(False,), (True,)])
    assert pool.closed
    assert not any(process.is_alive() for process in pool.processes)


def test_pool_notices_death_and_delay() -> None:
    pool = RankPool(2)
    with pytest.raises(RankError, match=r"\[rank 0\] died, exit code -9"):
        pool.run(die_on_one, [(True,), (False,)])
    pool = RankPool(2)
    with pytest.raises(RankError, match=r"ranks \[0, 1\] had not answered in time"):
        pool.run(fail_on_one, [(False,), (False,)], timeout_s=0.3)
    assert not any(process.is_alive() for process in pool.processes)


def test_orphans_are_segments_that_nobody_uses() -> None:
    before = orphans()
    path = SHM / f"moebius-test-{os.getpid()}"
    with path.open("wb") as file:
        file.write(b"0" * 4096)
        file.flush()
        assert path.name not in orphans()
    try:
        assert left_since(before) == {path.name}
    finally:
        path.unlink()
    assert not left_since(before)
