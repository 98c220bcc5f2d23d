"""Text made in a child process, each piece within a limit of time, memory and length."""

from __future__ import annotations

import gc
import resource
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from experiments.errors import one_line

Item = TypeVar("Item")


class Exceeded(Exception):
    """A limit was reached; the text says which."""


class Failed(Exception):
    """The function raised; the text is that of its exception in one line."""


def texts(
    function: Callable[[Item], str], items: Sequence[Item], *, seconds: float, mebibytes: int, characters: int
) -> list[str]:
    """`function` of each item, in order, computed in one fork of this process.

    Whatever the function hangs in, C code too, the kernel ends the child when an item's time is up, also where this
    process has died before. The child leaves CUDA and other threads' business alone, as workers of torch's loaders do.

    Args:
        seconds: of wall clock for each item.
        mebibytes: that the child may take beyond this process's size.
        characters: of each text.

    Raises:
        Exceeded: an item took more.
        Failed: the function raised.
    """
    if not items:
        return []
    context = get_context("fork")
    here, there = context.Pipe(duplex=False)
    arguments = (there, function, items, seconds, mebibytes, characters)
    child = context.Process(target=_work, args=arguments, daemon=True)
    with warnings.catch_warnings(), _held(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside other threads
        child.start()
    there.close()
    try:
        return [_receive(here, child, seconds) for _ in items]
    finally:
        here.close()
        child.kill()
        child.join()


@contextmanager
def _held(*numbers: signal.Signals) -> Iterator[None]:
    """Signals are answered afterwards: Python drops what a handler raises in the hooks that follow a fork."""
    if threading.current_thread() is not threading.main_thread():  # whose handlers run elsewhere
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _receive(connection: Connection, child: BaseProcess, seconds: float) -> str:
    try:
        text, error = connection.recv()
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGALRM:
            raise Exceeded(f"took more than {seconds:g} s") from None
        raise Exceeded(f"ended its process (exit code {child.exitcode})") from None
    if error is not None:
        raise error
    return text


def _work(
    connection: Connection, function: Callable[[Item], str], items: Sequence[Item], seconds: float, mebibytes: int,
    characters: int,
) -> None:  # fmt: skip
    gc.disable()  # what this process would collect may belong to a device
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent, which ends this process
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = size + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    for item in items:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        text, error = "", None
        try:
            text = function(item)
            if len(text) > characters:
                text, error = "", Exceeded(f"made more than {characters:,} characters")
        except MemoryError:
            error = Exceeded(f"took more than {mebibytes:,} MiB of memory")
        except Exception as failure:
            error = Failed(one_line(failure))
        connection.send((text, error))
