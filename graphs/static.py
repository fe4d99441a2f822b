"""The tensors that a step reads and writes in every replay: the same addresses for all buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from moebius.checks import describe
from moebius.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


def sizes(shape: Sequence[int]) -> str:
    """What follows the first dimension, for an error message."""
    return "".join(f", {size}" for size in shape)


class StaticInputs:
    """A batch, padded to the largest bucket.

    Rows past the batch hold the padding, never what an earlier and larger batch left there: a slot of a KV cache that
    was written for one request must not be written again for the padding of the next.

    Attributes:
        tensors: [N, ...] each, N the largest bucket.
        num_valid_tokens: [1] int32: how many of the rows are tokens.
    """

    def __init__(self, example: Sequence[Tensor], padding: Sequence[float], largest: int, device: torch.device) -> None:
        """Allocate for inputs like `example`, all of them padding.

        Args:
            example: [any, ...] each, of the dtypes that the step takes.
            padding: what the rows of each input hold past the batch.
            largest: N.
            device: of all of them.

        Raises:
            ShapeError: an example is no tensor with a first dimension, or on another device.
            ConfigError: `padding` is not one number for each.
        """
        if len(padding) != len(example):
            raise ConfigError(f"`padding` must have a value for each of {len(example)} inputs (got {len(padding)})")
        for number, tensor in enumerate(example):
            if not isinstance(tensor, Tensor) or tensor.dim() == 0 or tensor.device != device:
                raise ShapeError(f"`example[{number}]` must be [T, ...] on {device} (got {describe(tensor)})")
        self._padding = tuple(padding)
        with torch.inference_mode(mode=False):  # what was made in it could not be written to outside
            self.tensors = tuple(
                torch.full((largest, *tensor.shape[1:]), value, dtype=tensor.dtype, device=device)
                for tensor, value in zip(example, padding, strict=True)
            )
            self.num_valid_tokens = torch.zeros(1, dtype=torch.int32, device=device)
        self._num_valid = 0  # what `num_valid_tokens` says

    def rows(self, bucket: int) -> tuple[Tensor, ...]:
        """What the step of a bucket is called with."""
        return tuple(tensor[:bucket] for tensor in self.tensors)

    def check(self, inputs: Sequence[Any]) -> int:
        """Check a batch; returns T.

        Raises:
            ShapeError: names the input, what was expected and what came.
        """
        if len(inputs) != len(self.tensors):
            raise ShapeError(f"a batch must have {len(self.tensors)} inputs, as `example` (got {len(inputs)})")
        num_tokens = -1
        for number, (given, static) in enumerate(zip(inputs, self.tensors, strict=True)):
            is_like = (
                isinstance(given, Tensor)
                and given.dim() > 0
                and given.shape[1:] == static.shape[1:]
                and given.dtype is static.dtype
                and given.device == static.device
            )
            if is_like and num_tokens < 0:
                num_tokens = given.shape[0]
            if not is_like or given.shape[0] != num_tokens:
                first = "T" if num_tokens < 0 else num_tokens
                wanted = f"[{first}{sizes(static.shape[1:])}] {static.dtype} on {static.device}"
                raise ShapeError(f"input {number} must be {wanted} (got {describe(given)})")
        return max(num_tokens, 0)

    def fill(self, inputs: Sequence[Tensor], num_tokens: int) -> None:
        """Put a checked batch of at most N tokens in its place; what is a view of these tensors is there already."""
        last = self._num_valid
        for static, given, value in zip(self.tensors, inputs, self._padding, strict=True):
            is_there = given.data_ptr() == static.data_ptr() and given.stride() == static.stride()
            if num_tokens and not is_there:
                static[:num_tokens].copy_(given)
            if num_tokens < last:
                static[num_tokens:last].fill_(value)
        if num_tokens != last:
            self.num_valid_tokens.fill_(num_tokens)
            self._num_valid = num_tokens


class StaticOutputs(Generic[Result]):
    """What the step returned last, for whichever bucket."""

    def __init__(self, largest: int) -> None:
        """Know nothing yet: the first result, of the largest bucket, tells what there is."""
        self._largest = largest
        self._tensors: tuple[Tensor, ...] = ()
        self._is_single = False

    def adopt(self, result: Any, device: torch.device) -> None:
        """Allocate for results like this one, of the largest bucket.

        Raises:
            ShapeError: the step returned something else than [N, ...] tensors on its device.
        """
        results = (result,) if isinstance(result, Tensor) else result
        if not isinstance(results, tuple) or not results:
            raise ShapeError(f"a step must return a tensor or a tuple of tensors (got {type(result).__name__})")
        for number, tensor in enumerate(results):
            if not isinstance(tensor, Tensor) or tensor.dim() == 0 or tensor.shape[0] != self._largest:
                raise ShapeError(
                    f"output {number} of a step of {self._largest} tokens must be "
                    f"[{self._largest}, ...] (got {describe(tensor)})"
                )
            if tensor.device != device:
                raise ShapeError(f"output {number} of the step must be on {device} (got {describe(tensor)})")
        self._is_single = isinstance(result, Tensor)
        with torch.inference_mode(mode=False):
            self._tensors = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in results)

    def write(self, result: Result, bucket: int) -> None:
        """Keep what the step of a bucket returned.

        Raises:
            ShapeError: it is not as that of the largest bucket was, with `bucket` rows.
        """
        results: tuple[Any, ...] = (result,) if isinstance(result, Tensor) else result
        if not isinstance(results, tuple) or len(results) != len(self._tensors):
            raise ShapeError(
                f"a step must return {len(self._tensors)} tensors, as it did for {self._largest} tokens "
                f"(got {type(result).__name__} for {bucket})"
            )
        for number, (tensor, static) in enumerate(zip(results, self._tensors, strict=True)):
            if (
                not isinstance(tensor, Tensor)
                or tensor.shape != (bucket, *static.shape[1:])
                or tensor.dtype is not static.dtype
                or tensor.device != static.device
            ):
                wanted = f"[{bucket}{sizes(static.shape[1:])}] {static.dtype} on {static.device}"
                raise ShapeError(
                    f"output {number} of a step of {bucket} tokens must be {wanted}, as it was for "
                    f"{self._largest} (got {describe(tensor)})"
                )
            static[:bucket].copy_(tensor)

    def shown(self, num_tokens: int) -> Result:
        """The rows of the batch's tokens: views."""
        views = tuple(tensor[:num_tokens] for tensor in self._tensors)
        return views[0] if self._is_single else views  # type: ignore[return-value]  # as the step returned it
