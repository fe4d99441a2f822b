"""The connection of two ranks: order, goodbyes, refusals, ends that nobody answers. No engine, one process."""

from __future__ import annotations

import datetime as dt
import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from moebius.hosts.link import Link, Message
from moebius.hosts.network import close_links
from tests.helpers.launch import in_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_BYTES = 1 << 20
SOON_S = 3.0


class End:
    """One end, which notes what comes; offsets below 0 are refused, and deliveries wait for `gate`."""

    def __init__(self, group: dist.ProcessGroupGloo) -> None:
        self.came: list[tuple[int, bytes, int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.link = Link(group, 1 - group.rank(), MOST_BYTES, self.deliver)

    def deliver(self, peer: int, offset: int, data: memoryview, signal: int, word: int) -> bool:
        assert peer == self.link.peer
        self.gate.wait(4 * SOON_S)
        if offset < 0:
            return False
        self.came.append((offset, bytes(data), signal, word))
        return True

    def put(self, offset: int, data: bytes = b"", signal: int = 0, word: int = 0) -> None:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        self.link.put(Message(offset, content, signal, word))


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[End]]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.HashStore()  # type: ignore[attr-defined]
    groups = in_threads(2, lambda rank: dist.ProcessGroupGloo(store, rank, 2, dt.timedelta(seconds=20)))
    made = [End(group) for group in groups]
    yield made
    for end in made:
        end.gate.set()
        end.link.cut()


def until(condition: object) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_messages_come_whole_and_in_order(ends: list[End]) -> None:
    sent = [(i, bytes([i % 256]) * (i * 37 % 5000), 8 * i, (1 << 64) - 1 - i) for i in range(60)]
    for message in sent:
        ends[0].put(*message)
        ends[1].put(*message)
    for end in ends:
        until(lambda end=end: len(end.came) == len(sent))
        assert end.came == sent


def test_closing_loses_nothing(ends: list[End]) -> None:
    """The other end is slow; the one that closes waits for it, and for the last message."""
    ends[1].gate.clear()
    for i in range(5):
        ends[0].put(i, bytes(1000))
    threading.Timer(0.3, ends[1].gate.set).start()
    start = time.monotonic()
    close_links([ends[0].link], 5.0)
    assert 0.2 < time.monotonic() - start < 4.0
    assert [message[0] for message in ends[1].came] == list(range(5))
    until(lambda: ends[1].link.is_broken)
    ends[1].put(9)  # into nothing
    close_links([ends[1].link], 5.0)
    close_links([ends[0].link], 5.0)  # again


def test_closing_both_ends_at_once(ends: list[End]) -> None:
    for end in ends:
        end.put(1, b"last")
    start = time.monotonic()
    in_threads(2, lambda rank: close_links([ends[rank].link], 5.0))
    assert time.monotonic() - start < 4.0


def test_nothing_is_delivered_after_closing(ends: list[End]) -> None:
    ends[0].link.say_goodbye()
    ends[1].put(3, b"late")
    assert ends[0].link.wait_until_heard(time.monotonic() + SOON_S)
    close_links([ends[1].link], 1.0)
    assert ends[0].came == []


def test_an_end_that_does_not_answer_is_left_in_time(ends: list[End]) -> None:
    ends[1].gate.clear()
    ends[0].put(0, bytes(10))
    start = time.monotonic()
    close_links([ends[0].link], 0.3)
    assert time.monotonic() - start < 2.0
    assert not any(thread.is_alive() for thread in ends[0].link._threads)


def test_what_was_given_up_is_not_waited_for(ends: list[End]) -> None:
    ends[1].gate.clear()
    start = time.monotonic()
    for i in range(200):
        ends[0].put(i, bytes(100_000))
    assert time.monotonic() - start < 1.0, "a put waits for nobody"
    ends[0].link.give_up(True)
    ends[0].put(1000)  # as a refusal
    ends[1].gate.set()
    until(lambda: ends[1].came and ends[1].came[-1][0] == 1000)
    assert len(ends[1].came) < 10, "only what was under way comes, and what was put later"
    ends[1].gate.clear()
    ends[0].put(1001)
    start = time.monotonic()
    close_links([ends[0].link], 30.0)
    assert time.monotonic() - start < SOON_S


def test_a_message_to_a_wrong_place_ends_the_connection(ends: list[End], caplog: pytest.LogCaptureFixture) -> None:
    ends[0].put(-1, b"x")
    until(lambda: ends[1].link.is_broken)
    assert "rank 0: a message came for offset -1" in caplog.text


def test_a_message_that_is_too_long_ends_the_connection(ends: list[End], caplog: pytest.LogCaptureFixture) -> None:
    ends[0].put(0, bytes(MOST_BYTES + 1))
    until(lambda: ends[1].link.is_broken)
    assert f"a message of {MOST_BYTES + 1} bytes came" in caplog.text
