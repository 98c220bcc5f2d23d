"""What the children of tests/test_processes.py run, and whether children live."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from zipage.processes import Channel, Child, packed, send_logs


def echo(channel: Channel) -> None:
    """Answer until the channel is closed."""
    while True:
        try:
            message = channel.receive()
        except EOFError:
            return
        if message == "environment":
            message = os.environ.get("ZIPAGE_TEST"), sys.path
        channel.send(message)


def sleep(channel: Channel) -> None:
    """Hear nothing."""
    channel.send(os.getpid())
    time.sleep(60)


def fail(channel: Channel) -> None:
    errors = [FileNotFoundError(2, "no such thing", "here"), ValueError("bad"), _Odd(1, 2)]
    for error in errors:
        channel.send(packed(error))
    raise SystemExit(3)


def log(channel: Channel) -> None:
    send_logs("some", logging.INFO, channel.send)
    logging.getLogger("some.part").info("one %d", 1)
    logging.getLogger("some.part").debug("two")
    logging.getLogger("other").error("three")
    try:
        raise ArithmeticError
    except ArithmeticError:
        logging.getLogger("some").exception("bad", extra={"in_output": True})
    channel.send("that is all")


def fail_after(channel: Channel) -> None:
    """As a rank that is started with a `delay`, in seconds."""
    seconds = channel.receive().delay
    time.sleep(seconds)
    try:
        raise ArithmeticError(f"after {seconds} seconds")
    except ArithmeticError as error:
        channel.send(packed(error))


def answer_after(channel: Channel) -> None:
    """The same."""
    time.sleep(channel.receive().delay)
    channel.send("ready")
    read(channel)


def read(channel: Channel) -> None:
    """Say nothing."""
    with suppress(EOFError):
        while True:
            channel.receive()


def with_grandchild(channel: Channel) -> None:
    child = Child("grandchild", "tests.child_processes:sleep")
    channel.send([os.getpid(), child.channel.receive()])
    time.sleep(60)


class _Odd(Exception):
    """Can't be pickled."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"odd {a} {b}")


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for_end(pids: list[int], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < end, f"of {pids} these live: {[pid for pid in pids if is_alive(pid)]}"
        time.sleep(0.05)
