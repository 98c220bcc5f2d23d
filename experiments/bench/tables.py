"""A benchmark's rows as a table in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

from experiments.reporting.markdown import markdown as table

Column = tuple[str, str, Callable[[Any], str]]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


KERNELS: list[Column] = [
    ("kernel", "kernel", str),
    ("shape", "shape", str),
    ("bytes", "MB", lambda value: f"{value / 1e6:,.1f}"),
    ("flops", "GFLOP", lambda value: f"{value / 1e9:,.1f}"),
    ("ms", "ms", "{:.3f}".format),
    ("p10_ms", "p10", "{:.3f}".format),
    ("p90_ms", "p90", "{:.3f}".format),
    ("of_copy", "of copy", _percent),
    ("of_roofline", "of roofline", _percent),
    ("error", "error", "{:.1e}".format),
    ("refused", "refused", str),
]
ENGINES: list[Column] = [
    ("load", "load", str),
    ("arm", "arm", str),
    ("tokens_per_second", "tokens/s", "{:,.0f}".format),
    ("lowest", "lowest", "{:,.0f}".format),
    ("highest", "highest", "{:,.0f}".format),
    ("floor_tokens_per_second", "floor", "{:,.0f}".format),
    ("of_floor", "of floor", _percent),
    ("step_ms", "step ms p50 / p90 / p99", lambda value: " / ".join(f"{time:.2f}" for time in value.values())),
    ("host_ms", "host ms", "{:.2f}".format),
    ("gpu_idle", "GPU idle", _percent),
    ("steps", "steps", "{:,.0f}".format),
    ("mean_batch", "batch", "{:.0f}".format),
    ("step_bytes", "GB a step", lambda value: f"{value / 1e9:.1f}"),
    ("compressions", "compressions", "{:.0f}".format),
    ("compression_ms", "compression ms", "{:.1f}".format),
    ("pauses", "pauses", "{:.0f}".format),
    ("preemptions", "preemptions", "{:.0f}".format),
    ("startup_seconds", "start s", "{:.1f}".format),
    ("memory_bytes", "GB", lambda value: f"{value / 1e9:.1f}"),
    ("refused", "refused", str),
]


def markdown(rows: pd.DataFrame) -> str:
    """The rows of `load_rows`; columns that no row fills are left out."""
    import pandas as pd

    columns = KERNELS if "kernel" in rows else ENGINES
    columns = [column for column in columns if column[0] in rows and rows[column[0]].notna().any()]
    lines = []
    for _, row in rows.iterrows():
        values = [(row[name], show) for name, _, show in columns]
        lines.append([show(v) if isinstance(v, dict) or pd.notna(v) else "" for v, show in values])
    return table([title for _, title, _ in columns], lines)
