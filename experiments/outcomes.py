"""The rows of a run: one for each sample, one for each engine step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.graders import Grader, grade
from experiments.prompts import Prompt
from experiments.workloads import Problem
from zipage import RequestMetrics, RequestOutput, StepStats

_ARROW = {int: pa.int64(), float: pa.float64(), float | None: pa.float64()}


def _columns(record: type) -> list[tuple[str, pa.DataType]]:
    """A column for each field of a dataclass."""
    hints = get_type_hints(record)
    return [(f.name, _ARROW[hints[f.name]]) for f in fields(record)]


REQUEST_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int64()),
        ("kind", pa.string()),
        ("prompt", pa.string()),
        ("output", pa.string()),
        ("output_token_ids", pa.list_(pa.int32())),
        ("gold", pa.string()),
        ("extracted", pa.string()),
        ("grade", pa.float64()),
        ("grader_error", pa.string()),
        ("finish_reason", pa.string()),
        ("stop_reason", pa.string()),
        ("error", pa.string()),
        *_columns(RequestMetrics),
    ]
)
"""Columns of `requests.parquet`: `grade` is in [0, 1], `arrival` in seconds from the start of the run."""

STEP_SCHEMA = pa.schema(_columns(StepStats))
"""Columns of `steps.parquet`: `time` is in seconds from the start of the run."""


def request_rows(
    problem: Problem, prompt: Prompt, output: RequestOutput, samples: int, grader: Grader, start: float
) -> list[dict[str, Any]]:
    """One row for each of the `samples` answers to a problem; a refused prompt has as many, graded 0.

    Args:
        start: host clock at the start of the run.
    """
    common = {"prompt_id": problem.id, "kind": problem.kind, "prompt": prompt.text, "gold": problem.gold}
    if output.error is not None:
        refused = {"output": "", "output_token_ids": [], "grade": 0.0, "finish_reason": "error", "error": output.error}
        timings = _timings(output.metrics, start)
        return [common | {"sample_index": index} | refused | timings for index in range(samples)]
    rows = []
    for sample in output.outputs:
        graded = grade(grader, sample.text, problem.gold)
        answer = {
            "sample_index": sample.index,
            "output": sample.text,
            "output_token_ids": sample.token_ids,
            "extracted": graded.extracted,
            "grade": graded.score,
            "grader_error": graded.error,
            "finish_reason": sample.finish_reason,
            "stop_reason": None if sample.stop_reason is None else str(sample.stop_reason),
        }
        rows.append(common | answer | _timings(sample.metrics, start))
    return rows


def _timings(metrics: RequestMetrics, start: float) -> dict[str, Any]:
    return asdict(metrics) | {"arrival": metrics.arrival - start}


def step_rows(steps: Sequence[StepStats], start: float) -> list[dict[str, Any]]:
    return [asdict(step) | {"time": step.time - start} for step in steps]


def write_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
