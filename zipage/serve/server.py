"""The server's life: it loads, listens, answers, and ends in order."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from zipage.config import EngineConfig
from zipage.engine.startup import Engine as Parts
from zipage.engine.startup import start
from zipage.llm import LLM
from zipage.models.loading.loader import resolve_device
from zipage.serve.app import create_app
from zipage.serve.config import ServeConfig
from zipage.serve.engine import Engine
from zipage.serve.gate import Gate

logger = logging.getLogger(__name__)

SWITCH = 0.001
"""Seconds after which a thread must let another one run: Python's 5 ms are a good part of a step."""
INTERRUPTED = 130
"""The exit status of programs that Ctrl-C ends."""
OPEN_FILES = 65_536
"""Connections, a file each, that may be open at once where the system allows it."""
LAST_WORDS = 2.0
"""Seconds to send the last chunks of what was aborted."""


class Server(uvicorn.Server):
    """Uvicorn's, but that after a signal it refuses new requests with 503, and ends when those that run are answered
    or the grace is over; a second signal ends it at once.
    """

    def __init__(self, gate: Gate, engine: Engine, config: ServeConfig) -> None:
        options = uvicorn.Config(
            gate,
            host=config.host,
            port=config.port,
            log_config=None,
            access_log=config.access_log,
            timeout_graceful_shutdown=LAST_WORDS,
        )
        super().__init__(options)
        self._gate = gate
        self._engine = engine
        self._grace = config.shutdown_grace
        self._draining: asyncio.Task | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._running_loop = asyncio.get_running_loop()
        self._engine.has_failed = self.drain  # the open requests get their error first

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called between two bytecodes of the main thread."""
        if not self.started or self._gate.is_closing:
            self.should_exit = self.force_exit = True
            return
        logger.info("%s: no new requests, %g s for those that run", signal.Signals(sig).name, self._grace)
        self._gate.is_closing = True
        self._running_loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Begin to end, in the event loop."""
        self._gate.is_closing = True
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        end = time.monotonic() + self._grace
        while self._gate.num_inside and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self._gate.num_inside:
            logger.warning("%d requests are aborted", self._gate.num_inside)
            self._engine.abort_all()
            end = time.monotonic() + LAST_WORDS
            while self._gate.num_inside and time.monotonic() < end:
                await asyncio.sleep(0.02)
        self.should_exit = True


def run(engine_config: EngineConfig, config: ServeConfig) -> int:
    """Serve until a signal, or the engine's failure.

    Returns:
        The exit status: 0 after a signal, 1 where something failed, 130 where Ctrl-C came while the model was loaded.
    """
    try:
        sock = _bind(config)  # before the model is loaded, which takes long
    except OSError as error:
        logger.error("host=%s port=%d: %s", config.host, config.port, error)
        return 1
    _allow_connections()
    sys.setswitchinterval(SWITCH)
    options = {name: getattr(engine_config, name) for name in engine_config.__dataclass_fields__}
    engine = Engine(lambda: _make(options, config.engine_process))
    try:
        engine.start()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        logger.error("the engine cannot start: %s", error)
        return 1
    try:
        try:
            server = Server(create_app(engine, config), engine, config)
        except ValueError as error:
            logger.error("%s", error)
            return 1
        logger.info("%s on http://%s:%d", engine_config.model, config.host, sock.getsockname()[1])
        server.run(sockets=[sock])
    finally:
        engine.stop()
    return 1 if engine.failure is not None else 0


class LLMApart(LLM):
    """`LLM` with its core in a process of its own: what this process does for the streams holds up no step."""

    def _start(self) -> Parts:
        return start(self.config, apart=True)


def _make(options: Mapping[str, Any], apart: bool | None) -> LLM:
    apart = resolve_device(options["device"]).type == "cuda" if apart is None else apart
    return (LLMApart if apart else LLM)(**options)


def _allow_connections() -> None:
    """Raise the soft limit of open files: the usual 1,024 are fewer than the streams that may run and wait."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _bind(config: ServeConfig) -> socket.socket:
    """A socket that does not listen yet."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    return sock
