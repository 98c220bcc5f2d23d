"""Replicas behind a router, each a simulated engine with a clock of its own.

The router sees every request a constant after it is due (HTTP and tokenizing), and every replica as it was then:
replicas are stepped up to that time, the last one first. Times are kept as counts in bins of 1 %, so that memory does
not grow with traffic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from experiments.bench.serve_loads import ServedArm
from experiments.errors import UsageError
from experiments.running.traces import BLOCK
from experiments.serving.prompts import Asked
from experiments.simulation.arms import started, times_of
from experiments.simulation.machine import Machine
from experiments.simulation.routers import find_router
from zipage import RequestOutput, SamplingParams, SimulatedLLM, StepTokens

SHORTEST, BIN = 1e-5, math.log(1.01)
"""Seconds of the first bin, and the logarithm of a bin's width."""
BINS = 2048
KEPT = 65_536
"""Values that wait to be counted."""
VOCABULARY = 100_000
"""Tokens that prompts are made of."""
COUNTERS = {"preemptions": "preemptions", "pauses": "pauses", "compressions": "compressions_applied"}


class Tails:
    """Quantiles of any number of times, to 1 %."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, dtype=np.int64)
        self._fresh: list[tuple[float, int]] = []

    def add(self, values: Iterable[tuple[float, int]]) -> None:
        """Times, and how many there are of each."""
        self._fresh += values
        if len(self._fresh) >= KEPT:
            self._count()

    def _count(self) -> None:
        times, counts = np.array(self._fresh or [(SHORTEST, 0)]).T
        bins = np.log(np.maximum(times, SHORTEST) / SHORTEST) / BIN
        counts = np.bincount(np.minimum(bins.astype(np.int64), BINS - 1), counts, BINS)
        self._counts += counts.astype(np.int64)
        self._fresh = []

    def quantiles(self) -> dict[str, float] | None:
        self._count()
        total = self._counts.sum()
        if not total:
            return None
        upto = np.cumsum(self._counts)
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
        bins = {name: int(np.searchsorted(upto, math.ceil(share * total))) for name, share in shares.items()}
        return {name: SHORTEST * math.exp((place + 0.5) * BIN) for name, place in bins.items()}


class Replica:
    """One engine of a fleet.

    Attributes:
        left: as of `routers.Loaded`.
        due: of each request that waits for its first token, in the order in which they came.
    """

    def __init__(self, llm: SimulatedLLM, tails: dict[str, Tails], begin: float, end: float) -> None:
        self.llm, self.clock = llm, llm.clock
        self.left = self.sent = self.measured = self.open = self.finished = self.failed = self.tokens = 0
        self.due: dict[str, float] = {}
        self._heard = 0.0
        self._asked: dict[str, Asked] = {}
        self._tails, self._begin, self._end = tails, begin, end
        llm.tokens_listeners.append(self._hear)

    def _is_measured(self, due: float) -> bool:
        return self._begin <= due < self._end

    def send(self, request: Asked, prompt: list[int], now: float) -> None:
        name = str(self.sent)
        self.sent += 1
        self.clock.wait_until(now)
        measured = self._is_measured(request.due)
        self.measured += measured
        try:
            self.llm.add_request(prompt, _sampled(request.output_tokens), name)
        except ValueError:
            self.failed += measured
            return
        self.open += measured
        self.left += request.prompt_tokens + request.output_tokens
        self.due[name] = request.due
        self._asked[name] = request

    def _hear(self, tokens: StepTokens) -> None:
        now = self._heard = tokens.time
        self.left -= tokens.count
        if self._begin <= now < self._end:
            self.tokens += tokens.count
            self._tails["itl"].add(tokens.gaps)
        for name in tokens.firsts:
            due, request = self.due.pop(name), self._asked[name]
            self.left -= request.prompt_tokens
            if self._is_measured(due):
                self._tails["ttft"].add([(now - due, 1)])

    def step(self) -> None:
        for output in self.llm.step():
            self._end_of(output)

    def _end_of(self, output: RequestOutput) -> None:
        name = output.request_id
        request = self._asked.pop(name)
        has_token = self.due.pop(name, None) is None
        if not self._is_measured(request.due):
            return
        self.open -= 1
        if output.error is not None or not has_token:
            self.failed += 1
            return
        self.finished += 1
        self._tails["e2e"].add([(self._heard - request.due, 1)])
        if output.metrics.tpot is not None:
            self._tails["tpot"].add([(output.metrics.tpot, 1)])

    def waited(self) -> float:
        """Seconds that the first request without a token has waited."""
        return self.clock() - next(iter(self.due.values())) if self.due else 0.0

    def give_up(self) -> None:
        """The requests that have no token yet have waited until now at least, and count as that."""
        now = self.clock()
        waits = [(now - due, 1) for due in self.due.values() if self._is_measured(due)]
        self._tails["ttft"].add(waits)


def simulate_fleet(arm: ServedArm, machine: Machine, replicas: int, router: str, rate: float) -> dict[str, Any]:
    """A load's requests at a rate, on so many replicas of an arm's engine.

    Raises:
        UsageError: there is no such router, or no replica.
        ValueError: the engine can't be started so.
    """
    if replicas < 1:
        raise UsageError(f"--replicas {replicas}: must be at least 1")
    spec, route = arm.spec, find_router(router)
    begin, close = spec.warmup, spec.warmup + spec.seconds
    tails = {name: Tails() for name in ("ttft", "itl", "tpot", "e2e")}
    times = times_of(arm.options, machine)
    fleet = [Replica(started(arm.options, times), tails, begin, close) for _ in range(replicas)]
    busy: list[tuple[float, int]] = []
    is_busy = [False] * replicas
    broken = False

    def advance(until: float) -> None:
        nonlocal broken
        while busy and busy[0][0] < until and not broken:
            _, number = heappop(busy)
            replica = fleet[number]
            replica.step()
            broken = replica.waited() > spec.patience
            is_busy[number] = replica.llm.has_unfinished_requests()
            if is_busy[number]:
                heappush(busy, (replica.clock(), number))

    try:
        for place, request in enumerate(arm.coming(rate)):
            now = request.due + machine.request_seconds
            advance(now)
            if broken or (request.due >= close and not any(replica.open for replica in fleet)):
                break
            number = route(request, fleet)
            fleet[number].send(request, _prompt(arm, request, place), now)
            if not is_busy[number]:
                is_busy[number] = True
                busy.append((fleet[number].clock(), number))
                heapify(busy)
        advance(close + spec.drain)
        for replica in fleet:
            replica.give_up()
        stats = [replica.llm.stats for replica in fleet]
    finally:
        for replica in fleet:
            replica.llm.shutdown()
    seconds = max(1e-9, min(spec.seconds, max(replica.clock() for replica in fleet) - begin))
    row = {name: tail.quantiles() for name, tail in tails.items()}
    holds = not broken and all(row[name] is not None and row[name]["p99"] <= limit for name, limit in spec.slo.items())
    row |= {name: sum(getattr(stat, counter) for stat in stats) for name, counter in COUNTERS.items()}
    row |= {name: sum(getattr(r, name) for r in fleet) for name in ("sent", "measured", "finished", "failed")}
    return row | {
        "load": arm.load, "arm": arm.name, "policy": arm.options.get("policy", "full"),
        "budget_tokens": arm.options.get("budget_tokens"), "replicas": replicas, "gpus": replicas * arm.gpus,
        "router": router, "rate": rate, "broken": broken, "slo_holds": holds and not row["failed"],
        "tokens_per_second": sum(replica.tokens for replica in fleet) / seconds, "simulated": machine.name,
    }  # fmt: skip


@lru_cache(maxsize=16_384)
def _sampled(max_tokens: int) -> SamplingParams:
    """One for each length: to check its fields takes longer than many tokens."""
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def _prompt(arm: ServedArm, request: Asked, number: int) -> list[int]:
    """Equal blocks of a trace are equal tokens; beyond them no two prompts are alike, where that makes a difference."""
    if not arm.options.get("enable_prefix_caching", True):
        return [0] * request.prompt_tokens
    shared = [block % VOCABULARY for block in request.blocks for _ in range(BLOCK)][: request.prompt_tokens]
    return shared + [number % VOCABULARY] * (request.prompt_tokens - len(shared))
