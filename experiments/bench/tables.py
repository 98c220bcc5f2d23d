"""A benchmark's rows as a table in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

from experiments.bench.rates import highest
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
    ("ttft_ms", "TTFT ms", lambda value: " / ".join(f"{time:,.0f}" for time in value.values())),
    ("e2e_ms", "E2E ms", lambda value: " / ".join(f"{time:,.0f}" for time in value.values())),
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


def _tails(times: dict[str, float]) -> str:
    return " / ".join(f"{1e3 * time:,.0f}" for time in times.values())


SERVERS: list[Column] = [
    ("load", "load", str),
    ("arm", "arm", str),
    ("rate", "requests/s", "{:g}".format),
    ("streams", "streams", "{:.0f}".format),
    ("ttft", "TTFT ms p50 / p90 / p99", _tails),
    ("itl", "ITL ms", _tails),
    ("tpot", "TPOT ms", _tails),
    ("e2e", "E2E ms", _tails),
    ("goodput", "in time/s", "{:.2f}".format),
    ("kept", "kept limits", _percent),
    ("slo_holds", "limits", lambda holds: "hold" if holds else "do not hold"),
    ("broken", "", lambda broken: "broken" if broken else ""),
    ("tokens_per_second", "tokens/s", "{:,.0f}".format),
    ("offline", "offline", "{:,.0f}".format),
    ("of_offline", "of offline", "{:.3f} x".format),
    ("tokens_per_second_user", "a user", "{:.1f}".format),
    ("sent", "sent", "{:.0f}".format),
    ("finished", "finished", "{:.0f}".format),
    ("failed", "failed", "{:.0f}".format),
    ("aborted", "aborted", "{:.0f}".format),
    ("short", "too short", "{:.0f}".format),
    ("most_running", "most running", "{:.0f}".format),
    ("waiting", "waiting", "{:.1f}".format),
    ("most_waiting", "most", "{:.0f}".format),
    ("preemptions", "preemptions", "{:.0f}".format),
    ("pauses", "pauses", "{:.0f}".format),
    ("compressions", "compressions", "{:.0f}".format),
    ("client_late", "client", lambda late: "late" if late else "on time"),
    ("client_cpu", "client CPU", _percent),
    ("startup_seconds", "start s", "{:.1f}".format),
    ("error", "first error", str),
    ("refused", "refused", str),
]


def _columns(rows: pd.DataFrame) -> list[Column]:
    if "kernel" in rows:
        return KERNELS
    return SERVERS if "slo" in rows else ENGINES


def markdown(rows: pd.DataFrame) -> str:
    """The rows of `load_rows`; columns that no row fills are left out."""
    import pandas as pd

    columns = [column for column in _columns(rows) if column[0] in rows and rows[column[0]].notna().any()]
    lines = []
    for _, row in rows.iterrows():
        values = [(row[name], show) for name, _, show in columns]
        lines.append([show(v) if isinstance(v, dict) or pd.notna(v) else "" for v, show in values])
    text = table([title for _, title, _ in columns], lines)
    if "slo" in rows and rows["rate"].notna().any():
        found = highest(rows)
        text += "\n\n" + table(list(found.columns), found.values.tolist())
    return text
