"""Python processes that work for this one, talk with it over a connection, and end with it.

`multiprocessing` would import the user's `__main__` again in each of them: a script without a guard would start itself
anew, and a notebook or a program read from stdin could not start them at all. Here a child runs a function of an
importable module, and the module search path is this process's.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

POLL = 0.5
"""Seconds between two looks of a child whether its parent lives."""
GRACE = 10.0
"""Seconds that a child has to end by itself once its channel is closed."""


class Channel:
    """Messages to and from the process at the other end, each pickled by itself. Any thread may send.

    `multiprocessing`'s own pickling would put tensors into shared memory. `multiprocessing.connection.wait` takes
    channels as it takes connections.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Raises OSError where the other end is gone; BlockingIOError where it takes nothing (`limit_sending`)."""
        self.send_pickled(pickled(message))

    def send_pickled(self, data: bytes) -> None:
        """`send` what `pickled` has made, which may go through several channels."""
        with self._sending:
            self._connection.send_bytes(data)

    def limit_sending(self, seconds: float) -> None:
        """How long `send` waits for the other end to take something. What was sent in part then is lost: end it."""
        whole, part = divmod(seconds, 1)
        limit = struct.pack("ll", int(whole), int(part * 1e6))
        with socket.socket(fileno=os.dup(self._connection.fileno())) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def receive(self) -> Any:
        """Wait for a message. Raises EOFError or OSError where the other end is gone."""
        return pickle.loads(self._connection.recv_bytes())

    def poll(self, seconds: float = 0.0) -> bool:
        """Whether `receive` would not wait, now or within that time; also where the other end is gone."""
        return self._connection.poll(seconds)

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()


def pickled(message: Any) -> bytes:
    """A message as it crosses."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


class Child:
    """A process that runs `target(channel)`.

    It ends when this process does, however that was; when this object is closed or forgotten; and when `target`
    returns, without Python's `atexit`, or raises, which prints a traceback. Ctrl-C does not reach it.

    Args:
        name: in messages, such as "replica 1".
        target: "package.module:function".
        environment: variables in which it differs from this process.

    Attributes:
        channel: to it.
    """

    def __init__(self, name: str, target: str, environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        ours, theirs = Pipe()
        self.channel = Channel(ours)
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        command = [sys.executable, "-P", "-m", __name__, target, str(theirs.fileno()), str(os.getpid())]
        # Blocked signals stay blocked in the child, until it ignores this one.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": paths} | (environment or {}),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()
        self._forgotten = weakref.finalize(self, _end, self._process, self.channel, os.getpid())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        return self._process.poll()

    def death(self) -> str:
        """One line that names it and says how it ended, for when its channel is found closed."""
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return f"{self.name} does not answer any more"
        return f"{self.name} died ({f'signal {-code}' if code < 0 else f'exit code {code}'})"

    def close(self, grace: float = GRACE) -> None:
        """Close its channel, upon which it should end, and kill it where it has not after `grace` seconds."""
        self.channel.close()
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._forgotten()


def close_all(children: list[Child], grace: float = GRACE) -> None:
    """`close` them beside each other, in `grace` seconds in all."""
    for child in children:
        child.channel.close()
    end = time.monotonic() + grace
    for child in children:
        child.close(max(end - time.monotonic(), 0))


def _end(process: subprocess.Popen[bytes], channel: Channel, owner: int) -> None:
    if os.getpid() != owner:  # a fork of ours: the child is none of its own
        return
    channel.close()
    process.kill()
    process.wait()


# Errors and lines of the log that cross


class Failure(NamedTuple):
    """An error on its way: of the same type and text where it can be pickled, and its traceback.

    Attributes:
        time: at which it was caught, by the host's one monotonic clock.
    """

    error: BaseException
    traceback: str
    time: float


class ChildTraceback(Exception):
    """The traceback of an error that was raised in a child, as that error's cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def packed(error: BaseException) -> Failure:
    """An error as a message, for `unpacked`."""
    now = time.monotonic()
    text = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
        if (type(copy), str(copy)) != (type(error), str(error)):
            raise ValueError("it is another after pickling")
    except Exception:
        error = RuntimeError("".join(traceback.format_exception_only(error)).strip())
    return Failure(error, text, now)


def unpacked(failure: Failure) -> BaseException:
    """The error, to be raised here."""
    failure.error.__cause__ = ChildTraceback(failure.traceback)
    return failure.error


class Log(NamedTuple):
    """A record of a log.

    Attributes:
        traceback: of the error that it tells of.
        in_output: as in the record: an output repeats it.
    """

    logger: str
    level: int
    text: str
    traceback: str | None
    in_output: bool

    def repeat(self, name: str) -> None:
        """Log it here, as one of the child of that name."""
        error = None if self.traceback is None else ChildTraceback(self.traceback)
        extra = {"in_output": True} if self.in_output else None
        logging.getLogger(self.logger).log(self.level, "%s: %s", name, self.text, exc_info=error, extra=extra)


def send_logs(logger: str, level: int, send: Callable[[Log], None]) -> None:
    """In a child: records of a logger and those below it become messages instead of lines on its stderr."""
    log = logging.getLogger(logger)
    log.setLevel(level)
    log.propagate = False
    log.addHandler(_Sender(send))


class _Sender(logging.Handler):
    def __init__(self, send: Callable[[Log], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info and "".join(traceback.format_exception(*record.exc_info))
        log = Log(record.name, record.levelno, record.getMessage(), error or None, getattr(record, "in_output", False))
        with suppress(OSError):  # the other end is gone
            self._send(log)


# In the child


def _run(target: str, descriptor: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with, args=[parent], name="parent", daemon=True).start()
    module, _, function = target.partition(":")
    run: Callable[[Channel], None] = getattr(import_module(module), function)
    run(Channel(Connection(descriptor)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Python's own end takes most of a second where torch was loaded


def _end_with(parent: int) -> None:
    """End this process, in the middle of whatever it does, when its parent has ended.

    The kernel's own signal for this (PR_SET_PDEATHSIG) comes when the *thread* that made the child ends.
    """
    while os.getppid() == parent:
        time.sleep(POLL)
    os._exit(1)


if __name__ == "__main__":
    _run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
