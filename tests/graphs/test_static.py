"""The tensors of every replay: what stands in the rows past the batch, and where results are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moebius import ConfigError, ShapeError
from moebius.graphs.static import StaticInputs, StaticOutputs

CPU = torch.device("cpu")
EXAMPLE = (torch.zeros(1, 2), torch.zeros(3, dtype=torch.int64))


def made() -> StaticInputs:
    return StaticInputs(EXAMPLE, (0.5, -1), 4, CPU)


def batch(num_tokens: int, value: int) -> tuple[Tensor, Tensor]:
    return torch.full((num_tokens, 2), float(value)), torch.full((num_tokens,), value)


def put(inputs: StaticInputs, given: tuple[Tensor, ...]) -> None:
    inputs.fill(given, inputs.check(given))


def test_rows_past_the_batch_hold_the_padding() -> None:
    inputs = made()
    for step, num_tokens in enumerate((0, 3, 1, 4, 2, 0, 4, 4)):
        put(inputs, batch(num_tokens, step + 10))
        x, slots = inputs.tensors
        assert x[:, 0].tolist() == [step + 10.0] * num_tokens + [0.5] * (4 - num_tokens)
        assert slots.tolist() == [step + 10] * num_tokens + [-1] * (4 - num_tokens)
        assert inputs.num_valid_tokens.tolist() == [num_tokens]
    assert [list(rows.shape) for rows in inputs.rows(2)] == [[2, 2], [2]]


def test_addresses_stay() -> None:
    inputs = made()
    before = [tensor.data_ptr() for tensor in (*inputs.rows(4), inputs.num_valid_tokens)]
    put(inputs, batch(3, 1))
    assert [tensor.data_ptr() for tensor in (*inputs.rows(1), inputs.num_valid_tokens)] == before


def test_a_batch_that_is_there_already_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = made()
    put(inputs, batch(4, 7))
    inputs.tensors[0][:2] = 8.0
    monkeypatch.setattr(Tensor, "copy_", lambda *_: pytest.fail("copied"))
    put(inputs, (inputs.tensors[0][:2], inputs.tensors[1][:2]))
    assert inputs.tensors[0][:, 0].tolist() == [8.0, 8.0, 0.5, 0.5]
    assert inputs.tensors[1].tolist() == [7, 7, -1, -1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.zeros(2, 2),), r"a batch must have 2 inputs, as `example` \(got 1\)"),
        ((torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)), r"input 0 must be \[T, 2\] torch.float32 on cpu"),
        ((torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64)), r"input 1 must be \[2\] torch.int64 on cpu"),
        ((torch.zeros(2, 2), torch.zeros(2)), r"input 1 must be \[2\] torch.int64 on cpu \(got \[2\] torch.float32"),
        ((torch.zeros(2, 2, device="meta"), torch.zeros(2, dtype=torch.int64)), r"input 0 .* \(got .* on meta"),
        ((torch.tensor(1.0), torch.zeros(2, dtype=torch.int64)), r"input 0 must be \[T, 2\]"),
        ((torch.zeros(2, 2), [1, 2]), r"input 1 must be \[2\] torch.int64 on cpu \(got list\)"),
    ],
)
def test_a_batch_unlike_the_example_is_refused(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        made().check(given)


def test_an_impossible_example_is_refused() -> None:
    with pytest.raises(ConfigError, match="a value for each of 2 inputs \\(got 1\\)"):
        StaticInputs(EXAMPLE, (0,), 4, CPU)
    for example in (torch.tensor(1.0), torch.zeros(1, device="meta"), 3):
        with pytest.raises(ShapeError, match=r"`example\[1\]` must be \[T, ...\] on cpu"):
            StaticInputs((EXAMPLE[0], example), (0, 0), 4, CPU)  # type: ignore[arg-type]


def test_results_of_all_buckets_are_found_at_one_place() -> None:
    outputs: StaticOutputs[tuple[Tensor, ...]] = StaticOutputs(4)
    outputs.adopt((torch.zeros(4, 2), torch.zeros(4, dtype=torch.int32)), CPU)
    addresses = [view.data_ptr() for view in outputs.shown(1)]
    for bucket in (4, 1, 2):
        outputs.write((torch.full((bucket, 2), float(bucket)), torch.arange(bucket, dtype=torch.int32)), bucket)
        shown = outputs.shown(bucket - 1)
        assert [list(view.shape) for view in shown] == [[bucket - 1, 2], [bucket - 1]]
        assert set(shown[0].flatten().tolist()) == {float(bucket)} - {1.0}
        assert [view.data_ptr() for view in outputs.shown(1)] == addresses


def test_a_single_result_comes_back_as_one() -> None:
    outputs: StaticOutputs[Tensor] = StaticOutputs(2)
    outputs.adopt(torch.zeros(2, 3), CPU)
    outputs.write(torch.ones(1, 3), 1)
    assert outputs.shown(1).tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "a tensor or a tuple of tensors \\(got NoneType\\)"),
        ((), "a tensor or a tuple of tensors \\(got tuple\\)"),
        (torch.zeros(3, 2), r"output 0 of a step of 4 tokens must be \[4, ...\]"),
        (torch.tensor(0.0), r"output 0 of a step of 4 tokens must be \[4, ...\]"),
        ((torch.zeros(4), torch.zeros(4, device="meta")), "output 1 of the step must be on cpu"),
    ],
)
def test_a_step_that_returns_something_else_is_refused(result: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        StaticOutputs(4).adopt(result, CPU)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(2, 3), r"return 2 tensors, as it did for 4 tokens \(got Tensor for 2\)"),
        (None, r"return 2 tensors, as it did for 4 tokens \(got NoneType for 2\)"),
        ((torch.zeros(2, 4), torch.zeros(2)), r"output 0 of a step of 2 tokens must be \[2, 3\] torch.float32"),
        ((torch.zeros(4, 3), torch.zeros(2)), r"output 0 of a step of 2 tokens must be \[2, 3\]"),
        ((torch.zeros(2, 3), torch.zeros(2, dtype=torch.int8)), r"output 1 .* as it was for 4 \(got \[2\] torch.int8"),
        ((torch.zeros(2, 3), None), r"output 1 of a step of 2 tokens must be \[2\]"),
    ],
)
def test_a_bucket_that_returns_something_else_is_refused(result: Any, message: str) -> None:
    outputs: StaticOutputs[Any] = StaticOutputs(4)
    outputs.adopt((torch.zeros(4, 3), torch.zeros(4)), CPU)
    with pytest.raises(ShapeError, match=message):
        outputs.write(result, 2)
