"""Every engine, routing, payload and layout against the reference, to the bit."""

from __future__ import annotations

import functools
import itertools

import pytest

from tests.conformance.engines import ENGINES, Engine
from tests.conformance.programs import whole_rounds
from tests.helpers.cases import MODES, PAYLOADS, Case
from tests.helpers.rounds import Expected, check_rank, expect, of_rank
from tests.helpers.routing import ROUTINGS

SIZES = {1: 4, 2: 8, 3: 9, 4: 16}  # ranks: experts


def cases() -> list[Case]:
    """Routing x payload x mode; the ranks, the depth and the padding go round and round through them."""
    turns = itertools.cycle(
        [(2, 2, False), (4, 2, False), (3, 3, True), (1, 2, False), (4, 3, False), (2, 4, True), (3, 2, False)]
    )
    found = []
    for payload, mode, routing in itertools.product(PAYLOADS, MODES, ROUTINGS):
        num_ranks, depth, padded = next(turns)
        hidden = 512 if payload == "fp8-ue8m0" else 128
        found.append(
            Case(
                num_ranks=num_ranks,
                num_experts=SIZES[num_ranks],
                hidden=hidden,
                payload=payload,
                mode=mode,
                routing=routing,
                depth=depth,
                padded=padded,
            )
        )
    return found


def bigger() -> list[Case]:
    """Many experts and choices, rows that are no multiple of a vector, one token, one expert a rank."""
    wide = Case(num_ranks=4, num_experts=32, num_topk=8, hidden=512, max_num_tokens=40)
    narrow = Case(num_ranks=2, num_experts=2, num_topk=2, hidden=8, max_num_tokens=1)
    odd = Case(num_ranks=3, num_experts=6, num_topk=5, hidden=8 * 27, max_num_tokens=17)
    most = Case(num_ranks=2, num_experts=64, num_topk=32, hidden=128, max_num_tokens=9)
    several = []
    for mode in MODES:
        for base, payloads in (
            (wide, ("bf16", "fp8", "fp8-ue8m0", "opaque")),
            (narrow, ("bf16", "fp32")),
            (odd, ("fp16", "bf16", "fp32")),
            (most, ("bf16", "fp8-pow2")),
        ):
            for payload in payloads:
                several += [
                    Case(**{**vars(base), "payload": payload, "mode": mode, "routing": routing})
                    for routing in ("uniform", "duplicates")
                ]
    return several


@functools.cache
def expected_rounds(case: Case, count: int) -> tuple[Expected, ...]:
    """Shared by the engines."""
    return tuple(expect(case, number) for number in range(count))


@pytest.mark.parametrize("case", [*cases(), *bigger()], ids=lambda case: case.id)
@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.name)
def test_rounds_equal_the_reference(engine: Engine, case: Case) -> None:
    """One round more than the depth, so that a buffer is used again."""
    if case.num_ranks not in engine.sizes:
        pytest.skip(f"{engine.name} runs {engine.sizes} ranks")
    expected = expected_rounds(case, case.depth + 1)
    arguments = [(of_rank(expected, rank),) for rank in range(case.num_ranks)]
    results = engine.run(case.config(), case.num_ranks, whole_rounds, arguments, None)
    for rank, result in enumerate(results):
        assert len(result.combined) == len(expected)
        check_rank(case.config(), rank, result, expected)
