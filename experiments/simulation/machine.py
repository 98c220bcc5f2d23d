"""A machine as the model of time knows it: a file of `conf/machine/`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from experiments.config.yaml_files import read_yaml
from experiments.errors import UsageError
from experiments.paths import CONF

MACHINES = CONF / "machine"
PLAIN = {
    "name": (str, "a text"),
    "origin": (str, "a text"),
    "eager": (bool, "true or false"),
    "launches_prompts": (bool, "true or false"),
    "until": (str | None, "a text or null"),
}
"""Options that are no numbers, and what they are."""


@dataclass(frozen=True)
class Machine:
    """One GPU and its host.

    Attributes:
        name: in tables.
        origin: where its numbers come from.
        memory_bytes: of the GPU, as CUDA tells it.
        bandwidth, flops: of its memory and its arithmetic in bfloat16, a second, as published.
        link_bandwidth: bytes a second between GPUs. host_bandwidth: between GPU and host memory.
        weight_share, product_share: of bandwidth and arithmetic that matrix products reach. product_seconds: of each
            product beside that, to begin and to end.
        entry_share, prefill_share: the same of attention to the cache, and within prompts.
        block_entries: a block is read as if it had so many entries more.
        imbalance: what attention takes longer for N requests of unequal lengths: the time of so many entries at the
            whole bandwidth as the standard deviation of lengths, times the square root of N.
        attention_seconds: of a layer's attention beside that.
        layer_seconds: of a layer's small kernels.
        overlap_seconds: that a layer saves since each kernel is launched before the one ahead has ended: the less the
            more rows, and nothing from 64 on.
        row_passes: how often they move the numbers of a token, `width` of them.
        sample_seconds: of sampling, for each request and token of the vocabulary.
        collective_seconds: of a sum over GPUs, twice a layer. sum_share: of the link's bandwidth that it reaches.
            link_share: that a gather of logits reaches.
        host_seconds, host_row_seconds: of scheduling and booking a step, and for each request in it.
        launch_seconds: of launching a layer's kernels where they are no part of a graph.
        eager: no step is a graph. launches_prompts: no step is whose prompts have attention of their own, as before
            `until`.
        until: when records were made, in UTC, that a machine of this name stands for, where engines since do otherwise;
            None: all later ones.
        move_share, score_share, redundancy_share: of bandwidth, bandwidth and arithmetic that the parts of a
            compression reach.
        compression_seconds: that the host takes to launch a batch of compressions. compression_score_seconds: more for
            a policy that reads queries.
        interpreter_share: of these, that the interpreter is kept from the next step.
        beside: how many times as long a compression takes beside a step.
        request_seconds: from when a request is due at a server until its engine has it: HTTP, tokenizing and the
            process in between. Only servers and fleets are charged it.
    """

    name: str
    origin: str
    memory_bytes: float
    bandwidth: float
    flops: float
    link_bandwidth: float
    host_bandwidth: float
    weight_share: float
    product_share: float
    entry_share: float
    prefill_share: float
    attention_seconds: float
    layer_seconds: float
    row_passes: float
    sample_seconds: float
    collective_seconds: float
    link_share: float
    sum_share: float
    host_seconds: float
    host_row_seconds: float
    launch_seconds: float
    move_share: float
    score_share: float
    redundancy_share: float
    compression_seconds: float
    compression_score_seconds: float
    interpreter_share: float
    beside: float
    request_seconds: float
    imbalance: float = 0.0
    block_entries: float = 0.0
    overlap_seconds: float = 0.0
    product_seconds: float = 0.0
    eager: bool = False
    launches_prompts: bool = False
    until: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not 0 <= value < float("inf"):
                raise UsageError(f"machine {self.name}: {field.name}={value}: must be a finite number, not below 0")
            if field.name in ("memory_bytes", "bandwidth", "flops", "link_bandwidth", "host_bandwidth") and not value:
                raise UsageError(f"machine {self.name}: {field.name}={value}: must be above 0")
            if field.name.endswith("_share") and not 0 < value <= 1:
                raise UsageError(f"machine {self.name}: {field.name}={value}: must be above 0, and at most 1")


def machine_names() -> list[str]:
    return sorted(path.stem for path in MACHINES.glob("*.yaml"))


def file_of(machine: Machine) -> str:
    """The name under which `conf/machine/` has a machine."""
    return next(name for name in machine_names() if read_machine(name) == machine)


def read_machine(name: str | Path) -> Machine:
    """A machine of `conf/machine/` by its name, or of a YAML file by its path.

    A file may name another machine as its `like`: what it does not say itself is as there.

    Raises:
        UsageError: there is none of that name, or its file is not a machine's.
    """
    given = str(name)
    path = Path(given) if given.endswith((".yaml", ".yml")) else MACHINES / f"{given}.yaml"
    if not path.is_file():
        raise UsageError(f"machine={given}: no such machine; known: {', '.join(machine_names())}, or a YAML file")
    return machine_of(_values(path), str(path))


def machine_of(values: dict[str, Any], source: str) -> Machine:
    """A machine from plain values. Raises UsageError that names `source`."""
    known = {field.name: field for field in fields(Machine)}
    if unknown := sorted(map(str, set(values) - set(known))):
        raise UsageError(f"{source}: unknown option {unknown[0]}; known: {', '.join(known)}")
    if missing := sorted(
        set(known) - set(values) - {field.name for field in fields(Machine) if field.default is not MISSING}
    ):
        raise UsageError(f"{source}: {missing[0]} is missing")
    for key, (kind, what) in PLAIN.items():
        if key in values and not isinstance(values[key], kind):
            raise UsageError(f"{source}: {key}={values[key]}: must be {what}")
    try:
        return Machine(**{key: value if key in PLAIN else float(value) for key, value in values.items()})
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source}: {error}") from error


def _values(path: Path, leading: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file says, and what those that it is like say beside; `leading`: the files that led here."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must be a mapping of the options of a machine")
    like = values.pop("like", None)
    if like is None:
        return values
    other, leading = path.parent / f"{like}.yaml", (*leading, path.resolve())
    if other.resolve() in leading:
        raise UsageError(f"{path}: its like, {like}, leads back to {other.name}: name another machine")
    return _values(other, leading) | values
