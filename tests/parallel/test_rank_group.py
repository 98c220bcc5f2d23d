"""Who failed first is named, and no rank is waited for without end."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

from tests.child_processes import wait_for_end
from tests.parallel.test_ranks import compressor, order
from zipage.parallel import messages as m
from zipage.parallel import rank_group
from zipage.parallel.rank_group import RankGroup

MUCH = bytes(4 * 2**20)
"""More than a connection holds."""


@contextmanager
def ranks(monkeypatch: pytest.MonkeyPatch, target: str, *delays: float) -> Iterator[RankGroup]:
    """Processes that run a function of `tests.child_processes`."""
    monkeypatch.setattr(rank_group, "TARGET", f"tests.child_processes:{target}")
    starts = [SimpleNamespace(rank=rank, delay=delay) for rank, delay in enumerate(delays)]
    group = RankGroup(starts, TemporaryDirectory())
    group.is_ready = True
    try:
        yield group
    finally:
        group.close(grace=0)


@contextmanager
def ended(group: RankGroup, seconds: float) -> Iterator[None]:
    """A wait without end is a failure, not a test that hangs."""
    ends = [threading.Timer(seconds, os.kill, [child.pid, signal.SIGKILL]) for child in group.children]
    for end in ends:
        end.start()
    yield
    for end in ends:
        end.cancel()


@pytest.mark.parametrize("ask", [lambda group: group.tell(m.TellMisranked()), lambda group: group.take(0, m.Done)])
def test_the_rank_that_failed_first_is_named_with_its_traceback(monkeypatch, ask):
    """The others fail because of it, and may be heard first, or only found to have ended."""
    with ranks(monkeypatch, "fail_after", 0.3, 0.0) as group:
        wait_for_end([child.pid for child in group.children])
        with pytest.raises(RuntimeError, match=r"^rank 1 failed: ArithmeticError: after 0.0 seconds$") as caught:
            ask(group)
        assert isinstance(caught.value.__cause__, ArithmeticError)
        assert "in fail_after" in str(caught.value.__cause__.__cause__)
        with pytest.raises(RuntimeError, match=r"^rank 1 failed: ArithmeticError"):
            group.tell(m.TellMisranked())


def test_a_long_load_is_no_hang(monkeypatch):
    monkeypatch.setattr(rank_group, "SILENCE", 0.01)
    with ranks(monkeypatch, "answer_after", 0.2, 0.4) as group:
        group.is_ready = False
        assert group.take_all(str) == ["ready", "ready"]


def test_compressions_of_a_stopped_rank_are_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(rank_group, "SILENCE", 0.5)
    with ranks(monkeypatch, "read", 0.0, 0.0) as group, ended(group, 10):
        os.kill(group.children[1].pid, signal.SIGSTOP)
        ranked = compressor(group)
        ranked.submit([order(0)])
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match=r"^no rank has answered for 0.5 seconds$"):
            ranked.poll(wait=True)
        assert time.monotonic() - begin < 5
        wait_for_end([child.pid for child in group.children])


def test_a_rank_that_hears_nothing_is_not_told_without_end(monkeypatch):
    monkeypatch.setattr(rank_group, "SILENCE", 0.5)
    with ranks(monkeypatch, "read", 0.0, 0.0) as group, ended(group, 10):
        os.kill(group.children[1].pid, signal.SIGSTOP)
        with pytest.raises(RuntimeError, match=r"^rank 1 has taken no message for 0.5 seconds$"):
            group.tell(MUCH)
        wait_for_end([child.pid for child in group.children])
