"""Records of runs: their names (`ids`), how they are written (`store`), and how they are read (`content`, `load`)."""

from experiments.records.claims import ask_again
from experiments.records.content import damage, flatten, is_complete, read_config, table_path
from experiments.records.files import (
    CONFIG,
    EVENTS,
    HASHES,
    METRICS,
    PROVENANCE,
    REQUESTS,
    ROWS,
    STEPS,
    SWEEPS,
    TRACEBACK,
)
from experiments.records.ids import CALIBRATION, benchmark_id, content_hash, file_hash, run_id, shortened
from experiments.records.load import find_runs, load_events, load_requests, load_rows, load_runs, load_steps, read_sweep
from experiments.records.store import check_writable, claim, publish, stamp, write_config, write_json

__all__ = [
    "CALIBRATION",
    "CONFIG",
    "EVENTS",
    "HASHES",
    "METRICS",
    "PROVENANCE",
    "REQUESTS",
    "ROWS",
    "STEPS",
    "SWEEPS",
    "TRACEBACK",
    "ask_again",
    "benchmark_id",
    "check_writable",
    "claim",
    "content_hash",
    "damage",
    "file_hash",
    "find_runs",
    "flatten",
    "is_complete",
    "load_events",
    "load_requests",
    "load_rows",
    "load_runs",
    "load_steps",
    "publish",
    "read_config",
    "read_sweep",
    "run_id",
    "shortened",
    "stamp",
    "table_path",
    "write_config",
    "write_json",
]
