"""Which run of a set is the baseline of which."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.config.options import first_given, held_budgets, held_intervals, simulated

if TYPE_CHECKING:
    import pandas as pd

MATCHED = (
    *("model.name", "model.revision", "model.load_format", "model.chat_template", "model.chat_template_options."),
    *("model_content", "provenance.chat_template", "provenance.data", "provenance.prompts"),
    *("provenance.sources.engine", "provenance.sources.grader"),
    *("workload.name", "workload.grader", "sampling.", "limit", "seed", "backend", "device"),
    *("engine.dtype", "engine.max_model_len", "engine.tensor_parallel_size", "fidelity"),
)
"""What a run and its baseline must have in common: options, provenance, code, device. A name with a dot at its end
stands for all that begin with it."""

BUDGET = ("budget", "interval", "engine.block_size", "policy.trigger", "policy.recent_tokens")
"""What two policies of the same budget must have in common besides."""

POOL = ("engine.num_blocks", "engine.kv_cache_memory_bytes", "engine.gpu_memory_utilization")
"""What sizes a pool; the first that is set decides."""

PROTECTION = ("policy.protection",)
ALLOCATION = "policy.allocation"

FIELD = ("engine.enable_prefix_caching",)
"""What else the runs of a field have in common: unequal budgets share no prefixes."""

REPLICAS = "engine.data_parallel_size"

LOAD = ("engine.max_num_seqs", REPLICAS, "scenario.", "hardware.")
"""What else two runs must have in common for their speeds to be compared."""

PREFERRED = ("engine.", "scenario.", "hardware.", "provenance.code.")
"""Of several baselines, the one that differs in the fewest of these is taken, and of those the latest."""

BYTES = ("kv_bytes.mean", 0.05)
"""A control of as many bytes holds the run's bytes within this share of them."""

_POLICY, _BUDGET = "sampling.policy", "sampling.budget_tokens"
"""Options of a request that stand before the run's policy and budget."""


def full_kv(runs: pd.DataFrame) -> list[int | None]:
    """The position of each run's baseline under policy "full"; None where there is none, and for "full" itself."""
    runs = _described(runs)
    full = (runs["policy"] == "full").to_numpy()
    return _match(runs, full, ~full, MATCHED, PREFERRED)


def full_kv_of_same_pool(runs: pd.DataFrame) -> list[int | None]:
    """The same among the runs of the same memory and load, whose speeds may be compared."""
    runs = _described(runs)
    full = (runs["policy"] == "full").to_numpy()
    return _match(runs, full, ~full, MATCHED + POOL + LOAD, PREFERRED)


def random_with_prompt(runs: pd.DataFrame) -> list[int | None]:
    """The position of each run's control: random eviction of the same budget that protects the prompt.

    None where there is none, for the control itself and under full KV.
    """
    runs = _described(runs)
    control, compared = _controls(runs)
    return _match(runs, control, compared, MATCHED + BUDGET, (*PREFERRED, "policy."))


def random_of_as_many_bytes(runs: pd.DataFrame) -> list[int | None]:
    """The position of each run's control of as many bytes: random eviction that protects the prompt; None as above.

    A budget counts entries; a policy also holds queries, scores and positions, and these are counted here. Of the
    controls within 5 % of the run's bytes, the one that holds the fewest that are no fewer than the run's is taken;
    where all hold fewer, the one that holds the most.
    """
    runs = _described(runs)
    return _of_as_many_bytes(runs, *_controls(runs))


def random_alike(runs: pd.DataFrame) -> list[int | None]:
    """The position of each run's random eviction of the same budget that protects the same; None as above."""
    runs = _described(runs)
    control, compared = _random(runs)
    return _match(runs, control, compared, MATCHED + BUDGET + PROTECTION, (*PREFERRED, "policy."))


def random_alike_of_as_many_bytes(runs: pd.DataFrame) -> list[int | None]:
    """The position of each run's random eviction of as many bytes, by the same rule, that protects the same."""
    runs = _described(runs)
    return _of_as_many_bytes(runs, *_random(runs), PROTECTION)


def same_with_equal_budgets(runs: pd.DataFrame) -> list[int | None]:
    """The position of the run of the same policy, options and budget whose layers and heads keep as many as each other.

    None where there is none, and for a run that is such a one itself.
    """
    runs = _described(runs)
    allocation = runs.reindex(columns=[ALLOCATION]).astype(object).iloc[:, 0]
    unequal = (allocation.notna() & (allocation != "uniform")).to_numpy()
    same = ("policy.name", "policy.options.", *PROTECTION)
    return _match(runs, ~unequal, unequal, MATCHED + BUDGET + same, PREFERRED)


def fields(runs: pd.DataFrame) -> list[int | None]:
    """A number for the field that each run competes in: evicting policies of the same budget that protect the same.

    None under full KV.
    """
    runs = _described(runs)
    groups = _groups(runs, MATCHED + BUDGET + PROTECTION + FIELD)
    return [None if policy == "full" else int(group) for policy, group in zip(runs["policy"], groups, strict=True)]


def devices(runs: pd.DataFrame) -> list[str]:
    """The name of each run's GPU, or "cpu"; of a simulated run the GPU that was simulated, which says so."""
    options = runs.reindex(columns=["hardware.device", "provenance.hardware.gpus"])
    found = [_device(option, gpus) for option, gpus in options.itertuples(index=False)]
    told = zip(simulated(runs), options["provenance.hardware.gpus"], found)
    return [gpus[0] if is_simulated else device for is_simulated, gpus, device in told]


def _device(option: object, gpus: object) -> str:
    if option == "cpu" or not isinstance(gpus, list) or not gpus:
        return "cpu"
    number = str(option).partition(":")[2]
    return gpus[int(number) if number.isdigit() and int(number) < len(gpus) else 0]


def _described(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with their device, their requests' policy, the budget that held, whether they measure fidelity, the
    number of their replicas, which was 1 before there was an option for it, and their model's content, whatever its
    files were called.
    """
    content = runs[[name for name in runs if name.startswith("provenance.model_files.")]]
    content = [
        " ".join(sorted(hash for hash in row if isinstance(hash, str))) for row in content.itertuples(index=False)
    ]
    policy = first_given(runs, _POLICY, "policy.name", dtype=object)
    plain = runs.drop(columns=[_POLICY, _BUDGET], errors="ignore")
    held = {"budget": held_budgets(runs), "interval": held_intervals(runs)}
    fidelity = runs.reindex(columns=["scenario.kind"]).iloc[:, 0] == "fidelity"
    replicas = runs.reindex(columns=[REPLICAS]).astype(float).fillna(1)
    protection = runs.reindex(columns=list(PROTECTION)).mask(policy == "random_attention", "prompt")
    return plain.assign(
        device=devices(runs), policy=policy, fidelity=fidelity, model_content=content, **held, **replicas, **protection
    )


def _controls(runs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Masks over described runs: those of random eviction that protects the prompt, and those to compare with them."""
    control = runs["policy"] == "random_attention"
    control |= (runs["policy"] == "random") & (runs["policy.protection"] == "prompt")
    return control.to_numpy(), (~control & (runs["policy"] != "full")).to_numpy()


def _random(runs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Masks over described runs: those of random eviction, whatever it protects, and those to compare with them."""
    control = runs["policy"].isin(("random", "random_attention")).to_numpy()
    return control, ~control & (runs["policy"] != "full").to_numpy()


def _of_as_many_bytes(
    runs: pd.DataFrame, control: np.ndarray, compared: np.ndarray, matched: tuple[str, ...] = ()
) -> list[int | None]:
    column, off = BYTES
    held = runs.reindex(columns=[column]).astype(float).to_numpy()[:, 0]
    groups = _groups(runs, MATCHED + tuple(name for name in BUDGET if name != "budget") + matched)
    found: list[int | None] = [None] * len(runs)
    for i in np.flatnonzero(compared & (held > 0)):
        near = np.flatnonzero(control & (groups == groups[i]) & (np.abs(held - held[i]) <= off * held[i]))
        if len(near):
            found[i] = int(min(near, key=lambda j: (held[j] < held[i], abs(held[j] - held[i]))))
    return found


def _match(
    runs: pd.DataFrame,
    baselines: np.ndarray,
    compared: np.ndarray,
    matched: tuple[str, ...],
    preferred: tuple[str, ...],
) -> list[int | None]:
    """For each run in the mask `compared`, the position of the nearest one in the mask `baselines`."""
    groups = _groups(runs, matched)
    nearness = _codes(runs, preferred)
    ended = runs.reindex(columns=["provenance.ended"]).astype(str).to_numpy()[:, 0]
    latest_first = np.argsort(ended, kind="stable")[::-1]
    candidates: dict[int, list[int]] = {}
    for i in latest_first[baselines[latest_first]]:
        candidates.setdefault(int(groups[i]), []).append(int(i))
    found: list[int | None] = [None] * len(runs)
    for i in np.flatnonzero(compared):
        among = candidates.get(int(groups[i]))
        if among:
            found[i] = among[int((nearness[among] != nearness[i]).sum(1).argmin())]
    return found


def _groups(runs: pd.DataFrame, matched: tuple[str, ...]) -> np.ndarray:
    """A number for each set of runs that have all of these in common, [runs]."""
    return np.unique(_codes(runs, matched), axis=0, return_inverse=True)[1]


def _codes(runs: pd.DataFrame, names: tuple[str, ...]) -> np.ndarray:
    """A number for each distinct value of each column that `names` stand for, [runs, columns]; no value is one too."""
    groups = tuple(name for name in names if name.endswith("."))
    chosen = [column for column in runs if column in names or column.startswith(groups)]
    codes = [_numbered(runs[column].tolist()) for column in chosen]
    return np.array(codes).T if codes else np.zeros((len(runs), 1), int)


def _numbered(values: Iterable[Any]) -> list[int]:
    numbers: dict[str, int] = {}
    texts = ("" if value is None or value != value else str(value) for value in values)
    return [numbers.setdefault(text, len(numbers)) for text in texts]
