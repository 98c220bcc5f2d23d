"""The two ways a command ends early. The text of each is one line for the person at the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """What was asked can't be done as asked; the line names the option and the remedy. Exit code 2."""


class RunError(Exception):
    """The run began and failed. Exit code 1."""


class LateInterrupt(KeyboardInterrupt):
    """Ctrl-C after the run's record was written, or where it was there already."""


@contextmanager
def after_record() -> Iterator[None]:
    """Around what follows a record. Raises LateInterrupt for a KeyboardInterrupt."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise LateInterrupt from interrupt


def one_line(error: BaseException) -> str:
    """The type and text of any exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
