"""The ranks as the scheduling process sees them: started, told, listened to, and ended together."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from contextlib import suppress
from multiprocessing.connection import wait
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from zipage.eviction.fault import first_line
from zipage.parallel import messages as m
from zipage.processes import Child, Failure, Log, close_all, pickled, unpacked

TARGET = "zipage.parallel.rank:run"
SILENCE = 600.0
"""Seconds without a word from any rank, while an answer is waited for, after which they are taken to hang; to load a
model may take longer."""
LOOK_FOR_DEAD = 2.0
"""Seconds to look for a rank that died, when another failed because of it."""

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
        self._failure: str | None = None
        self._folder = folder
        try:
            for start in starts:
                self.children.append(Child(f"rank {start.rank}", TARGET))
            for child, start in zip(self.children, starts, strict=True):
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
        except OSError:
            self._end_with(self._death())

    def take(self, rank: int, kind: type[Answer]) -> Answer:
        """The next message of a kind from a rank; waits for it."""
        inbox = self._inboxes[rank][kind]
        while not inbox:
            self.listen(SILENCE)
        return inbox.popleft()

    def take_all(self, kind: type[Answer]) -> list[Answer]:
        """One of a kind from each rank, in order."""
        return [self.take(rank, kind) for rank in range(len(self.children))]

    def arrived(self, kind: type[Answer]) -> list[tuple[int, Answer]]:
        """What has arrived of a kind, with the rank that sent it."""
        self.listen(0.0)
        found = []
        for rank, inbox in enumerate(self._inboxes):
            messages = inbox[kind]
            found += [(rank, messages.popleft()) for _ in range(len(messages))]
        return found

    def listen(self, seconds: float) -> None:
        """Sort what has come; wait so long for something to come."""
        self._check()
        ready = wait([child.channel for child in self.children], seconds)
        if not ready and seconds == SILENCE and self.is_ready:
            self._end_with(f"no rank has answered for {SILENCE:.0f} seconds")
        for rank, child in enumerate(self.children):
            while child.channel in ready and child.channel.poll():
                self._sort(rank, child)

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
            self._end_with(self._death())
        if isinstance(message, Failure):
            self._end_because(child, message)
        if isinstance(message, Log):
            message.repeat()
        else:
            self._inboxes[rank][type(message)].append(message)

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def _death(self) -> str:
        """Who died first, as far as can be told: by a signal before by an error that another's death caused."""
        end = time.monotonic() + LOOK_FOR_DEAD
        while not (dead := [child for child in self.children if child.exit_code is not None]):
            if time.monotonic() > end:
                return "a rank closed its connection"
            time.sleep(0.01)
        return min(dead, key=lambda child: child.exit_code >= 0).death()

    def _end_because(self, failed: Child, failure: Failure) -> None:
        """End all after one has failed, perhaps because another died."""
        end = time.monotonic() + LOOK_FOR_DEAD
        while time.monotonic() < end:
            for child in self.children:
                if child is not failed and child.exit_code is not None and child.exit_code < 0:
                    self._end_with(child.death())
            time.sleep(0.02)
        error = unpacked(failure)
        if not self.is_ready and isinstance(error, ValueError | OSError | ImportError):
            self._end_with(str(error), error)
        self._end_with(
            f"{failed.name} failed: {first_line(error)}",
            RuntimeError(f"{failed.name} failed: {first_line(error)}"),
            error,
        )

    def _end_with(self, failure: str, error: BaseException | None = None, cause: BaseException | None = None) -> None:
        self._failure = failure
        with suppress(OSError):
            self._end(grace=0)
        if error is None:
            raise RuntimeError(failure)
        raise error from (cause or error.__cause__)
