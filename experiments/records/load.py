"""Records as data frames: one row for each run, sample, step or event."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import UsageError, one_line
from experiments.paths import RESULTS
from experiments.records.content import check_files, is_complete, read_run, run_folder, table_path
from experiments.records.files import CONFIG, EVENTS, METRICS, PARTIAL, REQUESTS, ROWS, STEPS, TRACKING

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


def find_runs(paths: str | Path | Iterable[str | Path] | None = None) -> tuple[list[Path], int]:
    """The complete run folders in and below `paths`, in order, and the number of incomplete ones.

    A file among `paths` is a sweep's: its runs, in the order of its arms.
    """
    if paths is None:
        paths = [RESULTS] if RESULTS.exists() else []
    elif isinstance(paths, str | Path):
        paths = [paths]
    complete, incomplete = [], 0
    for path in map(Path, paths):
        if path.is_file():
            runs = [path.parents[1] / arm["run"] for arm in read_sweep(path)]
            complete += [run for run in runs if is_complete(run)]
            incomplete += sum(not is_complete(run) for run in runs)
            continue
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder of runs")
        for where, folders, files in os.walk(path):
            if {CONFIG, METRICS} & {*files} or where.endswith(PARTIAL):
                folders.clear()
                whole = METRICS in files and not where.endswith(PARTIAL)
                complete += [Path(where)] * whole
                incomplete += not whole
            folders[:] = sorted(name for name in folders if name != TRACKING and not name.startswith("."))
    return list(dict.fromkeys(complete)), incomplete


def read_sweep(path: Path) -> list[dict[str, Any]]:
    """The arms of a sweep: of each its "overrides" and the name of its "run".

    Raises:
        UsageError: the file can't be read, or is not a sweep's.
    """
    try:
        arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
        if all(isinstance(arm["run"], str) and isinstance(arm["overrides"], list) for arm in arms):
            return arms
        reason = "no list of arms"
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = one_line(error)
    raise UsageError(f"{path}: is not the record of a sweep ({reason})")


def load_runs(paths: str | Path | Iterable[str | Path] | None = None) -> pd.DataFrame:
    """One row for each complete run in and below `paths`, folders of runs or files of sweeps; None: `results/runs`.

    Benchmarks are left out: `load_rows` reads them.

    Columns: `run`, `path`, the options ("engine.block_size"), the provenance ("provenance.commit") and the metrics
    ("accuracy", "ttft.p50"). Incomplete runs are counted in one log line and in `attrs["incomplete"]`; a damaged record
    costs a log line.

    Raises:
        UsageError: a path does not exist.
    """
    import pandas as pd

    folders, incomplete = find_runs(paths)
    rows = []
    for folder in folders:
        if (folder / ROWS).exists():
            continue
        try:
            row = read_run(folder)
            check_files(folder, whole=False)
        except Exception as error:  # a damaged file may lead to any, and costs the others nothing
            logger.warning("%s: skipped, its record is damaged (%s)", folder, one_line(error))
            continue
        rows.append(row)
    if incomplete:
        logger.warning(
            "%d incomplete run%s skipped: in progress, stopped or never begun; running one again removes its %s folder",
            incomplete, "s" * (incomplete > 1), PARTIAL,
        )  # fmt: skip
    runs = pd.DataFrame(rows)
    runs.attrs["incomplete"] = incomplete
    return runs


def load_rows(run: str | Path) -> pd.DataFrame:
    """One row for each line of a benchmark, given as its folder.

    Raises:
        UsageError: the folder is not a benchmark's, or can't be read.
    """
    import pandas as pd

    try:
        return pd.DataFrame(json.loads((Path(run) / ROWS).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UsageError(f"{run}: no record of a benchmark ({one_line(error)})") from error


def load_requests(run: str | Path | pd.Series) -> pd.DataFrame:
    """One row for each sample of a run, given as its folder or as a row of `load_runs()`.

    Raises:
        OSError, ValueError: the table can't be read, or is not as it was written.
    """
    return _read_table(run, REQUESTS)


def load_steps(run: str | Path | pd.Series) -> pd.DataFrame:
    """One row for each engine step of a run, given as its folder or as a row of `load_runs()`."""
    return _read_table(run, STEPS)


def load_events(run: str | Path | pd.Series) -> pd.DataFrame:
    """One row for each compression, pause, resumption and preemption of a run, given as for `load_steps`.

    `kept_positions` are int32 arrays [layers, KV heads, entries], or None where the run did not trace them. A record
    from before there were events has none.
    """
    from experiments.records.schemas import EVENT_SCHEMA

    if not (run_folder(run) / EVENTS).exists():
        return EVENT_SCHEMA.empty_table().to_pandas()
    events = _read_table(run, EVENTS)
    pairs = zip(events["kept_positions"], events["kept_shape"], strict=True)
    events["kept_positions"] = [None if kept is None else kept.reshape(shape) for kept, shape in pairs]
    return events


def _read_table(run: str | Path | pd.Series, name: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(table_path(run_folder(run), name))
