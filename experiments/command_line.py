"""What the commands share: an error of usage is one line that names the flag that was meant, and how they stop."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from zipage import closest

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C, SIGTERM or a closed terminal ended."""

Command = Callable[[Sequence[str] | None], int]


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, which names the flag that was meant. They exit with code 2."""

    def __init__(self, **options: Any) -> None:
        self._flags: list[str] = []
        super().__init__(**options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        self._flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        # First, since argparse would rather complain of what a misspelt flag leaves missing.
        for flag in given_flags(sys.argv[1:] if args is None else args):
            if not any(known.startswith(flag) for known in self._flags):
                self.error(unknown_flag(flag, self._flags))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}" + ("" if "; " in message else "; --help shows how"), file=sys.stderr)
        sys.exit(2)


def given_flags(arguments: Iterable[str]) -> Iterator[str]:
    """The long flags among arguments, without their values."""
    for argument in arguments:
        if argument == "--":
            return
        if argument.startswith("--") and " " not in argument:
            yield argument.partition("=")[0]


def unknown_flag(flag: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """One line that names the known flag of which this one may be a slip of the pen.

    Args:
        otherwise: what to say where there is none; None: all that are known.
    """
    names = {name.lstrip("-"): name for name in known}
    close = closest(flag.lstrip("-").replace("_", "-"), names)
    hint = f"did you mean {names[close]}?" if close else otherwise or f"there are {', '.join(names.values())}"
    return f"{flag}: unknown flag; {hint}"


def stoppable(main: Command) -> Command:
    """Decorator of a command: Ctrl-C ends it with a line, a reader that has left (`| head`) in silence."""

    @functools.wraps(main)
    def stopped(arguments: Sequence[str] | None = None) -> int:
        try:
            code = main(arguments)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
            return 1
        except KeyboardInterrupt as interrupt:
            print(f"error: interrupted{': ' * bool(str(interrupt))}{interrupt}", file=sys.stderr)
            return INTERRUPTED

    return stopped


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """A request to end, or a closed terminal, stops a command like Ctrl-C: with a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:  # under nohup, SIGHUP is ignored
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
