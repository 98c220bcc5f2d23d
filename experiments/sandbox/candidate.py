"""Holds a model's program in the sandbox and answers calls of one function; stdin is a socket to the examiner."""

from __future__ import annotations

import json
import os
import socket
import sys
import types

sys.path.insert(0, "/box")
from plain import NotPlain, encode, receive, send
from program import run


def main() -> None:
    channel = socket.socket(fileno=os.dup(0)).makefile("rwb")
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    with open("/box/exam.json", encoding="utf-8") as file:
        name = json.load(file)["entry_point"]
    del sys.path[0]
    module = types.ModuleType("candidate")
    run(module)
    solution = getattr(module, "Solution", None)
    owner = solution() if hasattr(solution, name) else module
    function = getattr(owner, name)
    while True:
        arguments, options = receive(channel)
        try:
            reply = encode((True, function(*arguments, **options), arguments))
        except NotPlain as error:
            reply = (None, str(error), ())
        except Exception as error:
            reply = encode((False, type(error).__name__, arguments))
        send(channel, reply)


if __name__ == "__main__":
    main()
