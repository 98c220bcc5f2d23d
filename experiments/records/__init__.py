"""Run folders: their names, how one is written so that half never passes for whole, and how all are read.

A run is written in `<run id>.partial` under a lock and renamed to `<run id>` when it is whole. Inside, `metrics.json`
is written last. A folder without it, and every `.partial` one, is incomplete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from experiments.errors import RunError, UsageError, one_line
from experiments.paths import RESULTS

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

METRICS, CONFIG, PROVENANCE = "metrics.json", "config.yaml", "provenance.json"
ROWS = "rows.json"
"""Of a benchmark, in the place of the three below."""
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
PARTIAL = ".partial"
TRACKING = "wandb"
SWEEPS = "sweeps"
"""Folder beside the runs with a file for each sweep, which lists its arms and their runs."""

_IN_DATA = ("name", "path", "parts", "tests", "allow_code_execution")
"""Options of model and workload that say where content lies or how it is read: the content is hashed itself."""

_NOT_SERVED = ("path", "kind", "loads", "repeats", "options")
"""Options of a scenario that decide nothing when a workload is served: the times of a trace are data, the rest is of
benchmarks."""

_LATER: dict[str, Any] = {
    "engine.async_scheduling": False,
    "sampling.presence_penalty": 0.0,
    "sampling.frequency_penalty": 0.0,
    "sampling.bad_words": [],
    "sampling.min_tokens": 0,
    "sampling.include_stop_str_in_output": False,
}
"""Options that came after the first records -> the value under which a run is what it was before them.

With that value an option is left out of the hash, so that a new option renames no run. Any other value is another run,
and so is a default that changes. Every new option of the schema gets a line here."""

LONGEST, _SHORTENED = 100, 32
"""Bytes of the names in the id of a run or sweep, and of each of a run's where they are more: with what goes before and
after, wandb takes 128 characters, and a file system 255 bytes."""

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


# Names


def content_hash(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_id(
    config: Mapping[str, Any], *, model: str, data: str, device: str, files: Mapping[str, str] | None = None
) -> str:
    """A readable prefix and a hash of everything that decides what a run measures.

    That is the config without tracking and without what only says where things lie, and in their place the content of
    the model, the content of the data and the name of the device. The code that comes with Zipage is no part of it: its
    hash is recorded, and `force` repeats a run after a change.

    Args:
        config: the resolved config as plain data.
        model, data: content hashes.
        device: name of the accelerator, or "cpu".
        files: sha256 of what else of the user's own the run reads, by name.
    """
    deciding = as_before(config)
    for key in ("tracking", "results_dir", "force"):
        deciding.pop(key, None)
    for group in ("model", "workload"):
        deciding[group] = {key: value for key, value in deciding[group].items() if key not in _IN_DATA}
    deciding["scenario"] = {key: value for key, value in deciding["scenario"].items() if key not in _NOT_SERVED}
    digest = content_hash([deciding, model, data, device, *([dict(files)] if files else [])])
    names = [config[group]["name"] for group in ("model", "workload", "policy")]
    return f"{_readable(names)}-{digest[:12]}"


def as_before(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the options that came later and ask for nothing new: hashes of it survive new options."""
    kept = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for option, before in _LATER.items():
        group, _, name = option.rpartition(".")
        options = kept.get(group, {}) if group else kept
        if name in options and (type(options[name]), options[name]) == (type(before), before):
            del options[name]
    return kept


def _readable(names: Iterable[str]) -> str:
    """The names as the beginning of a folder's name, which is neither hidden nor too long."""
    safe = [re.sub(r"[^\w.]+", "_", name) for name in names]
    if len("-".join(safe).encode()) > LONGEST:
        safe = [shortened(name, _SHORTENED) for name in safe]
    return re.sub(r"^\.", "_", "-".join(safe))


def shortened(name: str, most: int = LONGEST) -> str:
    """The beginning of a name, of at most so many bytes."""
    return os.fsencode(name)[:most].decode(errors="ignore")


# Writing


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is there whole or not at all, also after a crash of the machine."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def check_writable(results_dir: Path) -> None:
    """Raise a UsageError if no run folder can be made in `results_dir`; it is made where it is missing."""
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results_dir):
            return
    except OSError as error:
        raise UsageError(f"results_dir={results_dir}: can't be written: {error.strerror or error}") from error


def _json_hash(value: Any) -> str:
    """`content_hash` of a value as a JSON file gives it back."""
    return content_hash(json.loads(json.dumps(value, allow_nan=False)))


def is_complete(folder: Path) -> bool:
    """Whether a run has ended and left its record there. Whether that is whole still is for `damage` to say."""
    return (folder / METRICS).is_file()


def damage(folder: Path) -> str | None:
    """What is wrong with a complete record, in one line; None where all of it is as it was written.

    A record from before there were hashes is read instead.
    """
    try:
        if not (folder / ROWS).exists():
            _read_run(folder)
        _check_files(folder, whole=True)
    except Exception as error:  # a damaged file may lead to any
        return one_line(error)
    return None


def _check_files(folder: Path, *, whole: bool) -> None:
    """Raise an error if a file of a record is not as it was written; of the tables only the ends, unless `whole`."""
    import pyarrow.parquet as pq

    hashes = _read_metrics(folder)[1]
    for name, digest in (hashes or {}).items():
        if name != METRICS and (whole or not name.endswith(".parquet")) and file_hash(folder / name) != digest:
            raise ValueError(f"{name} is not as it was written")
    if (folder / ROWS).exists():
        json.loads((folder / ROWS).read_text(encoding="utf-8"))
    needed = [] if (folder / ROWS).exists() else [REQUESTS]
    for name in (*needed, *(name for name in (STEPS, EVENTS) if (folder / name).exists())):
        with pq.ParquetFile(folder / name) as file:
            for _ in file.iter_batches() if whole and hashes is None else ():
                pass


@contextmanager
def claim(folder: Path) -> Iterator[Path]:
    """Be the only process that makes the run `folder`, and write it in the empty staging folder that this yields.

    Waits while another process makes the same run: ask `is_complete` again after that. The staging folder is removed
    on any exception but a `RunError`, whose traceback it keeps until the next attempt.

    Raises:
        RunError: a file of the record could not be written.
    """
    staging = folder.with_name(folder.name + PARTIAL)
    with _exclusive(folder.parent / ".locks" / folder.name):
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            yield staging
        except RunError:
            raise
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise RunError(f"the record in {staging} can't be written: {error.strerror or error}") from error
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json` and give the staged run its name, in place of any record that was there.

    The metrics get a hash of each file, themselves included: see `damage`.
    """
    hashes = {}
    for path in sorted(path for path in staging.iterdir() if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        hashes[path.name] = file_hash(path)
    numbers = {key: value for key, value in metrics.items() if key != HASHES}
    write_json(staging / METRICS, numbers | {HASHES: hashes | {METRICS: _json_hash(numbers)}})
    replaced = folder.with_name(folder.name + ".replaced" + PARTIAL)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    staging.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the kernel lets go of it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is making {path.name}: waiting for it", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock before may have removed the file: then others can lock a new one of that name.
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


# Reading


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
            if CONFIG in files or where.endswith(PARTIAL):
                folders.clear()
                whole = METRICS in files and not where.endswith(PARTIAL)
                complete += [Path(where)] * whole
                incomplete += not whole
            folders[:] = sorted(name for name in folders if name != TRACKING and not name.startswith("."))
    return list(dict.fromkeys(complete)), incomplete


def read_sweep(path: Path) -> list[dict[str, Any]]:
    """The arms of a sweep: of each its "overrides" and the name of its "run".

    Raises:
        UsageError: the file can't be read, or is no sweep's.
    """
    try:
        arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
        if all(isinstance(arm["run"], str) and isinstance(arm["overrides"], list) for arm in arms):
            return arms
        reason = "no list of arms"
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = one_line(error)
    raise UsageError(f"{path}: is no record of a sweep ({reason})")


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
            row = _read_run(folder)
            _check_files(folder, whole=False)
        except Exception as error:  # a damaged file may lead to any, and costs the others nothing
            logger.warning("%s: skipped, its record is damaged (%s)", folder, one_line(error))
            continue
        rows.append(row)
    if incomplete:
        logger.warning("%d incomplete run%s skipped", incomplete, "s" * (incomplete > 1))
    runs = pd.DataFrame(rows)
    runs.attrs["incomplete"] = incomplete
    return runs


def load_rows(run: str | Path) -> pd.DataFrame:
    """One row for each line of a benchmark, given as its folder.

    Raises:
        UsageError: the folder is no benchmark's, or can't be read.
    """
    import pandas as pd

    try:
        return pd.DataFrame(json.loads((Path(run) / ROWS).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UsageError(f"{run}: no record of a benchmark ({one_line(error)})") from error


def load_requests(run: str | Path | pd.Series) -> pd.DataFrame:
    """One row for each sample of a run, given as its folder or as a row of `load_runs()`."""
    return _read_table(run, REQUESTS)


def load_steps(run: str | Path | pd.Series) -> pd.DataFrame:
    """One row for each engine step of a run, given as its folder or as a row of `load_runs()`."""
    return _read_table(run, STEPS)


def load_events(run: str | Path | pd.Series) -> pd.DataFrame:
    """One row for each compression, pause, resumption and preemption of a run, given as for `load_steps`.

    `kept_positions` are int32 arrays [layers, KV heads, entries], or None where the run did not trace them. A record
    from before there were events has none.
    """
    from experiments.records.outcomes import EVENT_SCHEMA

    if not (_folder(run) / EVENTS).exists():
        return EVENT_SCHEMA.empty_table().to_pandas()
    events = _read_table(run, EVENTS)
    pairs = zip(events["kept_positions"], events["kept_shape"], strict=True)
    events["kept_positions"] = [None if kept is None else kept.reshape(shape) for kept, shape in pairs]
    return events


def read_config(run: str | Path | pd.Series) -> dict[str, Any]:
    """The options of a run as they were nested, given as for `load_steps`."""
    return _parse_config((_folder(run) / CONFIG).read_text(encoding="utf-8"))


def _read_table(run: str | Path | pd.Series, name: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(_folder(run) / name)


def _folder(run: str | Path | pd.Series) -> Path:
    return Path(run if isinstance(run, str | Path) else run["path"])


def _read_run(folder: Path) -> dict[str, Any]:
    config = _parse_config((folder / CONFIG).read_text(encoding="utf-8"))
    provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    for name, part in ((CONFIG, config), (PROVENANCE, provenance)):
        if not isinstance(part, dict):
            raise ValueError(f"{name} holds no mapping")
    metrics = flatten(_read_metrics(folder)[0])
    options = flatten(config)
    for name in NAMES:
        if not isinstance(options.get(name), str):
            raise ValueError(f"{CONFIG} has no text as {name}")
    for name in NUMBERS:
        if not isinstance(metrics.get(name), int | float | None):
            raise ValueError(f"{METRICS} has no number as {name}")
    return {"run": folder.name, "path": str(folder)} | options | flatten({"provenance": provenance}) | metrics


def _read_metrics(folder: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    """The metrics, and the hashes of the record's files; None in a record from before there were any."""
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    if not isinstance(metrics, dict):
        raise ValueError(f"{METRICS} holds no mapping")
    hashes = metrics.pop(HASHES, None)
    if hashes is not None and hashes.get(METRICS) != content_hash(metrics):
        raise ValueError(f"{METRICS} is not as it was written")
    return metrics, hashes


def _parse_config(text: str) -> Any:
    """The YAML text as data. Groups are parsed one by one, for most are the same in many runs."""
    groups = re.split(r"^(?=\w)", text, flags=re.MULTILINE)
    try:
        return {key: value for group in groups if group for key, value in _parse_group(group).items()} or None
    except (yaml.YAMLError, AttributeError):  # no text of such groups, or none at all: the parser says it best
        return yaml.load(text, Loader=_Loader)


@lru_cache(maxsize=4096)
def _parse_group(text: str) -> dict[str, Any]:
    return yaml.load(text, Loader=_Loader)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names. Empty mappings are left out."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= flatten(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat
