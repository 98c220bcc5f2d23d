"""One engine under one load: from its start to a row."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from experiments.backends import Backend, BackendFactory
from experiments.bench.loads import Arm
from experiments.bench.roofline import EntriesRead, ModelShape, step_bytes, step_floor
from experiments.errors import RunError
from experiments.running.scenarios import Served, TimedRequest, clock_of, serve
from zipage import EventStats, RequestOutput, SamplingParams, StepStats

SETTLE_STEPS = 16
"""Steps in a row without prefill that tell a full pool from one in which a compression is about to make room."""
COUNTED = {"compressions": "compressions_applied", "pauses": "pauses", "preemptions": "preemptions"}


@dataclass
class Repeat:
    """One measurement.

    Attributes:
        compressing: seconds that each compression took, from its order until it was booked.
        ttft, e2e: seconds from when each request was due to its first token and to its end; empty for windows.
    """

    tokens: int
    seconds: float
    steps: list[StepStats]
    entries: list[float]
    compressing: list[float]
    counts: dict[str, int] = field(default_factory=dict)
    ttft: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)


def measure(arm: Arm, factory: BackendFactory, ceilings: Mapping[str, float] | None, used_before: int | None) -> dict:
    """Start an engine, warm it up, time it, and stop it.

    Args:
        ceilings: `copy`, `read` and `matmul` as measured; None: no roofline.
        used_before: bytes of the device in use before the engine; None: without CUDA.

    Returns:
        The row, as plain data.

    Raises:
        RunError: a request was refused, or a load ended before its last window.
    """
    begin = time.perf_counter()
    backend = factory(**arm.options)
    try:
        shape = ModelShape.read(
            Path(arm.options["model"]),
            arm.options.get("dtype", "auto"),
            "cpu" if used_before is None else "cuda",
            arm.options.get("tensor_parallel_size", 1),
        )
        first_token(backend, arm, shape)
        startup = time.perf_counter() - begin
        warm_up(backend, arm, shape)
        repeats = repeated(backend, arm, shape)
        return row_of(arm, shape, repeats, ceilings) | {"startup_seconds": startup, "memory_bytes": _used(used_before)}
    finally:
        if hasattr(backend, "shutdown"):
            backend.shutdown()


def first_token(backend: Backend, arm: Arm, shape: ModelShape) -> None:
    """One, so that the engine has started. Raises RunError as `measure`."""
    _served(backend, arm, "start", [_prompts(arm, shape, "start")[0][:16]], [1])


def warm_up(backend: Backend, arm: Arm, shape: ModelShape) -> None:
    """The beginning of a load that is served whole. Raises RunError as `measure`."""
    if arm.window_steps is None:
        outputs = [min(output, arm.warmup_tokens) for _, output in arm.lengths]
        _served(backend, arm, "warm-up", _prompts(arm, shape, "warm-up"), outputs)


def repeated(backend: Backend, arm: Arm, shape: ModelShape) -> list[Repeat]:
    """The measurements of an arm by an engine that is warm. Raises RunError as `measure`."""
    outputs = [output for _, output in arm.lengths]
    if arm.window_steps is None:
        return [_whole(backend, arm, shape, str(i), outputs) for i in range(arm.repeats)]
    return _windows(backend, arm, shape, outputs)


def device_used(device: str) -> int | None:
    """Bytes of the device in use, whoever uses them, after what this process no longer needs; None without CUDA."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return None
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _used(before: int | None) -> int | None:
    if before is None:
        return None
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free - before


def _prompts(arm: Arm, shape: ModelShape, label: str) -> list[list[int]]:
    """Token ids, others for each label: no repeat finds its prompts in a prefix cache."""
    random = Random(f"{arm.seed} {label}")
    return [[random.randrange(shape.vocab_size) for _ in range(prompt)] for prompt, _ in arm.lengths]


def _requests(
    arm: Arm, label: str, prompts: list[list[int]], outputs: list[int], arrivals: Sequence[float] | None = None
) -> list[TimedRequest]:
    times = arrivals or [0.0] * len(prompts)
    return [
        TimedRequest(
            f"{label}-{i}", prompt, SamplingParams(temperature=arm.temperature, max_tokens=output, ignore_eos=True), due
        )
        for i, (prompt, output, due) in enumerate(zip(prompts, outputs, times, strict=True))
    ]


def _served(
    backend: Backend, arm: Arm, label: str, prompts: list[list[int]], outputs: list[int],
    arrivals: Sequence[float] | None = None,
) -> Served:  # fmt: skip
    """All requests, answered at full length. Raises RunError where one is not."""
    requests = _requests(arm, label, prompts, outputs, arrivals)
    served = serve(backend, requests, progress=False)
    answers = [served.outputs[request.id] for request in requests]
    refused = [answer.error for answer in answers if answer.error is not None]
    if refused:
        raise RunError(f"{len(refused)} of {len(answers)} requests were refused: {refused[0]}")
    short = sum(answer.metrics.output_tokens < asked for answer, asked in zip(answers, outputs, strict=True))
    if short:
        raise RunError(f"{short} of {len(answers)} outputs ended early: raise max_model_len, or ask for fewer tokens")
    return served


class _Observed:
    """An engine as `serve` steps it, and what it tells meanwhile."""

    def __init__(self, backend: Backend, arm: Arm, shape: ModelShape) -> None:
        pool = arm.options.get("kv_cache_memory_bytes")
        self.steps: list[StepStats] = []
        self._compressing: list[float] = []
        pools = arm.options.get("data_parallel_size", 1)
        self._reads = EntriesRead(None if pool is None else pools * pool / shape.kv_bytes)
        self._backend = backend
        self.clock = clock_of(backend)
        self.add_request, self.has_unfinished_requests = backend.add_request, backend.has_unfinished_requests
        self.mark()

    def __enter__(self) -> _Observed:
        self._backend.step_listeners += [self.steps.append, self._reads.step]
        self._backend.event_listeners += [self._note, self._reads.event]
        return self

    def __exit__(self, *exception: object) -> None:
        for listener in (self.steps.append, self._reads.step):
            self._backend.step_listeners.remove(listener)
        for listener in (self._note, self._reads.event):
            self._backend.event_listeners.remove(listener)

    def _note(self, event: EventStats) -> None:
        if event.kind == "compress":
            self._compressing.append(event.seconds)

    def step(self) -> list[RequestOutput]:
        outputs = self._backend.step()
        for output in outputs:
            self._reads.finished(output)
        return outputs

    def mark(self) -> None:
        """Count from here."""
        self._first, self._before = len(self.steps), self._counts()
        self._compressing = []

    def repeat(self, seconds: float, tokens: int | None = None) -> Repeat:
        """What came since the mark; `tokens` None: those decoded."""
        steps, entries = self.steps[self._first :], self._reads.entries[self._first :]
        counts = {name: value - self._before[name] for name, value in self._counts().items()}
        tokens = sum(step.num_decode for step in steps) if tokens is None else tokens
        return Repeat(tokens, seconds, steps, entries, self._compressing, counts)

    def _counts(self) -> dict[str, int]:
        stats = self._backend.stats
        return {name: getattr(stats, counter) for name, counter in COUNTED.items()}


def _whole(backend: Backend, arm: Arm, shape: ModelShape, label: str, outputs: list[int]) -> Repeat:
    """All requests from the first to the last, each when it is due."""
    prompts = _prompts(arm, shape, label)
    with _Observed(backend, arm, shape) as observed:
        served = _served(observed, arm, label, prompts, outputs, arm.arrivals)
        metrics = [output.metrics for output in served.outputs.values()]
        repeat = observed.repeat(served.seconds, sum(of.output_tokens for of in metrics))
        repeat.ttft, repeat.e2e = [of.ttft for of in metrics], [of.e2e for of in metrics]
        return repeat


def _windows(backend: Backend, arm: Arm, shape: ModelShape, outputs: list[int]) -> list[Repeat]:
    """Windows of steps, once steps without prefill show that the pool is full or the queue empty, and after one more
    window, in which graphs are captured and kernels compiled that no step before has asked for.
    """
    with _Observed(backend, arm, shape) as observed:
        for request in _requests(arm, "0", _prompts(arm, shape, "0"), outputs):
            observed.add_request(request.token_ids, request.params, request.id)

        def run(steps: int) -> None:
            until = len(observed.steps) + steps  # replicas tell of several at once
            while len(observed.steps) < until:
                if not observed.has_unfinished_requests():
                    raise RunError("the load ended before its last window: ask for longer outputs or fewer steps")
                observed.step()

        while len(observed.steps) < SETTLE_STEPS or not all(
            step.num_decode and not step.num_prefill for step in observed.steps[-SETTLE_STEPS:]
        ):
            run(1)
        run(arm.window_steps)
        repeats = []
        for _ in range(arm.repeats):
            observed.mark()
            begin = observed.clock()
            run(arm.window_steps)
            repeats.append(observed.repeat(observed.clock() - begin))
        return repeats


def row_of(arm: Arm, shape: ModelShape, repeats: list[Repeat], ceilings: Mapping[str, float] | None) -> dict[str, Any]:
    """A row of the table, from what was measured."""
    rates = [repeat.tokens / repeat.seconds for repeat in repeats]
    steps = [step for repeat in repeats for step in repeat.steps]
    times = [step.step_time for step in steps]
    row = _names(arm) | {
        "tokens_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "repeats": rates,
        "steps": len(steps),
        "mean_batch": statistics.mean(step.num_decode for step in steps),
        "step_bytes": statistics.mean(
            step_bytes(shape, entries, _tokens(step))
            for repeat in repeats
            for step, entries in zip(repeat.steps, repeat.entries, strict=True)
        ),
        "step_ms": _tails(times),
    }
    if arm.is_own:  # other engines tell neither
        device = sum(step.device_time for step in steps)
        row["host_ms"] = 1e3 * _quantile([step.host_time for step in steps], 0.5)
        row["gpu_idle"] = 1 - device / sum(times)
        row |= {name: statistics.median(repeat.counts[name] for repeat in repeats) for name in COUNTED}
        compressing = [seconds for repeat in repeats for seconds in repeat.compressing]
        row["compression_ms"] = 1e3 * statistics.mean(compressing) if compressing else None
    if arm.arrivals is not None:
        waits = {name: [wait for repeat in repeats for wait in getattr(repeat, name)] for name in ("ttft", "e2e")}
        row |= {f"{name}_ms": _tails(seconds) for name, seconds in waits.items()}
    elif ceilings is not None:  # a floor is of work that is there, and here the engine waits for some
        bandwidth = max(ceilings["copy"], ceilings["read"])
        floors = [
            sum(
                step_floor(shape, entries, _tokens(step), step.prefill_tokens, bandwidth, ceilings["matmul"])
                for step, entries in zip(repeat.steps, repeat.entries, strict=True)
            )
            for repeat in repeats
        ]
        row["floor_tokens_per_second"] = statistics.median(r.tokens / f for r, f in zip(repeats, floors))
        row["of_floor"] = statistics.median(f / r.seconds for r, f in zip(repeats, floors))
    return row


def _tokens(step: StepStats) -> int:
    return step.num_decode + step.prefill_tokens


def _names(arm: Arm) -> dict[str, Any]:
    return {
        "load": arm.load,
        "arm": arm.name,
        "backend": arm.backend,
        "requests": len(arm.lengths),
        "policy": arm.options.get("policy", "full"),
        "budget_tokens": arm.options.get("budget_tokens") if arm.options.get("policy", "full") != "full" else None,
        "refused": None,
    }


def refused(arm: Arm, reason: str) -> dict[str, Any]:
    """The row of an arm that was not timed."""
    return _names(arm) | {"refused": reason}


def _tails(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    return {name: 1e3 * _quantile(seconds, q) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]
