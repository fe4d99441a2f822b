"""The legal orders of the halves of several rounds, and the legal ways in which ranks drift apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

Half = tuple[str, int]
HALVES = ("dispatch_send", "dispatch_receive", "combine_send", "combine_receive")


def legal_orders(combined: Sequence[bool], depth: int) -> Iterator[tuple[Half, ...]]:
    """Every order in which a rank may call the halves of consecutive rounds.

    The halves of a round follow one another; sends of dispatch go by round; the dispatch `depth` rounds later needs
    all halves of the round that the caller means to call.

    Args:
        combined: of each round, whether it is combined or only dispatched.
        depth: D of the config.
    """
    rounds = len(combined)
    last = [4 if whole else 2 for whole in combined]

    def extend(done: list[int], order: list[Half]) -> Iterator[tuple[Half, ...]]:
        if done == last:
            yield tuple(order)
            return
        for number in range(rounds):
            if done[number] < last[number] and allowed(done, number):
                order.append((HALVES[done[number]], number))
                done[number] += 1
                yield from extend(done, order)
                done[number] -= 1
                order.pop()

    def allowed(done: list[int], number: int) -> bool:
        if done[number] > 0:
            return True
        if number > 0 and done[number - 1] == 0:
            return False
        return number < depth or done[number - depth] == last[number - depth]

    return extend([0] * rounds, [])


def drifting(order: Sequence[Half], num_ranks: int, depth: int, numbers: random.Random) -> list[tuple[int, Half]]:
    """One way in which ranks that all call `order` may drift apart, in the sequence of a single thread.

    No rank is asked for a half that would wait: a receive comes after the sends of all ranks, and a dispatch after
    the combine sends of all ranks `depth` rounds before. Rounds are to be combined, all of them.
    """
    at = [0] * num_ranks
    sequence: list[tuple[int, Half]] = []
    while any(place < len(order) for place in at):
        ready = [
            rank
            for rank in range(num_ranks)
            if at[rank] < len(order)
            and all(half in order[:place] for half in needs(order[at[rank]], depth) for place in at)
        ]
        # Favour a rank for a while, so that it runs as far ahead as it can.
        favoured = numbers.choice(ready)
        for _ in range(numbers.choice((1, 1, 2, 8))):
            half = order[at[favoured]] if at[favoured] < len(order) else None
            if half is None or not all(other in order[:place] for other in needs(half, depth) for place in at):
                break
            sequence.append((favoured, half))
            at[favoured] += 1
    return sequence


def needs(half: Half, depth: int) -> list[Half]:
    """What every rank must have called so that `half` need not wait."""
    name, number = half
    if name == "dispatch_receive":
        return [("dispatch_send", number)]
    if name == "combine_receive":
        return [("combine_send", number)]
    if name == "dispatch_send" and number >= depth:
        return [("combine_send", number - depth)]
    return []
