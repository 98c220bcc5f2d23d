"""The ranks as the scheduling process sees them: started, told, listened to, and ended together."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from contextlib import suppress
from multiprocessing.connection import wait
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, TypeVar

from zipage.eviction.fault import first_line
from zipage.parallel import messages as m
from zipage.processes import Child, Failure, Log, close_all, pickled, unpacked

TARGET = "zipage.parallel.rank:run"
SILENCE = 600.0
"""Seconds without a word from any rank, while an answer is waited for, or in which one takes no message, after which
they are taken to hang; to load a model may take longer."""
LAST_WORDS = 2.0
"""Seconds in which the others tell, after one has failed or ended, that they did so before."""

Answer = TypeVar("Answer")


class RankGroup:
    """N processes that get the same messages in the same order.

    Once one of them dies or fails, all are ended, and whatever is asked of them raises RuntimeError with one line that
    names it.

    Args:
        starts: the first message to each.
        folder: where they find each other; removed with them.

    Attributes:
        is_ready: all have started. Until then an error that the user can mend, such as a missing file, is raised as is.
    """

    def __init__(self, starts: list[m.Start], folder: TemporaryDirectory) -> None:
        self.children: list[Child] = []
        self.is_ready = False
        self._inboxes: list[dict[type, deque[Any]]] = [defaultdict(deque) for _ in starts]
        self._failures: dict[int, Failure] = {}
        self._warnings: dict[tuple[int, str], int] = {}
        """The rank that gave each first."""
        self._failure: str | None = None
        self._folder = folder
        try:
            for start in starts:
                self.children.append(Child(f"rank {start.rank}", TARGET))
            for child, start in zip(self.children, starts, strict=True):
                child.channel.limit_sending(SILENCE)
                child.channel.send(start)
        except BaseException:
            self._end(grace=0)
            raise

    def tell(self, message: Any) -> None:
        """Send all the same."""
        self._check()
        data = pickled(message)
        try:
            for child in self.children:
                child.channel.send_pickled(data)
        except BlockingIOError:
            self._end_with(f"{child.name} has taken no message for {SILENCE:g} seconds")
        except OSError:
            self._fail()

    def take(self, rank: int, kind: type[Answer]) -> Answer:
        """The next message of a kind from a rank; waits for it."""
        inbox = self._inboxes[rank][kind]
        while not inbox:
            self.wait()
        return inbox.popleft()

    def take_all(self, kind: type[Answer]) -> list[Answer]:
        """One of a kind from each rank, in order."""
        return [self.take(rank, kind) for rank in range(len(self.children))]

    def arrived(self, kind: type[Answer]) -> list[tuple[int, Answer]]:
        """What has arrived of a kind, with the rank that sent it."""
        self._check()
        self._listen(0.0)
        found = []
        for rank, inbox in enumerate(self._inboxes):
            messages = inbox[kind]
            found += [(rank, messages.popleft()) for _ in range(len(messages))]
        return found

    def wait(self) -> None:
        """Until something comes."""
        self._check()
        if not self._listen(SILENCE) and self.is_ready:
            self._end_with(f"no rank has answered for {SILENCE:g} seconds")

    def _listen(self, seconds: float) -> bool:
        """Sort what has come. Returns whether something has, within that time."""
        ready = wait([child.channel for child in self.children], seconds)
        for rank, child in enumerate(self.children):
            while child.channel in ready and child.channel.poll():
                self._sort(rank, child)
        return bool(ready)

    def close(self, grace: float = 10.0) -> None:
        """End the processes."""
        self._failure = self._failure or "its ranks were ended"
        self._end(grace)

    def _end(self, grace: float) -> None:
        try:
            close_all(self.children, grace)
        finally:
            self._folder.cleanup()

    def _sort(self, rank: int, child: Child) -> None:
        try:
            message = child.channel.receive()
        except (EOFError, OSError):
            self._fail()
        if isinstance(message, Failure):
            self._failures[rank] = message
            self._fail()
        if isinstance(message, Log):
            self._log(rank, message)
        else:
            self._inboxes[rank][type(message)].append(message)

    def _log(self, rank: int, log: Log) -> None:
        """What all ranks warn of is logged once."""
        if log.level < logging.WARNING or self._warnings.setdefault((log.level, log.text), rank) == rank:
            log.repeat(self.children[rank].name)

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def _fail(self) -> NoReturn:
        """End all after one has failed or ended, and say which was the first: the others may only have lost it.

        One that ended without a word was killed, or killed itself. Of others, the earliest failure brought about the
        later ones.
        """
        end = time.monotonic() + LAST_WORDS
        ended: list[Child] = []
        while not ended and len(self._failures) < len(self.children) and time.monotonic() < end:
            time.sleep(0.01)
            codes = [child.exit_code for child in self.children]  # before what they have said is read
            self._hear_out()
            ended = [
                child
                for rank, (child, code) in enumerate(zip(self.children, codes, strict=True))
                if code is not None and rank not in self._failures
            ]
        if ended:
            self._end_with(min(ended, key=lambda child: child.exit_code >= 0).death())
        if not self._failures:
            self._end_with("a rank closed its connection")
        rank, failure = min(self._failures.items(), key=lambda item: item[1].time)
        error = unpacked(failure)
        if not self.is_ready and isinstance(error, ValueError | OSError | ImportError):
            self._end_with(str(error), error)
        line = f"{self.children[rank].name} failed: {first_line(error)}"
        self._end_with(line, RuntimeError(line), error)

    def _hear_out(self) -> None:
        """Read what is there of the end of each: whether it has failed, and its log."""
        for rank, child in enumerate(self.children):
            with suppress(EOFError, OSError):
                while rank not in self._failures and child.channel.poll():
                    message = child.channel.receive()
                    if isinstance(message, Failure):
                        self._failures[rank] = message
                    elif isinstance(message, Log):
                        self._log(rank, message)

    def _end_with(
        self, failure: str, error: BaseException | None = None, cause: BaseException | None = None
    ) -> NoReturn:
        self._failure = failure
        with suppress(OSError):
            self._end(grace=0)
        if error is None:
            raise RuntimeError(failure)
        raise error from (cause or error.__cause__)
