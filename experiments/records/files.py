"""What the files and folders of a record are called, and what each record has."""

from __future__ import annotations

METRICS, CONFIG, PROVENANCE = "metrics.json", "config.yaml", "provenance.json"
ROWS = "rows.json"
"""Of a benchmark, instead of the three below."""
REQUESTS, STEPS, EVENTS = "requests.parquet", "steps.parquet", "events.parquet"
TRACEBACK = "traceback.txt"
HASHES = "files"
"""Key of the metrics under which the hashes of a record's files are."""
NAMES = ("model.name", "workload.name", "policy.name", "policy.protection")
NUMBERS = (
    *("accuracy", "samples", "errors", "seconds", "load_seconds", "output_tokens_per_second", "output_length.mean"),
    *("ttft.p50", "tpot.p50", "peak_blocks", "kv_bytes.mean", "kv_bytes.max", "compressions", "budget_bound_share"),
    *("facts_known", "loop_rate", "finish_reasons.length"),
)
"""Options that each record has as texts, and metrics that are numbers where they are there: tables count on it."""
OF_ENDED = ("output_length", "ttft", "tpot", "e2e", "blocks_held", "kv_bytes")
"""Metrics of requests that ended, which a steady state does not tell: it ends while most are at work."""
PARTIAL = ".partial"
TRACKING = "wandb"
SWEEPS = "sweeps"
"""Folder beside the runs with a file for each sweep, which lists its arms and their runs."""
