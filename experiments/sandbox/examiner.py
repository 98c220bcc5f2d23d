"""Runs a test program in a sandbox of its own; what it tests answers from another, through a socket (stdin).

The model's program can't see the tests, and all it can do to pass them is to return the right values in time. Exit code
0 means that `check` returned, `NOT_PLAIN` that test and program would have to exchange what can't be sent.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import socket
import sys
from typing import Any

sys.path.insert(0, "/box")
from plain import NotPlain, encode, put_back, receive, send

NOT_PLAIN = 3


def main() -> None:
    channel = socket.socket(fileno=os.dup(0)).makefile("rwb")
    with open("/box/exam.json", encoding="utf-8") as file:
        exam = json.load(file)
    sys.path[0] = "/box/site"
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))  # no exception: the test might catch it

    def candidate(*arguments: Any, **options: Any) -> Any:
        signal.setitimer(signal.ITIMER_REAL, exam["seconds"])
        try:
            send(channel, encode((arguments, options)))
        except NotPlain:
            os._exit(NOT_PLAIN)
        returned, value, arguments_after = receive(channel)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if returned is None:
            os._exit(NOT_PLAIN)
        for mine, theirs in zip(arguments, arguments_after):
            put_back(mine, theirs)
        if returned is True:
            return value
        raise exception(value)

    namespace: dict[str, Any] = {"__name__": "examiner"}
    for source in (exam["setup"], exam["test"]):
        exec(compile(source, "test.py", "exec", dont_inherit=True), namespace)
        namespace[exam["entry_point"]] = candidate
    namespace["check"](candidate)


def exception(name: Any) -> Exception:
    """One of that name, where it is a built-in one; but none that would end a loop over calls as if all were done."""
    kind = getattr(builtins, str(name), None)
    known = isinstance(kind, type) and issubclass(kind, Exception) and kind not in (StopIteration, StopAsyncIteration)
    return kind() if known else RuntimeError(name)


if __name__ == "__main__":
    main()
