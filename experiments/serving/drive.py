"""`python -m experiments.serving.drive TASK.json RESULT.json`: put a load on a server, in a process of its own.

An **open** loop sends each request when it is due, whatever became of the others. Requests that are due in a window
after the warm-up are measured; others go on arriving until all of these are answered, so that the last of them are not
alone. A **closed** loop has so many streams at a time until all are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.running import lifeline
from experiments.serving.figures import figures, lateness
from experiments.serving.prompts import Asked, bodies
from experiments.serving.scrape import Poll, wait_until_idle
from experiments.serving.stream import Stream, clock

TICK = 0.05
LEAD = 0.2
"""Seconds before the first request is due."""
IDLE = 30.0
"""Seconds that a server has to let go of what was aborted."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A load, as plain data.

    Attributes:
        port: of the server, on `host`.
        requests: in order of arrival.
        seed, vocab_size: of the prompts.
        common: fields of every body.
        slo: limits in seconds, as in `figures`.
        streams: of a closed loop: requests at a time; None: an open loop.
        warmup: seconds before the window, or for which a closed loop's figures leave nothing out.
        seconds: length of the window; of a closed loop, what it may take at most.
        drain: seconds after the window in which measured requests may end.
        patience: the load ends early, as too much for the server, when a request has waited so many seconds for its
            first token.
    """

    port: int
    requests: Sequence[Asked]
    seed: str
    vocab_size: int
    common: dict[str, Any]
    slo: dict[str, float] = field(default_factory=dict)
    host: str = "127.0.0.1"
    streams: int | None = None
    warmup: float = 0.0
    seconds: float = 60.0
    drain: float = 30.0
    patience: float = 10.0

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Task:
        return cls(**plain | {"requests": [Asked(*request) for request in plain["requests"]]})


class _Load:
    """The streams of a task, those that run among them, and the tokens that came in the window."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.started: list[Stream] = []
        self.open: set[Stream] = set()
        self.lags: list[float] = []
        self.window_tokens = 0
        self.begin, self.end = 0.0, float("inf")
        self.ended: Callable[[Stream], None] = lambda stream: None
        self._tasks: set[asyncio.Task] = set()
        self._bodies = list(
            bodies(task.requests, seed=task.seed, vocab_size=task.vocab_size, common=task.common)
        )  # before the start: to draw a long prompt takes milliseconds

    def start(self, number: int, due: float) -> None:
        stream = Stream(self._bodies[number], due, self.task.requests[number].output_tokens, self._heard, self._ended)
        self._bodies[number] = b""
        self.started.append(stream)
        self.open.add(stream)
        self.beside(stream.connect(self.task.host, self.task.port))

    def beside(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def stop(self) -> None:
        """Abort what runs."""
        for stream in list(self.open):
            stream.abort()
        await asyncio.sleep(0)

    async def tick(self) -> None:
        before = clock()
        await asyncio.sleep(TICK)
        self.lags.append(clock() - before - TICK)

    def _heard(self, now: float, tokens: int) -> None:
        if self.begin <= now < self.end:
            self.window_tokens += tokens

    def _ended(self, stream: Stream) -> None:
        self.open.discard(stream)
        self.ended(stream)


async def drive(task: Task) -> dict[str, Any]:
    """Put the load on the server.

    Returns:
        Figures of the measured requests, the client's and the server's, as plain data.
    """
    load, poll = _Load(task), Poll(task.host, task.port)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection over the streams of a minute is a pause
    await poll.ask()
    polling = load.beside(poll.run())
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        row = await (_open_loop(load) if task.streams is None else _closed_loop(load))
    finally:
        gc.enable()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        polling.cancel()
    with contextlib.suppress(OSError, ValueError, TimeoutError):  # who started the server knows how it ended
        row["left"] = await wait_until_idle(task.host, task.port, IDLE)
        await poll.ask()
    return row | poll.figures(load.begin, load.end) | {"client_cpu": cpu / wall}


async def _open_loop(load: _Load) -> dict[str, Any]:
    task, loop = load.task, asyncio.get_running_loop()
    start = clock() + LEAD
    load.begin, load.end = start + task.warmup, start + task.warmup + task.seconds
    calls = [
        loop.call_at(start + request.due, load.start, number, start + request.due)
        for number, request in enumerate(task.requests)
    ]

    def measured() -> list[Stream]:
        return [stream for stream in load.started if load.begin <= stream.due < load.end]

    stopped = None
    while stopped is None:
        await load.tick()
        now = clock()
        waiting = min((stream.due for stream in load.open if stream.first is None), default=now)
        if now - waiting > task.patience:
            stopped = "broken"
        elif now >= load.end + task.drain:
            stopped = "drained"
        elif now >= load.end and not any(load.begin <= stream.due < load.end for stream in load.open):
            stopped = "done"
    for call in calls:
        call.cancel()
    load.end = min(load.end, clock())
    streams = measured()
    if stopped == "broken" and not streams:  # in the warm-up
        load.begin, streams = start, load.started
    await load.stop()
    seconds = load.end - load.begin
    return (
        figures(streams, seconds, task.slo)
        | lateness(load.started, load.lags)
        | _tokens(load, seconds)
        | {"seconds": seconds, "broken": stopped == "broken", "beside": len(load.started) - len(streams)}
        | ({"slo_holds": False} if stopped == "broken" else {})
    )


async def _closed_loop(load: _Load) -> dict[str, Any]:
    task, count = load.task, len(load.task.requests)

    def next_one(_: Stream | None = None) -> None:
        if len(load.started) < count and clock() < deadline:
            load.start(len(load.started), clock())

    start = load.begin = clock()
    deadline = start + task.seconds
    load.ended = next_one
    for _ in range(min(task.streams, count)):
        next_one()
    while load.open and clock() < deadline:
        await load.tick()
    await load.stop()
    ends = [stream.last for stream in load.started if stream.last is not None]
    load.end = max(ends, default=clock())
    seconds = load.end - start
    late = lateness([], load.lags)  # a closed loop has no due times to miss
    tokens = sum(stream.tokens for stream in load.started) / seconds if seconds else 0.0
    row = figures(load.started, seconds, task.slo) | late | {"seconds": seconds, "tokens_per_second": tokens}
    return row | {"broken": len(load.started) < count or row["aborted"] > 0}


def _tokens(load: _Load, seconds: float) -> dict[str, float]:
    """Tokens a second in the window, of whichever request. Where events brought several, the usage at the end says
    how many more there were.
    """
    done = [stream for stream in load.started if stream.outcome == "finished" and stream.events]
    counted = sum(stream.events for stream in done)
    share = sum(stream.tokens for stream in done) / counted if counted else 1.0
    return {"tokens_per_second": share * load.window_tokens / seconds if seconds else 0.0}


def main() -> int:
    lifeline.watch()
    source, target = map(Path, sys.argv[1:])
    task = Task.of(json.loads(source.read_text(encoding="utf-8")))
    try:
        row = asyncio.run(drive(task))
    except KeyboardInterrupt:
        return 130
    target.write_text(json.dumps(row, allow_nan=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
