"""Loads of the engine's benchmark: YAML files, each with requests and the engines (arms) that answer them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Any

from experiments.backends import BackendFactory, get_backend
from experiments.config.yaml_files import read_yaml
from experiments.errors import UsageError
from experiments.paths import CONF
from experiments.running.steady import held_entries
from experiments.workloads.lengths import generate
from zipage import EngineConfig, SamplingParams

LOADS = CONF / "bench"


@dataclass(frozen=True, kw_only=True)
class Load:
    """A load as its file has it.

    Attributes:
        lengths: options of the workload `lengths`: count, prompt_tokens, output_tokens, distribution, ...
        arms: by name, options of `EngineConfig`, and `backend` (default zipage), and `staggered`: this many requests
            begin as if a part of their outputs were there, parts spread evenly from nothing to all: with prompts of as
            many entries as they would hold, and outputs as much shorter.
        engine: options of `EngineConfig` for all arms.
        temperature: of sampling.
        warmup_tokens: tokens of each output in the run before those that are timed: as many as it takes to compress.
        window_steps: None: each repeat answers all requests. Else: one run, in which each repeat is this many steps,
            once the queue is empty or the pool full; as many before them are not timed.
    """

    lengths: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    engine: dict[str, Any] = field(default_factory=dict)
    temperature: float = 0.6
    warmup_tokens: int = 32
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
    """

    lengths: list[list[int]]
    temperature: float
    warmup_tokens: int
    window_steps: int | None
    repeats: int

    @property
    def is_own(self) -> bool:
        """Whether Zipage answers; other engines run in processes of their own."""
        return self.backend == "zipage"

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def read_arms(
    names: Sequence[str], *, model: str, given: Mapping[str, Any], seed: int, repeats: int,
    backends: Mapping[str, BackendFactory],
) -> list[Arm]:  # fmt: skip
    """The arms of loads, in order.

    Args:
        names: of files in `conf/bench/`, "short/zipage" for one arm of a file there, or paths of YAML files.
        model: where the model lies.
        given: options of `EngineConfig` that win over those of the files.

    Raises:
        UsageError: a load is unknown, or an option of one is unknown or out of range.
    """
    arms = []
    for name, path, only in find_loads(names, LOADS):
        load = _parse(path)
        for arm, own in named_arms(load.arms, name, only).items():
            try:
                arms.append(_arm(path.stem, load, arm, own, model, given, seed, repeats, backends))
            except (TypeError, ValueError, UsageError) as error:
                raise UsageError(f"{path}: arms.{arm}: {error}") from error
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


def _parse(path: Path) -> Load:
    content = read_yaml(path)
    known = [f.name for f in fields(Load)]
    if not isinstance(content, dict) or not isinstance(content.get("arms"), dict) or not content["arms"]:
        raise UsageError(f"{path}: must have a mapping `arms` with one arm at least")
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise UsageError(f"{path}: unknown option {unknown[0]}; known: {', '.join(known)}")
    if not isinstance(content.get("lengths"), dict):
        raise UsageError(f"{path}: must have a mapping `lengths`, options of the workload `lengths`")
    load = Load(**content)
    for option in ("warmup_tokens", "window_steps"):
        value = getattr(load, option)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UsageError(f"{path}: {option}={value!r}: must be a whole number from 1 up")
    return load


def _arm(
    load_name: str, load: Load, name: str, own: Mapping[str, Any], model: str, given: Mapping[str, Any], seed: int,
    repeats: int, backends: Mapping[str, BackendFactory],
) -> Arm:  # fmt: skip
    options = load.engine | dict(own)
    backend, staggered = options.pop("backend", "zipage"), options.pop("staggered", 0)
    get_backend(backend, backends)
    options |= dict(given) | {"model": model, "load_format": "dummy", "skip_tokenizer_init": True, "seed": seed}
    config = EngineConfig.from_kwargs(**options)
    SamplingParams(temperature=load.temperature)
    lengths = [[p.prompt_tokens, p.output_tokens] for p in generate(seed, **load.lengths)]
    if not isinstance(staggered, int) or not 0 <= staggered <= len(lengths):
        raise UsageError(f"staggered={staggered!r}: must be a whole number up to the {len(lengths)} requests")
    if staggered and config.protection == "prompt":
        raise UsageError("protection=prompt: a staggered prompt stands for output too, which nothing protects")
    return Arm(
        load=load_name, name=name, backend=backend, options=options, lengths=_stagger(lengths, staggered, seed, config),
        temperature=load.temperature, warmup_tokens=load.warmup_tokens, window_steps=load.window_steps, seed=seed,
        repeats=repeats,
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
