"""What the files of one record say, and whether they are as they were written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from experiments.errors import one_line
from experiments.records.files import (
    CONFIG,
    EVENTS,
    HASHES,
    METRICS,
    NAMES,
    NUMBERS,
    OF_ENDED,
    PROVENANCE,
    REQUESTS,
    ROWS,
    STEPS,
)
from experiments.records.ids import content_hash, file_hash

if TYPE_CHECKING:
    import pandas as pd

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def is_complete(folder: Path) -> bool:
    """Whether a run has ended and left its record there. Whether that is whole still is for `damage` to say."""
    return (folder / METRICS).is_file()


def damage(folder: Path) -> str | None:
    """What is wrong with a complete record, in one line; None where all of it is as it was written.

    A record from before there were hashes is read instead.
    """
    try:
        if not (folder / ROWS).exists():
            read_run(folder)
        check_files(folder, whole=True)
    except Exception as error:  # a damaged file may lead to any
        return one_line(error)
    return None


def check_files(folder: Path, *, whole: bool) -> None:
    """Raise an error if a file of a record is not as it was written; of the tables only the ends, unless `whole`."""
    import pyarrow.parquet as pq

    hashes = read_metrics(folder)[1]
    for name, digest in (hashes or {}).items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if name != METRICS and (whole or not name.endswith(".parquet")) and file_hash(folder / name) != digest:
            raise ValueError(f"{name} is not as it was written")
    if (folder / ROWS).exists():
        json.loads((folder / ROWS).read_text(encoding="utf-8"))
    needed = [] if (folder / ROWS).exists() else [REQUESTS]
    for name in (*needed, *(name for name in (STEPS, EVENTS) if (folder / name).exists())):
        with pq.ParquetFile(folder / name) as file:
            for _ in file.iter_batches() if whole and hashes is None else ():
                pass


def table_path(folder: Path, name: str) -> Path:
    """The file of a table of a record, about to be read.

    Raises:
        ValueError, OSError: it is not as it was written, or the metrics that say so are not.
    """
    path = folder / name
    if is_complete(folder):
        digest = (read_metrics(folder)[1] or {}).get(name)
        if digest is not None and file_hash(path) != digest:
            raise ValueError(f"{name} is not as it was written")
    return path


def read_config(run: str | Path | pd.Series) -> dict[str, Any]:
    """The options of a run as they were nested, given as for `load_steps`."""
    return parse_config((run_folder(run) / CONFIG).read_text(encoding="utf-8"))


def run_folder(run: str | Path | pd.Series) -> Path:
    return Path(run if isinstance(run, str | Path) else run["path"])


def read_run(folder: Path) -> dict[str, Any]:
    config = parse_config((folder / CONFIG).read_text(encoding="utf-8"))
    provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    for name, part in ((CONFIG, config), (PROVENANCE, provenance)):
        if not isinstance(part, dict):
            raise ValueError(f"{name} holds no mapping")
    metrics = flatten(read_metrics(folder)[0])
    options = flatten(config)
    for name in NAMES:
        if not isinstance(options.get(name), str):
            raise ValueError(f"{CONFIG} has no text as {name}")
    for name in NUMBERS:
        if not isinstance(metrics.get(name), int | float | None):
            raise ValueError(f"{METRICS} has no number as {name}")
    if options.get("scenario.arrival") == "steady":  # the first records of one told those of its short requests
        metrics |= {name: None for name in metrics if name.partition(".")[0] in OF_ENDED}
    return {"run": folder.name, "path": str(folder)} | options | flatten({"provenance": provenance}) | metrics


def read_metrics(folder: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    """The metrics, and the hashes of the record's files; None in a record from before there were any."""
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    if not isinstance(metrics, dict):
        raise ValueError(f"{METRICS} holds no mapping")
    hashes = metrics.pop(HASHES, None)
    if hashes is not None and hashes.get(METRICS) != content_hash(metrics):
        raise ValueError(f"{METRICS} is not as it was written")
    return metrics, hashes


def parse_config(text: str) -> Any:
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
