"""Any configuration and any routing, found by hypothesis, in one thread."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from moebius.reference import RankInput
from tests.conformance.engines import ENGINES
from tests.conformance.programs import whole_rounds
from tests.helpers.cases import MODES, PAYLOADS, Case
from tests.helpers.rounds import check_rank, expect, of_rank

IDS = (torch.int32, torch.int64)


@st.composite
def some_case(draw: st.DrawFn) -> Case:
    payload = draw(st.sampled_from(list(PAYLOADS)))
    num_ranks = draw(st.integers(1, 5))
    num_local = draw(st.integers(1, 4))
    unit = 512 if payload == "fp8-ue8m0" else 128 if payload.startswith("fp8") else 8
    return Case(
        num_ranks=num_ranks,
        num_experts=num_ranks * num_local,
        num_topk=draw(st.integers(1, min(32, num_ranks * num_local))),
        hidden=unit * draw(st.integers(1, 5)),
        max_num_tokens=draw(st.integers(1, 9)),
        payload=payload,
        mode=draw(st.sampled_from(list(MODES))),
        depth=draw(st.integers(2, 4)),
    )


@st.composite
def some_traffic(draw: st.DrawFn, case: Case) -> list[tuple[list[int], int | None]]:
    """For each rank the ids of its tokens, one after another, and how many tokens are no padding."""
    drawn = []
    for _ in range(case.num_ranks):
        size = draw(st.integers(0, case.max_num_tokens))
        choices = st.integers(-1, case.num_experts - 1)
        ids = draw(st.lists(choices, min_size=size * case.topk, max_size=size * case.topk))
        drawn.append((ids, draw(st.none() | st.integers(0, size))))
    return drawn


def inputs_of(case: Case, number: int, traffic: list[tuple[list[int], int | None]]) -> list[RankInput]:
    """The case's values, sent as drawn."""
    inputs = []
    sources = dataclasses.replace(case, routing="full").inputs(number)
    for rank, (source, (ids, valid)) in enumerate(zip(sources, traffic, strict=True)):
        size = len(ids) // case.topk
        inputs.append(
            RankInput(
                x=source.x[:size],
                topk_ids=torch.tensor(ids, dtype=IDS[(rank + number) % 2]).reshape(size, case.topk),
                topk_weights=source.topk_weights[:size],
                scales=None if source.scales is None else source.scales[:size],
                num_valid_tokens=valid,
            )
        )
    return inputs


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_any_rounds(data: st.DataObject) -> None:
    case = data.draw(some_case())
    note(case.id)
    expected = [
        expect(case, number, inputs_of(case, number, data.draw(some_traffic(case))))
        for number in range(data.draw(st.integers(1, case.depth + 2)))
    ]
    arguments = [(of_rank(expected, rank),) for rank in range(case.num_ranks)]
    results = ENGINES["cpu-single"].run(case.config(), case.num_ranks, whole_rounds, arguments, None)
    for rank, result in enumerate(results):
        check_rank(case.config(), rank, result, expected)
