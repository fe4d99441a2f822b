"""The pool of rank processes: results, and every way of failing."""

import os
import time
from typing import Any

import pytest
import torch.distributed as dist

from moebius.bench.ranks import RankContext, RankFailedError, RankPool


def add(context: RankContext, *, shard: int, to: int) -> int:
    for _ in range(3):
        context.start_line.wait()
    context.progress(("rank", context.rank))
    total = [0] * context.num_ranks
    dist.all_gather_object(total, shard, group=context.group)
    return sum(total) + to


def fail(context: RankContext) -> None:
    if context.rank == 1:
        raise ValueError("the second rank fails")
    time.sleep(60)


def die(context: RankContext) -> None:
    if context.rank == 1:
        os._exit(7)
    time.sleep(60)


def stall(context: RankContext) -> None:
    time.sleep(60 if context.rank == 0 else 0)


def test_jobs_share_the_processes() -> None:
    seen: list[Any] = []
    with RankPool(2, 64) as pool:
        assert pool.run(add, timeout_s=30.0, shards=[1, 2], to=10, on_progress=seen.append) == [13, 13]
        assert pool.run(add, timeout_s=30.0, shards=[3, 4], to=0) == [7, 7]
    assert sorted(seen) == [("rank", 0), ("rank", 1)]


@pytest.mark.parametrize(
    ("job", "timeout_s", "message"),
    [
        (fail, 30.0, r"rank 1 failed:\n(.|\n)*ValueError: the second rank fails"),
        (die, 30.0, "rank 1 died with exit code 7"),
        (stall, 1.0, "rank 0 gave no answer in time"),
    ],
)
def test_a_failure_ends_all_ranks_at_once(job: Any, timeout_s: float, message: str) -> None:
    with RankPool(2, 64) as pool:
        processes = list(pool._processes)
        begin = time.monotonic()
        with pytest.raises(RankFailedError, match=message):
            pool.run(job, timeout_s=timeout_s)
        assert time.monotonic() - begin < 20.0
        assert not any(process.is_alive() for process in processes)
