"""The rows of a run: one for each sample, each engine step, and each event of a sample's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.graders import Grade, Grader, grade
from experiments.graders.ungraded import grade_none
from experiments.running.prompts import Prompt
from experiments.workloads import Problem
from zipage import EventStats, RequestMetrics, RequestOutput, StepStats

_ARROW = {
    int: pa.int64(),
    int | None: pa.int64(),
    bool | None: pa.bool_(),
    float: pa.float64(),
    float | None: pa.float64(),
    str: pa.string(),
    np.ndarray | None: pa.list_(pa.int32()),
}
_ROW_GROUP = 256
"""Rows written at once: a row of events can hold a million positions, and a list column 2^31 of them."""


def _columns(record: type) -> list[tuple[str, pa.DataType]]:
    """A column for each field of a dataclass."""
    hints = get_type_hints(record, localns={"np": np})
    return [
        (f.name, pa.string() if get_origin(hints[f.name]) is Literal else _ARROW[hints[f.name]]) for f in fields(record)
    ]


REQUEST_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int64()),
        ("kind", pa.string()),
        ("prompt", pa.string()),
        ("output", pa.string()),
        ("output_token_ids", pa.list_(pa.int32())),
        ("gold", pa.string()),
        ("difficulty", pa.string()),
        ("expected_tokens", pa.int64()),
        ("fact_distances", pa.list_(pa.int32())),
        ("facts_known", pa.list_(pa.bool_())),
        ("extracted", pa.string()),
        ("grade", pa.float64()),
        ("grader_error", pa.string()),
        ("finish_reason", pa.string()),
        ("stop_reason", pa.string()),
        ("error", pa.string()),
        *_columns(RequestMetrics),
    ]
)
"""Columns of `requests.parquet`: `grade` is in [0, 1] or null, `arrival` in seconds from the start of the run.

`fact_distances` and `facts_known` have one element for each fact that the problem names: how far back it was stated, in
characters, and whether the answer knew it. They are null where a problem names none.
"""

STEP_SCHEMA = pa.schema(_columns(StepStats))
"""Columns of `steps.parquet`: `time` is in seconds from the start of the run."""

EVENT_SCHEMA = pa.schema(
    [
        *(("prompt_id" if name == "request_id" else name, kind) for name, kind in _columns(EventStats)),
        ("kept_shape", pa.list_(pa.int32())),
    ]
)
"""Columns of `events.parquet`: `time` is in seconds from the start of the run, `kept_positions` in row-major order."""


def request_rows(
    problem: Problem, prompt: Prompt, output: RequestOutput, samples: int, grader: Grader, start: float
) -> list[dict[str, Any]]:
    """One row for each of the `samples` answers to a problem; a refused prompt has as many. An error is graded 0.

    Args:
        start: host clock at the start of the run.
    """
    common = {"prompt_id": problem.id, "kind": problem.kind, "prompt": prompt.text, "gold": problem.gold}
    common |= {"difficulty": problem.difficulty, "expected_tokens": problem.expected_tokens}
    if problem.facts:
        common["fact_distances"] = [fact.distance for fact in problem.facts]
    zero = None if grader is grade_none else 0.0
    if output.error is not None and all(sample.error is None for sample in output.outputs):
        refused = {"output": "", "output_token_ids": [], "finish_reason": "error", "error": output.error, "grade": zero}
        if problem.facts:
            refused["facts_known"] = [False] * len(problem.facts)
        timings = _timings(output.metrics, start)
        return [common | {"sample_index": index} | refused | timings for index in range(samples)]
    rows = []
    for sample in output.outputs:
        graded = Grade(zero) if sample.error is not None else grade(grader, sample.text, problem.gold)
        answer = {
            "sample_index": sample.index,
            "output": sample.text,
            "output_token_ids": sample.token_ids,
            "extracted": graded.extracted,
            "grade": graded.score,
            "grader_error": graded.error,
            "finish_reason": sample.finish_reason,
            "error": sample.error,
            "stop_reason": None if sample.stop_reason is None else str(sample.stop_reason),
        }
        if problem.facts:
            answer["facts_known"] = [fact.known(sample.text) for fact in problem.facts]
        rows.append(common | answer | _timings(sample.metrics, start))
    return rows


def _timings(metrics: RequestMetrics, start: float) -> dict[str, Any]:
    return asdict(metrics) | {"arrival": metrics.arrival - start}


def step_rows(steps: Sequence[StepStats], start: float) -> list[dict[str, Any]]:
    return [asdict(step) | {"time": step.time - start} for step in steps]


def event_rows(events: Sequence[EventStats], start: float) -> list[dict[str, Any]]:
    rows = []
    for event in events:
        row = {f.name: getattr(event, f.name) for f in fields(event)}  # asdict would copy the positions
        row |= {"prompt_id": row.pop("request_id"), "time": event.time - start}
        if event.kept_positions is not None:
            row |= {"kept_positions": event.kept_positions.ravel(), "kept_shape": event.kept_positions.shape}
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for begin in range(0, len(rows), _ROW_GROUP):
            writer.write_table(pa.Table.from_pylist(rows[begin : begin + _ROW_GROUP], schema=schema))
