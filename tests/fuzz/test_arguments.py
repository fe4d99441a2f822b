"""Ten thousand bad calls: typed errors, no crash, no trace. In a process of its own, so that a crash is a failure."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

import pytest

import moebius
from moebius import AllToAll, Config, ConfigError, MoebiusError
from tests.helpers.bad import (
    BAD_FIELDS,
    GOOD_FIELDS,
    Call,
    bad_values,
    legal_combine,
    legal_dispatch,
    without_memory,
)
from tests.helpers.cases import Case
from tests.helpers.in_turn import InTurn
from tests.helpers.launch import RankPool
from tests.helpers.rounds import Halves, of_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NUM_CALLS = 10_000
CHECK_EVERY = 500
CASES = [
    Case(num_ranks=2, num_experts=4, hidden=16, mode="expert"),
    Case(num_ranks=2, num_experts=4, hidden=16, payload="fp32", mode="expert-late"),
    Case(num_ranks=2, num_experts=4, hidden=16, payload="fp16", mode="token"),
    Case(num_ranks=2, num_experts=4, payload="fp8", mode="expert-late"),
    Case(num_ranks=2, num_experts=4, payload="fp8-as-is", mode="token"),
    Case(num_ranks=2, num_experts=4, hidden=512, payload="fp8-ue8m0"),
    Case(num_ranks=2, num_experts=4, payload="opaque"),
    Case(num_ranks=2, num_experts=4, payload="opaque-bare", mode="token"),
]


@pytest.fixture
def process() -> Iterator[RankPool]:
    with RankPool(1) as pool:
        yield pool


class Target:
    """Two ranks in one thread with results in every state, and the bad calls that can be made to them."""

    def __init__(self, case: Case) -> None:
        # A call that is accepted by mistake waits for the other rank: not for long.
        self.ranks = InTurn(dataclasses.replace(case, timeout_s=2.0))
        self.open_round()

    def open_round(self) -> None:
        """Round 0 is combined, round 1 is received and not combined: a rejected combine must leave it so."""
        self.halves = self.ranks.halves()
        for number in range(2):
            for half in ("dispatch_send", "dispatch_receive", "combine_send", "combine_receive")[: 4 - 2 * number]:
                for one in self.halves:
                    getattr(one, half)(number)

    def close_round(self) -> None:
        """Round 1 goes on to its end, and all of it is right; then a whole new round."""
        for half in ("combine_send", "combine_receive"):
            for one in self.halves:
                getattr(one, half)(1)
        self.ranks.check(self.halves)
        self.ranks.one_round(2)

    def attack(self, numbers: random.Random) -> str:
        """One bad call; says which."""
        case, rank = self.ranks.case, numbers.randrange(self.ranks.case.num_ranks)
        a2a, inputs = self.ranks.ranks[rank], self.ranks.expected[1].inputs[rank]
        if numbers.random() < 0.55:
            half: Callable[..., Any] = numbers.choice((a2a.dispatch, a2a.dispatch_send))
            call = legal_dispatch(a2a, inputs)
        else:
            half = numbers.choice((a2a.combine, a2a.combine_send))
            call = legal_combine(a2a, inputs, self.halves[rank].live[1], self.ranks.expected[1].expert_out[rank])
        arguments, what = dict(call.arguments), []
        for name in numbers.sample(sorted(arguments), numbers.choice((1, 1, 1, 2, 3))):
            words, make = numbers.choice(self.choices(case, call, name, rank))
            arguments[name] = make()
            what.append(f"{name} {words}")
        epochs = self.ranks.epochs()
        described = f"rank {rank}, {case.id}, {half.__name__} with {', '.join(what)}"
        try:
            half(**arguments)
        except MoebiusError:
            pass
        except BaseException as error:
            raise AssertionError(f"{described}: {type(error).__name__}: {error}") from error
        else:
            raise AssertionError(f"{described}: accepted")
        assert self.ranks.epochs() == epochs, f"{described}: the epoch moved from {epochs}"
        return described

    def choices(self, case: Case, call: Call, name: str, rank: int) -> list[Any]:
        """Bad values; for a result also the ones in the wrong state."""
        bad = bad_values(case, call, name) + without_memory(call, name)
        if name == "recv":
            other = 1 - rank
            bad += [
                ("already combined", lambda: self.halves[rank].live[0]),
                ("of another rank", lambda: self.halves[other].live[1]),
                ("still pending", lambda: self.halves[rank]._dispatches[1]),
            ]
        return bad


def fuzz_calls(group: Any, count: int, seed: int) -> int:
    """Bad calls, one case after another in turn; every so often the objects prove that they still work."""
    targets = [Target(case) for case in CASES]
    numbers = random.Random(seed)
    for number in range(count):
        target = targets[number % len(targets)]
        try:
            target.attack(numbers)
            if number // len(targets) % (CHECK_EVERY // len(targets)) == 0:
                target.close_round()
                target.open_round()
        except BaseException as error:
            raise AssertionError(f"call {number} of seed {seed}: {error}") from error
    return count


def fuzz_constructors(group: Any, count: int, seed: int) -> int:
    """Bad configs, groups and counts of ranks."""
    numbers = random.Random(seed)
    for number in range(count):
        name = numbers.choice(sorted(BAD_FIELDS))
        field = {name: numbers.choice(BAD_FIELDS[name])}
        junk = numbers.choice([value for values in BAD_FIELDS.values() for value in values])
        chosen, attempt = numbers.choice(list(enumerate(constructors(field, junk))))
        described = f"{number} of seed {seed}: attempt {chosen} with {field} or {junk!r}"
        try:
            attempt()
        except ConfigError:
            continue
        except BaseException as error:
            raise AssertionError(f"{described}: {error!r}") from error
        raise AssertionError(f"{described}: accepted")
    return count


def constructors(field: dict[str, Any], junk: Any) -> list[Callable[[], Any]]:
    """Every way to construct, with a bad field of the config, or with something that is none at all."""
    good = Config(**GOOD_FIELDS)
    first = moebius.virtual_ranks(3)[0]  # three ranks do not divide eight experts
    return [
        lambda: Config(**{**GOOD_FIELDS, **field}),
        lambda: dataclasses.replace(good, **field),
        lambda: AllToAll(junk, good),
        lambda: AllToAll(first, junk),
        lambda: AllToAll(first, good),
        lambda: moebius.virtual_ranks(junk if not is_count(junk) else -1),
        lambda: moebius.plan(good, junk if not is_count(junk) else 3),
        lambda: moebius.plan(junk, 2),
    ]


def is_count(value: Any) -> bool:
    """A number of ranks that could be meant."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 64


@pytest.mark.parametrize("seed", range(4))
def test_bad_calls(process: RankPool, seed: int) -> None:
    assert process.run(fuzz_calls, [(NUM_CALLS // 5, seed)], timeout_s=120.0) == [NUM_CALLS // 5]


def test_bad_constructors(process: RankPool) -> None:
    assert process.run(fuzz_constructors, [(NUM_CALLS // 5, 4)], timeout_s=120.0) == [NUM_CALLS // 5]


def test_the_legal_calls_are_legal() -> None:
    """What the bad values are put into passes by itself, or every call would be refused for another reason."""
    for case in CASES:
        with InTurn(case) as ranks:
            halves = [Halves(a2a, of_rank(ranks.expected, rank)) for rank, a2a in enumerate(ranks.ranks)]
            pending = []
            for rank, a2a in enumerate(ranks.ranks):
                pending.append(a2a.dispatch_send(**legal_dispatch(a2a, ranks.expected[0].inputs[rank]).arguments))
            replies = []
            for rank, a2a in enumerate(ranks.ranks):
                recv = pending[rank].receive()
                call = legal_combine(a2a, ranks.expected[0].inputs[rank], recv, ranks.expected[0].expert_out[rank])
                replies.append(a2a.combine_send(**call.arguments))
            for one, reply in zip(halves, replies, strict=True):
                one.combined[0] = reply.receive()
            ranks.check(halves)
