"""The scheduler on a fake clock: nobody is lost, everybody has the steps that were asked for, in order."""

from hypothesis import given
from hypothesis import strategies as st

from moebius.bench.load_arrivals import Request
from moebius.bench.load_schedule import Scheduler

STEP_NS = 10_000_000


def serve(requests: list[Request], ranks: int, slots: int) -> tuple[Scheduler, list[list[int]], list[int]]:
    """Run to the end; the sizes and the time of every step."""
    schedule = Scheduler(requests, ranks, slots)
    sizes, ticks, now_ns = [], [], 0
    while not schedule.is_done:
        if schedule.is_idle:
            assert schedule.next_arrival_ns is not None
            now_ns = max(now_ns, schedule.next_arrival_ns)
        schedule.admit(now_ns)
        assert any(schedule.sizes)
        sizes.append(list(schedule.sizes))
        ticks.append(now_ns)
        schedule.end_step()
        now_ns += STEP_NS
    return schedule, sizes, ticks


REQUESTS = st.lists(st.tuples(st.floats(0.0, 0.5), st.integers(1, 9)), max_size=40)


@given(REQUESTS, st.integers(1, 4), st.integers(1, 3))
def test_no_request_is_lost_and_each_gets_its_steps(drawn: list[tuple[float, int]], ranks: int, slots: int) -> None:
    requests = [Request(t, 0, output) for t, output in sorted(drawn)]
    schedule, sizes, ticks = serve(requests, ranks, slots)
    expected = [[0] * ranks for _ in sizes]
    for number, request in enumerate(requests):
        first, last = schedule.first_step[number], schedule.last_step[number]
        assert last - first + 1 == request.output
        assert ticks[first] >= round(request.t * 1e9)
        for step in range(first, last + 1):
            expected[step][number % ranks] += 1
    assert sizes == expected
    assert all(size <= slots for step in sizes for size in step)
    for rank in range(ranks):  # first come, first served
        begun = schedule.first_step[rank::ranks]
        assert begun == sorted(begun)


def test_a_request_waits_for_a_slot_and_not_longer() -> None:
    schedule, sizes, _ = serve([Request(0.0, 0, 3), Request(0.0, 0, 2), Request(0.0, 0, 1)], 1, 2)
    assert schedule.first_step == [0, 0, 2]
    assert schedule.last_step == [2, 1, 2]
    assert sizes == [[2], [2], [2]]


def test_a_rank_without_requests_takes_part_with_none() -> None:
    _, sizes, ticks = serve([Request(0.0, 0, 2), Request(0.005, 0, 1), Request(1.0, 0, 1)], 3, 4)
    assert sizes == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert ticks == [0, STEP_NS, 1_000_000_000]
