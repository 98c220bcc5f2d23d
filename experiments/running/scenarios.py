"""When requests arrive, and the loop that serves them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from tqdm import tqdm

from experiments.backends import Backend
from experiments.config.schema import ScenarioConfig
from experiments.errors import UsageError
from experiments.running.traces import read_trace
from zipage import RequestMetrics, RequestOutput, SamplingParams


class HostClock:
    """The host's clock, as `SimulatedLLM.clock` is another."""

    __call__ = staticmethod(time.perf_counter)
    sleep = staticmethod(time.sleep)


def clock_of(backend: Backend) -> Any:
    """The clock by which an engine's time passes: called, it tells the seconds; its `sleep` waits some."""
    return getattr(backend, "clock", None) or HostClock()


@dataclass(frozen=True)
class TimedRequest:
    """A prompt and the time at which it arrives, in seconds after the start."""

    id: str
    token_ids: list[int]
    params: SamplingParams
    arrival: float = 0.0


def arrival_times(scenario: ScenarioConfig, count: int) -> list[float]:
    """When each of `count` requests arrives, in seconds after the start, never falling.

    Raises:
        UsageError: the trace can't be read, or is too short.
    """
    if scenario.arrival in ("all_at_once", "steady"):
        return [0.0] * count
    if scenario.arrival == "trace":
        return _traced(scenario, count)
    random, now, times = Random(scenario.seed), 0.0, []
    for _ in range(count):
        now += random.expovariate(scenario.rate)
        times.append(now)
    return times


def _traced(scenario: ScenarioConfig, count: int) -> list[float]:
    try:
        requests = read_trace(scenario.path).requests
    except ValueError as error:
        raise UsageError(f"scenario.path={scenario.path}: {error}") from error
    if requests and requests[0].arrival is None:
        raise UsageError(f"scenario.path={scenario.path}: holds lengths alone, no arrivals")
    if len(requests) < count:
        raise UsageError(
            f"scenario.path={scenario.path}: holds {len(requests)} times for {count} requests: "
            f"give limit={len(requests)}"
        )
    return [request.arrival / scenario.speed for request in requests[:count]]


@dataclass
class Served:
    """The results of a list of requests.

    Attributes:
        outputs: by request id. A refused request has no samples, and `error` set. Times count from when a request was
            due, so that one that had to wait for the end of a step was not faster for it.
        start: host clock (`time.perf_counter`) at the start.
        seconds: from the start to the end of the last request.
        window: of a steady state: its begin and end in seconds after the start. Only what ended has an output.
    """

    outputs: dict[str, RequestOutput]
    start: float
    seconds: float
    window: tuple[float, float] | None = None


def serve(backend: Backend, requests: Sequence[TimedRequest], progress: bool = True) -> Served:
    """Hand each request to the engine when its time has come, and step the engine until all are answered.

    Args:
        backend: the engine.
        requests: in the order of their arrival.
        progress: show a bar where the output is a terminal.
    """
    outputs: dict[str, RequestOutput] = {}
    due = {request.id: request.arrival for request in requests}
    waiting = deque(requests)
    tokens = 0
    clock = clock_of(backend)
    start = clock()
    with tqdm(total=len(requests), desc="requests", disable=None if progress else True, dynamic_ncols=True) as bar:
        while waiting or backend.has_unfinished_requests():
            now = clock() - start
            finished = []
            while waiting and waiting[0].arrival <= now:
                refused = hand_over(backend, waiting.popleft())
                if refused is not None:
                    finished.append(refused)
            if backend.has_unfinished_requests():
                finished += backend.step()
            elif waiting and not finished:
                clock.sleep(waiting[0].arrival - now)
            for output in finished:
                outputs[output.request_id] = _since(start + due[output.request_id], output)
                tokens += sum(len(sample.token_ids) for sample in output.outputs)
            if finished:
                passed = clock() - start  # 0 on a simulated clock, where the first request is refused
                bar.set_postfix_str(f"{tokens / passed if passed else 0:.0f} tok/s", refresh=False)
                bar.update(len(finished))
    return Served(outputs, start, clock() - start)


def _since(due: float, output: RequestOutput) -> RequestOutput:
    for answer in (output, *output.outputs):
        metrics = answer.metrics
        late = metrics.arrival - due
        times = {name: getattr(metrics, name) for name in ("ttft", "e2e", "queued")}
        later = {name: time + late for name, time in times.items() if time is not None}
        answer.metrics = replace(metrics, arrival=due, **later)
    return output


def hand_over(backend: Backend, request: TimedRequest) -> RequestOutput | None:
    """Queue a request. Returns its output where the engine refuses it; the others are not affected."""
    try:
        backend.add_request(request.token_ids, request.params, request.id)
    except ValueError as error:
        metrics = RequestMetrics(arrival=clock_of(backend)(), prompt_tokens=len(request.token_ids))
        return RequestOutput(request.id, None, request.token_ids, [], metrics, error=str(error))
    return None
