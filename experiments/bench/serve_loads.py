"""Loads of `scenario=serve_bench`: YAML files, each with requests, rates, limits, and the servers (arms) under them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from heapq import merge
from itertools import groupby, takewhile
from operator import attrgetter
from pathlib import Path
from random import Random
from typing import Any

from experiments.backends import BackendFactory, get_backend
from experiments.bench.loads import AnyArm, as_begun, find_loads, named_arms, options_of
from experiments.bench.requests import refuse_unused, requests_of
from experiments.errors import UsageError
from experiments.paths import CONF
from experiments.serving.prompts import Asked
from experiments.serving.server import command
from zipage import EngineConfig, SamplingParams

LOADS = CONF / "serve_bench"
BEGUN = 0.7
"""Part of the warm-up over which requests come that have begun."""
DUE = attrgetter("due")
LIMITS = ("ttft", "itl", "tpot", "e2e")
NUMBERS = {"warmup": 0.0, "seconds": 0.1, "drain": 0.0, "patience": 0.1, "startup": 1.0}
"""Options in seconds, and the least of each."""
MAPPINGS = ("lengths", "engine", "search", "slo", "request")
"""Options of which a command may change a part."""
COUNTS = ("warmup_requests", "warmup_tokens")
OWN = ("model", "load_format", "skip_tokenizer_init", "seed")
"""Options of `EngineConfig` that a load may not set: the run does."""


@dataclass(frozen=True, kw_only=True)
class ServeLoad:
    """A load as its file has it; `scenario.options` sets any of it but the arms.

    Attributes:
        lengths: {trace: FILE, count: N, longest: N}: the requests of a trace, its first `count`, what is longer cut;
            without FILE that of `scenario.path`. Or options of the workload `lengths`.
        arms: by name, options of `EngineConfig`, and `backend` ("zipage", "vllm" or "vllm_matched"), and `flags` of the
            server's own.
        engine: options of `EngineConfig` for all arms.
        arrivals: "trace": as in the trace, faster or slower; "poisson".
        rates: requests a second, each measured with every arm.
        search: {low: R, high: R, steps: N}: bisect for the highest rate at which the limits hold.
        at_break_of: an arm; those behind it are also measured at the lowest rate at which its limits did not hold.
        streams: all requests of `lengths`, so many at a time, through HTTP and offline (`LLM` alone).
        slo: limits in seconds, on the p99: "ttft", "itl", "tpot", "e2e".
        warmup, seconds, drain: requests that are due within `seconds` after `warmup` are measured; they have `drain`
            more to end, and are aborted then.
        begun: seconds a token: the server begins as if it had long answered at this pace. During the warm-up come the
            requests that would be running, with prompts of as many entries as they would hold, and outputs as much
            shorter. None: it begins empty, and a long output's worth of warm-up is needed until it is as full as the
            rate makes it.
        patience: a rate is broken, and ends, when a request has waited so many seconds for its first token.
        warmup_requests, warmup_tokens: once a server is up: requests that go before all others, and tokens of each
            output at most: as many as it takes to compress.
        temperature: of sampling.
        request: further fields of each body.
        startup: seconds that a server has until it is ready.
    """

    lengths: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    engine: dict[str, Any] = field(default_factory=dict)
    arrivals: str = "poisson"
    rates: list[float] = field(default_factory=list)
    search: dict[str, float] | None = None
    at_break_of: str | None = None
    streams: int | None = None
    slo: dict[str, float] = field(default_factory=lambda: {"ttft": 2.0, "itl": 0.05})
    warmup: float = 10.0
    seconds: float = 60.0
    drain: float = 60.0
    begun: float | None = None
    patience: float = 10.0
    warmup_requests: int = 16
    warmup_tokens: int = 64
    temperature: float = 0.6
    request: dict[str, Any] = field(default_factory=dict)
    startup: float = 900.0


@dataclass(frozen=True, kw_only=True)
class ServedArm(AnyArm):
    """One server under one load.

    Attributes:
        flags: of the server's own.
        requests: of the load, `due` as in the trace.
    """

    flags: dict[str, Any]
    spec: ServeLoad
    requests: list[Asked]

    @property
    def gpus(self) -> int:
        return self.options.get("tensor_parallel_size", 1) * self.options.get("data_parallel_size", 1)

    def plain(self) -> dict[str, Any]:
        """What decides its figures, without where the model lies."""
        spec = {name: value for name, value in asdict(self.spec).items() if name not in ("arms", "lengths", "startup")}
        own = {"load": self.load, "name": self.name, "backend": self.backend, "flags": self.flags, "seed": self.seed}
        return own | {"options": self.options | {"model": None}, "spec": spec, "requests": self.requests}

    def arriving(self, rate: float) -> list[Asked]:
        """The requests that arrive at this rate until the end of the drain, in order; the trace begins again where it
        ends.
        """
        return list(self.coming(rate))

    def coming(self, rate: float) -> Iterator[Asked]:
        """As `arriving`, one after the other."""
        end = self.spec.warmup + self.spec.seconds + self.spec.drain
        timed = (request._replace(due=due) for due, request in zip(self._times(rate), _endless(self.requests)))
        coming = merge(takewhile(lambda request: request.due <= end, timed), self._begun(rate), key=DUE)
        for _, together in groupby(coming, DUE):
            yield from sorted(together)

    def _begun(self, rate: float) -> list[Asked]:
        """Those that would be running when the first arrives, spread over most of the warm-up."""
        pace, running = self.spec.begun, []
        if pace is None:
            return []
        config = EngineConfig.from_kwargs(**self.options)
        longest = max(request.output_tokens for request in self.requests)
        for number in range(math.ceil(longest * pace * rate)):
            request = self.requests[-1 - number % len(self.requests)]
            done = int((number + 0.5) / rate / pace)
            if done < request.output_tokens:
                length = as_begun((request.prompt_tokens, request.output_tokens), done, config)
                running.append(Asked(0.0, *length))
        step = BEGUN * self.spec.warmup / max(1, len(running))
        return [request._replace(due=number * step) for number, request in enumerate(running)]

    def _times(self, rate: float) -> Iterator[float]:
        if self.spec.arrivals == "poisson":
            random, now = Random(f"{self.seed} arrivals"), 0.0
            while True:
                now += random.expovariate(1.0) / rate
                yield now
        first, count = self.requests[0].due, len(self.requests)
        span = self.requests[-1].due - first
        gap = span / (count - 1) if count > 1 else 1.0
        scale, turn = 1 / (rate * gap) if gap else 0.0, 0
        while True:
            yield from ((request.due - first) * scale + turn * count / rate for request in self.requests)
            turn += 1


def _endless(requests: Sequence[Asked]) -> Iterator[Asked]:
    while True:
        yield from requests


def read_served_arms(
    names: Sequence[str], *, model: str, load_format: str, has_tokenizer: bool, given: Mapping[str, Any],
    changes: Mapping[str, Any], trace: str | None, seed: int, backends: Mapping[str, BackendFactory],
) -> list[ServedArm]:  # fmt: skip
    """The arms of loads, in order.

    Args:
        names: of files in `conf/serve_bench/`, "trace/zipage" for one arm of a file there, or paths of YAML files.
        model: where the model lies; its text is decoded where it `has_tokenizer`.
        given: options of `EngineConfig` that win over those of the files.
        changes: options of `ServeLoad` that do.
        trace: `scenario.path`.

    Raises:
        UsageError: a load is unknown, or an option of one is unknown or out of range.
    """
    arms: list[ServedArm] = []
    used = False
    for name, path, only in find_loads(names, LOADS):
        spec = _parse(path, changes)
        named = named_arms(spec.arms, name, only)
        requests, from_option = requests_of(path, spec.lengths, trace, seed, timed=spec.arrivals == "trace")
        used |= from_option
        for arm, own in named.items():
            try:
                options, flags, backend = _engine(spec, own, given, backends)
                options |= {"model": model, "load_format": load_format, "seed": seed}
                options["skip_tokenizer_init"] = not has_tokenizer
                if spec.begun is not None and EngineConfig.from_kwargs(**options).protection == "prompt":
                    raise UsageError(
                        "protection=prompt: the prompt of a request that has `begun` stands for output too"
                    )
                command(backend, options, 1, flags)  # what that server can't honour is refused before any starts
            except (TypeError, ValueError, UsageError) as error:
                raise UsageError(f"{path}: arms.{arm}: {error}") from error
            arms.append(
                ServedArm(
                    load=path.stem, name=arm, backend=backend, options=options, flags=flags, spec=spec,
                    requests=requests, seed=seed,
                )
            )  # fmt: skip
    refuse_unused(trace, used)
    return arms


def _engine(
    spec: ServeLoad, own: Mapping[str, Any], given: Mapping[str, Any], backends: Mapping[str, BackendFactory]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    options = spec.engine | dict(own)
    backend, flags = options.pop("backend", "zipage"), options.pop("flags", {})
    get_backend(backend, backends)
    if backend not in ("zipage", "vllm", "vllm_matched"):
        raise UsageError(f"backend={backend}: has no server; take zipage, vllm or vllm_matched")
    if not isinstance(flags, dict):
        raise UsageError(f"the server's own flags must be a mapping, not {flags!r}")
    for name in OWN:
        if name in options:
            raise UsageError(f"{name}={options[name]!r}: leave it out: the command says it (model=NAME, seed=N)")
    return options | dict(given), flags, backend


def _parse(path: Path, changes: Mapping[str, Any]) -> ServeLoad:
    load = ServeLoad(**options_of(path, changes, ServeLoad, MAPPINGS))
    _check(path, load)
    return load


def _check(path: Path, load: ServeLoad) -> None:
    """Raise a UsageError that names the first option that is out of range."""

    def refuse(option: str, what: str) -> None:
        raise UsageError(f"{path}: {option}={getattr(load, option.partition('.')[0])!r}: must be {what}")

    for option, least in NUMBERS.items():
        if not _is_number(getattr(load, option), least):
            refuse(option, f"seconds, at least {least:g}")
    for option in COUNTS:
        value = getattr(load, option)
        if type(value) is not int or value < 0:
            refuse(option, "a whole number of at least 0")
    if load.begun is not None and not (_is_number(load.begun, 1e-4) and load.warmup):
        refuse("begun", "seconds a token, beside a warmup, or null")
    if load.arrivals not in ("trace", "poisson"):
        refuse("arrivals", "trace or poisson")
    if load.arrivals == "trace" and "trace" not in load.lengths:
        refuse("arrivals", "poisson where `lengths` is no trace")
    if not isinstance(load.rates, list) or not all(_is_number(rate, 1e-3) for rate in load.rates):
        refuse("rates", "a list of requests a second, at least 0.001 each")
    if load.search is not None and not _is_search(load.search):
        refuse("search", "{low: R, high: R, steps: N}: requests a second, low below high, and bisections from 0 up")
    if load.at_break_of is not None and load.at_break_of not in load.arms:
        refuse("at_break_of", f"an arm: {', '.join(load.arms)}")
    if load.streams is not None and (type(load.streams) is not int or load.streams < 1):
        refuse("streams", "a whole number from 1 up")
    if not isinstance(load.slo, dict) or not all(n in LIMITS and _is_number(v, 0.0) for n, v in load.slo.items()):
        refuse("slo", f"seconds by name: {', '.join(LIMITS)}")
    if not (load.rates or load.search or load.streams):
        refuse("rates", "given, or `search` or `streams`")
    try:
        SamplingParams(temperature=load.temperature)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def _is_number(value: Any, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf


def _is_search(search: Any) -> bool:
    return (
        isinstance(search, dict)
        and search.keys() == {"low", "high", "steps"}
        and all(_is_number(search[name], 1e-3) for name in ("low", "high"))
        and search["low"] < search["high"]
        and type(search["steps"]) is int
        and search["steps"] >= 0
    )


def shortened(arm: ServedArm) -> list[Asked]:
    """The requests that warm a server up."""
    most = arm.spec.warmup_tokens
    return [
        request._replace(due=0.0, output_tokens=min(request.output_tokens, most))
        for request in arm.requests[: arm.spec.warmup_requests]
    ]
