"""Loads of the engine's benchmark: YAML files, each with requests and the engines (arms) that answer them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Any

from experiments.backends import BackendFactory, get_backend
from experiments.bench.requests import refuse_unused, requests_of
from experiments.config.yaml_files import read_yaml
from experiments.errors import UsageError
from experiments.paths import CONF
from experiments.running.steady import held_entries
from experiments.serving.prompts import Asked
from zipage import EngineConfig, SamplingParams

LOADS = CONF / "bench"
MAPPINGS = ("lengths", "engine")
"""Options of which a command may change a part."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """A load as its file has it; `scenario.options` sets any of it but the arms.

    Attributes:
        lengths: {trace: FILE, count: N, longest: N}: those of a trace's requests, of its first `count`, what is longer
            cut; without FILE that of `scenario.path`. Their prompts share nothing. Or options of the workload
            `lengths`: count, prompt_tokens, output_tokens, distribution, ...
        arms: by name, options of `EngineConfig`, and of ours: `backend` (default zipage).
            `staggered`: this many requests begin as if a part of their outputs were there, parts spread evenly from
            nothing to all: with prompts of as many entries as they would hold, and outputs as much shorter.
            `arrivals`: "at_once", which is the default, or "trace": each request comes when it came in the trace.
        engine: options of `EngineConfig` for all arms.
        temperature: of sampling.
        warmup_tokens: tokens of each output in the run before those that are timed: as many as it takes to compress.
        speed: how many times as fast as in the trace requests arrive.
        window_steps: None: each repeat answers all requests. Else: one run, in which each repeat is this many steps,
            once the queue is empty or the pool full; as many before them are not timed.
    """

    lengths: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    engine: dict[str, Any] = field(default_factory=dict)
    temperature: float = 0.6
    warmup_tokens: int = 32
    speed: float = 1.0
    window_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class AnyArm:
    """One engine under one load.

    Attributes:
        load: the name of its file.
        name: of the arm in that file.
        options: of `EngineConfig`.
        seed: of the prompts.
    """

    load: str
    name: str
    backend: str
    options: dict[str, Any]
    seed: int

    @property
    def title(self) -> str:
        return f"{self.load}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Arm(AnyArm):
    """One of the engine's benchmark, as plain data that can be handed to another process.

    Attributes:
        lengths: tokens of each prompt and output.
        repeats: measurements.
        arrivals: of each request, in seconds after the start, never falling; None: all come at once.
    """

    lengths: list[list[int]]
    temperature: float
    warmup_tokens: int
    window_steps: int | None
    repeats: int
    arrivals: list[float] | None = None

    @property
    def is_own(self) -> bool:
        """Whether Zipage answers; other engines run in processes of their own."""
        return self.backend == "zipage"

    def plain(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "arrivals" or value is not None}


def read_arms(
    names: Sequence[str], *, model: str, given: Mapping[str, Any], changes: Mapping[str, Any], trace: str | None,
    seed: int, repeats: int, backends: Mapping[str, BackendFactory],
) -> list[Arm]:  # fmt: skip
    """The arms of loads, in order.

    Args:
        names: of files in `conf/bench/`, "short/zipage" for one arm of a file there, or paths of YAML files.
        model: where the model lies.
        given: options of `EngineConfig` that win over those of the files.
        changes: options of `Load` that do.
        trace: `scenario.path`.

    Raises:
        UsageError: a load is unknown, or an option of one is unknown or out of range.
    """
    arms, used = [], False
    for name, path, only in find_loads(names, LOADS):
        load = _parse(path, changes)
        named = named_arms(load.arms, name, only)
        timed = any(isinstance(own, Mapping) and own.get("arrivals") == "trace" for own in named.values())
        requests, from_option = requests_of(path, load.lengths, trace, seed, timed=timed)
        used |= from_option
        for arm, own in named.items():
            try:
                arms.append(_arm(path.stem, load, requests, arm, own, model, given, seed, repeats, backends))
            except (TypeError, ValueError, UsageError) as error:
                raise UsageError(f"{path}: arms.{arm}: {error}") from error
    refuse_unused(trace, used)
    return arms


def find_loads(names: Sequence[str], folder: Path) -> Iterator[tuple[str, Path, str]]:
    """Of each load its name as given, its file, and its one arm that is asked for ("" for all).

    Args:
        names: of files in `folder`, "short/zipage" for one arm of a file there, or paths of YAML files.

    Raises:
        UsageError: there are none, or one is unknown.
    """
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    if not names:
        raise UsageError(f"scenario.loads=[]: name some of {known}, or YAML files")
    for name in names:
        own_file = name.endswith((".yaml", ".yml"))
        stem, _, only = (name, "", "") if own_file else name.partition("/")
        path = Path(name) if own_file else folder / f"{stem}.yaml"
        if not path.is_file():
            raise UsageError(f"scenario.loads={name}: no such load; known: {known}, or a YAML file")
        yield name, path, only


def named_arms(arms: Mapping[str, Any], name: str, only: str) -> Mapping[str, Any]:
    """Those of a load that are asked for. Raises UsageError where it has no such arm."""
    if only and only not in arms:
        raise UsageError(f"scenario.loads={name}: no such arm; {name.partition('/')[0]} has {', '.join(arms)}")
    return {only: arms[only]} if only else arms


def options_of(path: Path, changes: Mapping[str, Any], kind: type, mappings: Sequence[str]) -> dict[str, Any]:
    """Options of a load: those of its file, and the `changes` of a command.

    Args:
        kind: a dataclass, whose fields are the options.
        mappings: options of which `changes` may set a part.

    Raises:
        UsageError: an option is unknown, or `arms` or `lengths` is no mapping.
    """
    content, known = read_yaml(path), [f.name for f in fields(kind)]
    if not isinstance(content, dict) or not isinstance(content.get("arms"), dict) or not content["arms"]:
        raise UsageError(f"{path}: must have a mapping `arms` with one arm at least")
    if not isinstance(content.get("lengths"), dict):
        raise UsageError(
            f"{path}: must have a mapping `lengths`: {{trace: FILE}}, or options of the workload `lengths`"
        )
    for source, options in ((str(path), content), ("scenario.options", changes)):
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise UsageError(f"{source}: unknown option {unknown[0]}; known: {', '.join(known)}")
    if "arms" in changes:
        raise UsageError("scenario.options.arms: give a YAML file of your own: scenario.loads=[FILE.yaml]")
    merged = {
        name: content[name] | dict(changes[name])
        for name in mappings
        if isinstance(content.get(name), dict) and isinstance(changes.get(name), Mapping)
    }
    return content | dict(changes) | merged


def _parse(path: Path, changes: Mapping[str, Any]) -> Load:
    load = Load(**options_of(path, changes, Load, MAPPINGS))
    for option in ("warmup_tokens", "window_steps"):
        value = getattr(load, option)
        if value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"{path}: {option}={value!r}: must be a whole number from 1 up")
    for option in MAPPINGS:
        if not isinstance(getattr(load, option), Mapping):
            raise UsageError(f"{path}: {option}={getattr(load, option)!r}: must be a mapping of options")
    if isinstance(load.speed, bool) or not isinstance(load.speed, int | float) or not 0 < load.speed < math.inf:
        raise UsageError(f"{path}: speed={load.speed!r}: must be above 0: how many times as fast as in the trace")
    return load


def _arm(
    load_name: str, load: Load, requests: Sequence[Asked], name: str, own: Mapping[str, Any], model: str,
    given: Mapping[str, Any], seed: int, repeats: int, backends: Mapping[str, BackendFactory],
) -> Arm:  # fmt: skip
    options = load.engine | dict(own)
    backend, staggered = options.pop("backend", "zipage"), options.pop("staggered", 0)
    arrivals = options.pop("arrivals", "at_once")
    get_backend(backend, backends)
    options |= dict(given) | {"model": model, "load_format": "dummy", "skip_tokenizer_init": True, "seed": seed}
    config = EngineConfig.from_kwargs(**options)
    SamplingParams(temperature=load.temperature)
    lengths = [[request.prompt_tokens, request.output_tokens] for request in requests]
    if not isinstance(staggered, int) or not 0 <= staggered <= len(lengths):
        raise UsageError(f"staggered={staggered!r}: must be a whole number up to the {len(lengths)} requests")
    if staggered and config.protection == "prompt":
        raise UsageError("protection=prompt: a staggered prompt stands for output too, which nothing protects")
    if arrivals not in ("at_once", "trace"):
        raise UsageError(f"arrivals={arrivals!r}: must be at_once or trace")
    if arrivals == "trace" and ("trace" not in load.lengths or staggered or load.window_steps is not None):
        raise UsageError("arrivals=trace: needs the `lengths` of a trace, and neither `staggered` nor `window_steps`")
    first = requests[0].due
    times = [(request.due - first) / load.speed for request in requests] if arrivals == "trace" else None
    return Arm(
        load=load_name, name=name, backend=backend, options=options, lengths=_stagger(lengths, staggered, seed, config),
        temperature=load.temperature, warmup_tokens=load.warmup_tokens, window_steps=load.window_steps, seed=seed,
        repeats=repeats, arrivals=times,
    )  # fmt: skip


def _stagger(lengths: list[list[int]], count: int, seed: int, config: EngineConfig) -> list[list[int]]:
    """The first `count` requests as if a part of each output were there: parts spread evenly, in a random order."""
    parts = [(i + 0.5) / count for i in range(count)]
    Random(seed).shuffle(parts)
    begun = [as_begun(length, int(part * length[1]), config) for part, length in zip(parts, lengths)]
    return begun + lengths[count:]


def as_begun(length: Sequence[int], done: int, config: EngineConfig) -> list[int]:
    """Prompt and output of a request as if `done` tokens of its output were there."""
    prompt, output = length
    return [held_entries(config, prompt, done), output - done]
