"""Start a server of the OpenAI interface, ours or vLLM's, and stop it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.backends.vllm import ENVIRONMENT, checked_options
from experiments.errors import RunError
from experiments.running.child import COLOURS, Alone, reason_of, stop
from experiments.serving.scrape import get
from zipage import EngineConfig

GUARD = (sys.executable, "-m", "experiments.serving.guard")
HOST = "127.0.0.1"
NAME = "bench"
"""By which requests call the model."""
OUR_FLAGS = {"access_log": False, "shutdown_grace": 1}
VLLM_FLAGS = {"disable_uvicorn_access_log": True, "uvicorn_log_level": "warning"}
OFF_IN_VLLM = ("skip_tokenizer_init", "enforce_eager")
"""Switches of vLLM's that are off unless they are named."""
LAST_LINES = 5


def command(
    backend: str, options: Mapping[str, Any], port: int, flags: Mapping[str, Any] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command line of a server, and variables of its environment.

    Args:
        backend: "zipage", "vllm" or "vllm_matched".
        options: of `EngineConfig`.
        flags: of the server's own, which win: {"max_queue": 2000}.

    Raises:
        ValueError: an option can't be honoured by that server.
    """
    own = {"host": HOST, "port": port, "served_model_name": NAME}
    if backend == "zipage":
        config = EngineConfig.from_kwargs(**options)
        given = {name: getattr(config, name) for name in options if name != "model"}
        return [
            sys.executable,
            "-m",
            "zipage.serve",
            config.model,
            *_flags(given | own | OUR_FLAGS | (flags or {})),
        ], {}
    keywords = checked_options(EngineConfig.from_kwargs(**options), matched=backend == "vllm_matched")
    keywords = {name: value for name, value in keywords.items() if not (name in OFF_IN_VLLM and value is False)}
    environment = ENVIRONMENT | ({"HF_HUB_OFFLINE": "1"} if Path(keywords["model"]).exists() else {})
    words = _flags(keywords | own | VLLM_FLAGS | (flags or {}))
    unset = {name: value for name, value in environment.items() if name not in os.environ}
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words], unset


def _flags(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, Mapping):
            words += [flag, json.dumps(dict(value))] if value else []
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)] if value else []
        elif value is not None:
            words += [flag, str(value)]
    return words


class RunningServer:
    """A server in a process group of its own, which ends with this process, however that does.

    Args:
        words: its command line.
        port: on which it will listen.

    Attributes:
        startup: seconds from the start until it was ready.
    """

    def __init__(self, words: Sequence[str], port: int, environment: Mapping[str, str] | None = None) -> None:
        self.port = port
        self.startup = 0.0
        self._alone = Alone([*GUARD, *words], environment)

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the guard, whose children are the server's processes."""
        return self._alone.process.pid

    def wait_until_ready(self, seconds: float) -> None:
        """Until /health answers 200.

        Raises:
            RunError: the server has ended, or is not ready after so many seconds; with the last lines of its log.
        """
        begin = time.monotonic()
        while True:
            self.check()
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                if asyncio.run(get(HOST, self.port, "/health", 5.0))[0] == 200:
                    self.startup = time.monotonic() - begin
                    return
            if time.monotonic() - begin > seconds:
                raise RunError(f"the server is not ready after {seconds:g} s{self.last_lines()}")
            time.sleep(0.1)

    def check(self) -> None:
        """Raise a RunError where the server has ended, with the last lines of its log."""
        ended = self._alone.poll()
        if ended is not None:
            code, output = ended
            if 128 < code < 128 + signal.NSIG:  # as the guard tells which signal killed the server
                code = 128 - code
            raise RunError(f"the server ended ({reason_of(code or 1, output)}){self.last_lines()}")

    def last_lines(self, count: int = LAST_LINES) -> str:
        """The end of its log, in one line."""
        text = self._alone.tail(2**16)
        lines = [line.strip() for line in COLOURS.sub("", text).splitlines() if line.strip()][-count:]
        return "; its last lines: " + " | ".join(re.sub(r"\s+", " ", line)[:200] for line in lines) if lines else ""

    def stop(self) -> None:
        """End it, and whatever it has started."""
        process = self._alone.process
        if process.poll() is None:
            stop([process])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._alone.close()


def free_port() -> int:
    with socket.create_server((HOST, 0)) as sock:
        return sock.getsockname()[1]
