"""A replica's side: an engine core that steps by itself, and takes messages in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from zipage.engine.core import EngineCore
from zipage.engine.interface import TokenDelta
from zipage.engine.prompt_order import PromptOrder
from zipage.engine.replica_messages import Abort, Logits, Look, ReadEntries, Reply, Report, Start, Stop
from zipage.engine.rules import Rules
from zipage.engine.startup import build_core
from zipage.processes import Channel, packed
from zipage.stats import EventStats, RequestMetrics, StepStats

REPORT_EVERY = 0.1
"""Seconds between reports of steps that gave no deltas."""
LINGER = 0.002
"""Seconds to wait for more after an abort: many come one after the other, each after the answer to the one before."""


def run(channel: Channel) -> None:
    """Serve until the channel is closed, or the core fails."""
    core = None
    try:
        start: Start = channel.receive()
        start.inherited.take_over(channel.send)
        core, spec = build_core(start.config)
        channel.send(spec)
        Replica(channel, core, Rules(start.config)).serve()
    except BaseException as error:
        with suppress(OSError):  # the other side is gone
            channel.send(packed(error))
    finally:
        if core is not None:
            core.shut_down()


class Replica:
    """Runs a core and tells of it.

    Args:
        rules: the same that the other side has, from which the requests' limits come.
    """

    def __init__(self, channel: Channel, core: EngineCore, rules: Rules) -> None:
        self._channel = channel
        self._core = core
        self._rules = rules
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        """Messages; None when the channel is closed."""
        self._steps: list[StepStats] = []
        self._events: list[EventStats] = []
        self._reported = 0.0
        core.listeners.steps.append(self._steps.append)
        core.listeners.events.append(self._events.append)

    def serve(self) -> None:
        """Until the channel is closed."""
        # Messages are read at once, so that neither side ever waits for the other to read while that one waits too.
        threading.Thread(target=self._read, name="inbox", daemon=True).start()
        while True:
            for message in self._messages():
                if message is None:
                    return
                self._handle(message)
            if self._core.has_unfinished:
                with self._core.whole():
                    deltas = self._core.step()
                self._report(deltas)

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._inbox.put(self._channel.receive())
        self._inbox.put(None)

    def _messages(self) -> Iterator[Any]:
        """Those that are there; with nothing to compute, wait for one."""
        if not self._core.has_unfinished:
            if self._steps or self._events:
                self._report(must=True)
            yield self._inbox.get()
        linger = 0.0
        while True:
            try:
                message = self._inbox.get(timeout=linger) if linger else self._inbox.get_nowait()
            except Empty:
                return
            linger = LINGER if isinstance(message, Abort) else 0.0
            yield message

    def _handle(self, message: PromptOrder | Abort | Stop | Look | ReadEntries | Logits) -> None:
        core, reply = self._core, Reply(None)
        if isinstance(message, PromptOrder):
            self._add(message)
            return
        if isinstance(message, Logits):
            try:
                reply = Reply(core.logits(message.hidden).cpu())
            except ValueError as error:
                reply = Reply(None, error)
        elif isinstance(message, Look):
            reply = Reply(core.snapshot())
        elif isinstance(message, ReadEntries):
            with core.whole():
                reply = Reply(core.held_entries(message.request_id, message.index))
        elif core.is_unfinished(message.request_id):
            with core.whole():
                if isinstance(message, Abort):
                    self._report(core.abort(message.request_id), must=True)
                elif core.is_unfinished(message.request_id, message.index):
                    reply = Reply(core.stop(message.request_id, message.index))
                    self._report(must=True)
        self._channel.send(reply)

    def _add(self, order: PromptOrder) -> None:
        try:
            rule = self._rules.of(order.params, len(order.token_ids))
        except ValueError as error:  # a policy that this process does not know
            metrics = RequestMetrics(arrival=order.arrival, prompt_tokens=len(order.token_ids))
            logprobs = None if order.params.logprobs is None else []
            known = "replicas know what importable modules had registered when they started"
            last = "error", None, f"{error} ({known})", metrics
            self._report([TokenDelta(order.request_id, index, [], logprobs, *last) for index in range(order.params.n)])
            return
        self._core.add(order.samples(rule))

    def _report(self, deltas: list[TokenDelta] | None = None, must: bool = False) -> None:
        """Send what there is, if there are deltas or it is time."""
        self._core.listeners.deliver()
        now = time.perf_counter()
        if deltas or must or now - self._reported >= REPORT_EVERY:
            self._channel.send(Report(deltas or [], self._steps, self._events, self._core.stats()))
            self._reported = now
            self._steps.clear()
            self._events.clear()
