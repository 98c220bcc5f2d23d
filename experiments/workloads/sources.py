"""Where items come from: files on this disk, data sets on the hub."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from experiments.config.schema import WorkloadConfig
from experiments.errors import UsageError
from experiments.running.hub import quiet

Rows = list[dict[str, Any]]


def read_file(name: str) -> Rows:
    """The items of a .jsonl, .jsonl.gz or .parquet file.

    Raises:
        UsageError: it can't be read.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"workload.path={name}: no such file")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                return [_item(line, number) for number, line in enumerate(file, start=1) if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"workload.path={name}: {' '.join(str(error).split())[:200]}") from error
    raise UsageError(f"workload.path={name}: must end in .jsonl, .jsonl.gz or .parquet")


def _item(line: str, number: int) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is not valid JSON ({error})") from error
    if not isinstance(item, dict):
        raise ValueError(f"line {number} is not a JSON object")
    return item


def read_hub(config: WorkloadConfig) -> Rows:
    """The items of a split of a data set on the hub, or of a folder of data files.

    Raises:
        UsageError: it can't be had.
    """
    import datasets

    try:
        with quiet():
            rows = datasets.load_dataset(config.hub_id, config.subset, split=config.split, revision=config.revision)
        return list(rows)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"workload.hub_id={config.hub_id}: can't be loaded ({reason}): give a local file with workload.path=FILE"
        ) from error
