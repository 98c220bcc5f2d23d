"""Writing a record so that half of one never passes for whole.

A run is written in a `.partial` folder of its claim's own and renamed to `<run id>` when it is whole. Inside,
`metrics.json` is written last. A folder without it, and every `.partial` one, is incomplete.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from experiments.errors import RunError, UsageError
from experiments.records import claims
from experiments.records.files import CONFIG, HASHES, METRICS, PARTIAL
from experiments.records.ids import content_hash, file_hash

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is there whole or not at all, also after a crash of the machine."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}")  # several machines may write it at once
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


@contextmanager
def claim(folder: Path) -> Iterator[Path]:
    """Be the only process that makes the run `folder`, and write it in the empty staging folder that this yields.

    Waits while another process makes the same run: ask `is_complete` again after that. The staging folder is removed
    on any exception but a `RunError`, whose traceback it keeps until the next attempt.

    Raises:
        RunError: a file of the record could not be written, or another process took the run over.
    """
    with claims.hold(folder) as token:
        staging = folder.with_name(f"{folder.name}.{token}{PARTIAL}")
        try:
            for path in (folder.with_name(folder.name + PARTIAL), *_staged(folder)):
                _discard(path)
            staging.mkdir(parents=True)
            yield staging
        except RunError:
            raise
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            if not claims.is_mine(folder, token):
                raise RunError(f"another process makes {folder.name}: this one was silent for too long") from error
            raise RunError(f"the record in {staging} can't be written: {error.strerror or error}") from error
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        shutil.rmtree(staging, ignore_errors=True)


def _staged(folder: Path) -> list[Path]:
    """What others have begun of the run."""
    return sorted(folder.parent.glob(f"{glob.escape(folder.name)}.{'[0-9a-f]' * 12}{PARTIAL}"))


def _discard(staging: Path) -> None:
    """Remove it at one blow, so that an owner that wakes up publishes all of it or nothing."""
    with contextlib.suppress(FileNotFoundError):
        aside = staging.with_name(f".{staging.name}.discarded")
        shutil.rmtree(aside, ignore_errors=True)
        staging.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


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
    try:
        staging.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def stamp(folder: Path) -> tuple[int, int] | None:
    """Tells a complete record from any that replaces it; None where there is none."""
    with contextlib.suppress(OSError):
        claims.ask_again(folder.parent)
        found = (folder / METRICS).stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _json_hash(value: Any) -> str:
    """`content_hash` of a value as a JSON file gives it back."""
    return content_hash(json.loads(json.dumps(value, allow_nan=False)))
