"""Arms of `scenario=serve_bench`, simulated: an open loop of requests, timed token by token.

A request reaches the engine a constant after it is due, which stands for HTTP, tokenizing and the process in between.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.bench.rates import next_rate
from experiments.bench.serve_loads import ServedArm
from experiments.serving.figures import figures
from experiments.serving.prompts import Asked
from experiments.simulation.arms import started, times_of
from experiments.simulation.machine import Machine
from zipage import SamplingParams, SimulatedLLM, StepStats

TICK = 0.05
"""Seconds between two looks at whether a rate is broken, as the client has it."""
COUNTERS = {"preemptions": "preemptions", "pauses": "pauses", "compressions": "compressions_applied"}


@dataclass(slots=True, eq=False)
class SimulatedStream:
    """A request as its client sees it; the attributes are those of `experiments.serving.stream.Stream`."""

    due: float
    asked: int
    sent: float | None = None
    first: float | None = None
    last: float | None = None
    end: float | None = None
    gaps: array = field(default_factory=lambda: array("d"))
    tokens: int = 0
    outcome: str | None = None
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.due

    @property
    def tpot(self) -> float | None:
        return (self.last - self.first) / (self.tokens - 1) if self.first is not None and self.tokens > 1 else None

    @property
    def e2e(self) -> float | None:
        return None if self.last is None else self.last - self.due

    def heard(self, now: float) -> None:
        """A token came."""
        if self.last is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now
        self.tokens += 1

    def ended(self, outcome: str, now: float, error: str | None = None) -> None:
        self.outcome, self.end, self.error = outcome, now, error


class _Server:
    """An engine with streams, and its gauges in a window of time."""

    def __init__(self, llm: SimulatedLLM) -> None:
        self.llm = llm
        self.clock = llm.clock
        self.started: list[SimulatedStream] = []
        self.open: dict[str, SimulatedStream] = {}
        self.steps: list[StepStats] = []
        self.heard: list[tuple[float, int]] = []
        """Times of steps and the tokens that came of each."""
        self._number = 0
        llm.step_listeners.append(self.steps.append)
        llm.token_listeners.append(self._hear)

    def send(self, request: Asked, due: float) -> None:
        stream = SimulatedStream(due, request.output_tokens, sent=self.clock())
        self.started.append(stream)
        name = f"request-{self._number}"
        self._number += 1
        params = SamplingParams(max_tokens=request.output_tokens, ignore_eos=True, temperature=0.6)
        try:
            self.llm.add_request([0] * request.prompt_tokens, params, name)
        except ValueError as error:
            stream.ended("failed", self.clock(), str(error))
            return
        self.open[name] = stream

    def _hear(self, now: float, names: list[str]) -> None:
        for name in names:
            self.open[name].heard(now)
        self.heard.append((now, len(names)))

    def step(self) -> None:
        for output in self.llm.step():
            stream = self.open.pop(output.request_id)
            stream.ended("finished" if output.error is None else "failed", stream.last or self.clock(), output.error)

    def stop(self) -> None:
        """The clients go away."""
        now = self.clock()
        for name, stream in self.open.items():
            stream.ended("aborted", now)
            self.llm.abort(name)
        self.open.clear()


def simulate_rate(arm: ServedArm, machine: Machine, rate: float) -> dict[str, Any]:
    """A row of a load at a rate, as `scenario=serve_bench` would have it.

    Raises:
        ValueError: the engine can't be started so.
    """
    spec = arm.spec
    llm = started(arm.options, times_of(arm.options, machine))
    server = _Server(llm)
    try:
        stopped = _open_loop(server, deque(arm.arriving(rate)), arm, machine.request_seconds)
        begin, end = spec.warmup, min(spec.warmup + spec.seconds, llm.clock())
        streams = [stream for stream in server.started if begin <= stream.due < spec.warmup + spec.seconds]
        if stopped == "broken" and not streams:  # in the warm-up
            begin, streams = 0.0, server.started
        server.stop()
        stats = llm.stats
    finally:
        llm.shutdown()
    seconds = end - begin
    row = figures(streams, seconds, spec.slo) | _gauges(server.steps, begin, end)
    row |= {name: getattr(stats, counter) for name, counter in COUNTERS.items()}
    row["tokens_per_second"] = sum(count for now, count in server.heard if begin <= now < end) / seconds
    row |= {"seconds": seconds, "broken": stopped == "broken", "rate": rate, "simulated": machine.name}
    if stopped == "broken":
        row["slo_holds"] = False
    return row | {"load": arm.load, "arm": arm.name, "gpus": arm.gpus, "slo": spec.slo, "blocks": stats.blocks_total}


def _open_loop(server: _Server, waiting: deque[Asked], arm: ServedArm, delay: float) -> str:
    """Until the requests of the window are answered, the drain is over, or the rate is broken; which of the three.

    Args:
        delay: seconds from when a request is due until the engine has it.
    """
    spec, clock = arm.spec, server.clock
    close, looked = spec.warmup + spec.seconds, 0.0
    while True:
        now = clock()
        while waiting and waiting[0].due + delay <= now:
            request = waiting.popleft()
            server.send(request, request.due)
        if now - looked >= TICK:
            looked = now
            first = min((stream.due for stream in server.open.values() if stream.first is None), default=now)
            if now - first > spec.patience:
                return "broken"
            if now >= close + spec.drain:
                return "drained"
            measured = (stream.due for stream in server.open.values() if spec.warmup <= stream.due < close)
            if now >= close and not any(True for _ in measured):
                return "done"
        if server.llm.has_unfinished_requests():
            server.step()
        elif waiting:
            clock.wait_until(waiting[0].due + delay)
        else:
            return "done"


def _gauges(steps: Sequence[StepStats], begin: float, end: float) -> dict[str, float | None]:
    """Mean and most of who runs and who waits, weighted by the time of steps."""
    inside = [step for step in steps if begin <= step.time <= end]
    whole = sum(step.step_time for step in inside)
    found: dict[str, float | None] = {}
    for name in ("running", "waiting"):
        values = [getattr(step, f"num_{name}") for step in inside]
        mean = sum(step.step_time * value for step, value in zip(inside, values)) / whole if whole else None
        found |= {name: mean, f"most_{name}": max(values, default=None)}
    return found


def simulated_rows(arm: ServedArm, machine: Machine) -> Iterator[dict[str, Any]]:
    """A row for each rate of a load, and for each that its search asks for."""
    measured: dict[float, bool] = {}
    for rate in map(float, arm.spec.rates):
        if rate not in measured:
            row = simulate_rate(arm, machine, rate)
            measured[rate] = row["slo_holds"]
            yield row
    if arm.spec.search is None:
        return
    low, high, steps = (arm.spec.search[name] for name in ("low", "high", "steps"))
    while (rate := next_rate(measured, float(low), float(high), int(steps))) is not None:
        if rate not in measured:
            row = simulate_rate(arm, machine, rate)
            measured[rate] = row["slo_holds"]
            yield row
