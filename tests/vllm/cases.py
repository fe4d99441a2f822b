"""What the runs are asked, and how their answers are compared."""

from tests.vllm.runs import Answer, Batch

TOLERANCE = 5e-5  # of a logprob: four decimals; fp32 sums of other batches differ by some 1e-6

# Two data-parallel ranks. Ragged: other lengths, other numbers of prompts, one rank done long before the other.
BATCHES: list[Batch] = [
    [
        [("hello world", 16), ("the quick brown fox jumps over the lazy dog", 9), ("x", 3), ("to be or not", 16)],
        [("mixture of experts", 5)],
    ],
    [[], [("only one rank has anything to do here", 12), ("a second one", 4)]],
    [[("long " * 30, 6)], [("short", 14), ("1234567890", 14)]],
]


def on_one_rank(batches: list[Batch]) -> list[Batch]:
    """The same prompts, all for one rank."""
    return [[[one for rank in batch for one in rank]] for batch in batches]


def compare(found: dict[str, Answer], expected: dict[str, Answer]) -> None:
    """Same tokens, and logprobs within the tolerance, for every prompt."""
    assert found.keys() == expected.keys()
    for prompt, answer in expected.items():
        assert found[prompt].tokens == answer.tokens, prompt
        worst = max(abs(a - b) for a, b in zip(found[prompt].logprobs, answer.logprobs, strict=True))
        assert worst < TOLERANCE, f"{prompt!r}: logprobs differ by {worst}"
