"""Run folders with made-up numbers, as whole as real ones, for what is drawn and written from them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments import records
from experiments.analysis.metrics import summarise
from experiments.config.compose import load_experiment
from experiments.config.schema import to_dict
from experiments.records.schemas import EVENT_SCHEMA, REQUEST_SCHEMA, STEP_SCHEMA, write_rows

GPU = "NVIDIA H100 80GB HBM3"


@cache
def _options() -> dict[str, Any]:
    config = to_dict(load_experiment(["model=hf", "model.path=m", "engine.block_size=16"]))
    config["model"]["name"], config["workload"]["name"] = "tiny", "sums"
    return config


def make_run(
    folder: Path,
    name: str,
    policy: str = "full",
    budget: int | None = None,
    protection: str = "none",
    *,
    grades: Sequence[float | None] = (1.0, 0.0) * 10,
    lengths: Sequence[int] | None = None,
    arrivals: Sequence[float] | None = None,
    errors: Sequence[str | None] | None = None,
    facts: Sequence[tuple[list[int], list[bool]] | None] | None = None,
    places: Sequence[list[float]] | None = None,
    recalls: Sequence[list[float]] | None = None,
    steps: Sequence[dict[str, Any]] | None = None,
    events: Sequence[dict[str, Any]] = (),
    seconds: float = 10.0,
    options: dict[str, Any] | None = None,
    origin: dict[str, Any] | None = None,
) -> Path:
    """Write a whole run. One sample a problem.

    Args:
        lengths: output tokens of each sample.
        arrivals, errors: of each sample; all at once, and none.
        facts: distances and whether each was known, of each sample.
        places, recalls: grades of each question of a chain or conversation, and of what recalls, of each sample.
        steps, events: values of columns; the other columns hold what changes nothing.
        options, origin: values of the config and the provenance, by dotted name.
    """
    config, count = deepcopy(_options()), len(grades)
    _set(config, {"policy.name": policy, "policy.protection": protection, "policy.budget_tokens": budget or 512})
    _set(config, options or {})
    provenance = {
        "code": {"commit": "c" * 40, "diff": "none"},
        "command": f"python -m experiments.run policy={policy}",
        "hardware": {"gpus": [GPU]},
        "versions": {"torch": "2.13.0"},
        "data": "d0",
        "prompts": "p0",
        "started": "2026-01-01T00:00:00",
        "ended": "2026-01-01T00:00:10",
    }
    _set(provenance, origin or {})
    lengths = [100] * count if lengths is None else lengths
    requests = []
    for i, grade in enumerate(grades):
        row = {"prompt_id": f"p{i:03d}", "sample_index": 0, "grade": grade, "finish_reason": "stop", "error": None}
        row |= {"prompt_tokens": 20, "output_tokens": lengths[i], "output_token_ids": list(range(lengths[i]))}
        row |= {"error": errors[i]} if errors is not None else {}
        row |= {
            "arrival": 0.0 if arrivals is None else arrivals[i],
            "ttft": 0.1 * (i + 1),
            "tpot": 0.01 * (i + 1),
            "e2e": 0.5 * (i + 1),
        }
        row |= {"cached_tokens": 0, "preemptions": 0, "pauses": 0, "compressions": int(policy != "full")}
        if facts is not None and facts[i] is not None:
            row |= {"fact_distances": facts[i][0], "facts_known": facts[i][1]}
        row |= {"place_grades": places[i]} if places is not None else {}
        if recalls is not None:
            turns = len(places[i]) + len(recalls[i])
            row |= {"recall_grades": recalls[i], "recall_distances": [700 * (k + 1) for k in range(len(recalls[i]))]}
            row |= {"answer_tokens": [10] * (turns - (i == 0))}
        requests.append(row)
    blank = {field.name: 0 for field in STEP_SCHEMA}
    if steps is None:
        steps = [
            {"time": 0.1 * (i + 1), "step_time": 0.1, "num_decode": 8, "num_running": 8, "blocks_used": 40}
            for i in range(100)
        ]
    steps = [blank | {"step": i, "blocks_total": 100} | step for i, step in enumerate(steps)]
    rows = []
    for event in events:
        row = {"kind": "compress", "prompt_id": "p000", "sample_index": 0, "entries_before": 80, "entries_after": 64}
        row |= event
        if (kept := row.get("kept_positions")) is not None:
            row |= {"kept_positions": np.asarray(kept).ravel(), "kept_shape": np.shape(kept)}
        rows.append(row)
    run = folder / name
    run.mkdir(parents=True)
    records.write_config(run, config)
    records.write_json(run / records.PROVENANCE, provenance)
    write_rows(run / records.REQUESTS, requests, REQUEST_SCHEMA)
    write_rows(run / records.STEPS, steps, STEP_SCHEMA)
    write_rows(run / records.EVENTS, rows, EVENT_SCHEMA)
    metrics = summarise(requests, steps, rows, seconds=seconds, evicts=policy != "full")
    records.write_json(run / records.METRICS, metrics)
    return run


def _set(nested: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        *groups, option = name.split(".")
        inside = nested
        for group in groups:
            inside = inside[group]
        inside[option] = value
