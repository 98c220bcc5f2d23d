"""The tables of a record: one row for each sample, each engine step, and each event of a sample's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zipage import EventStats, RequestMetrics, StepStats

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
        ("place_grades", pa.list_(pa.float64())),
        ("recall_grades", pa.list_(pa.float64())),
        ("recall_distances", pa.list_(pa.int32())),
        ("answer_tokens", pa.list_(pa.int32())),
        ("grader_error", pa.string()),
        ("finish_reason", pa.string()),
        ("stop_reason", pa.string()),
        ("error", pa.string()),
        ("token_divergences", pa.list_(pa.float32())),
        ("token_agrees", pa.list_(pa.bool_())),
        ("logprob", pa.float64()),
        ("full_logprob", pa.float64()),
        ("unmeasured", pa.string()),
        ("worked_tokens", pa.int64()),
        ("worked_divergence", pa.float64()),
        ("worked_logprob", pa.float64()),
        ("worked_full_logprob", pa.float64()),
        ("worked_unmeasured", pa.string()),
        *_columns(RequestMetrics),
    ]
)
"""Columns of `requests.parquet`: `grade` is in [0, 1] or null, `arrival` in seconds from the start of the run.

`place_grades` are the grades at each place of a chain of questions or a conversation, whose mean is `grade`; null for
single questions.

Of a conversation `output` is a JSON list of the answers, and `answer_tokens` has the tokens of each with its end token;
a turn that the context had no room for has none. `recall_grades` and `recall_distances` have one element for each turn
that asks for something earlier: its grade, and the tokens from the end of what it asks for (an answer, or the question
that holds a number) to its own beginning, null where it was not answered. These three columns are null elsewhere.

`fact_distances` and `facts_known` have one element for each fact that the problem names: how far back it was stated, in
characters, and whether the answer knew it. They are null where a problem names none.

The columns from `token_divergences` to `worked_unmeasured` are of `scenario=fidelity`, else null
(`experiments.analysis.fidelity`). The first two have an element for each output token, to three digits;
log-probabilities and `worked_divergence` are sums over the tokens of a text, in nats. `unmeasured` and
`worked_unmeasured` say why a text could not be compared, such as one that the pool cut under full KV.
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


def write_rows(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for begin in range(0, len(rows), _ROW_GROUP):
            writer.write_table(pa.Table.from_pylist(rows[begin : begin + _ROW_GROUP], schema=schema))
