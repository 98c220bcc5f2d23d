"""A run's id: names to read, and a hash of everything that decides what it measures."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_IN_DATA = ("name", "path", "file", "parts", "tests", "allow_code_execution")
"""Options of model and workload that say where content lies or how it is read: the content is hashed itself."""

_NOT_SERVED = ("path", "kind", "loads", "repeats", "options")
"""Options of a scenario that decide nothing when a workload is served: the times of a trace are data, the rest is of
benchmarks."""

LATER: dict[str, Any] = {
    "workload.chain": None,
    "workload.turns": None,
    "workload.recalls": 0,
    "policy.interval": None,
    "policy.bytes_as": None,
    "policy.allocation": "uniform",
    "policy.allocation_options": {},
    "engine.async_scheduling": False,
    "engine.data_parallel_size": 1,
    "engine.swap_space": 0.0,
    "scenario.speed": 1.0,
    "scenario.seconds": None,
    "scenario.machine": None,
    "sampling.presence_penalty": 0.0,
    "sampling.frequency_penalty": 0.0,
    "sampling.bad_words": [],
    "sampling.min_tokens": 0,
    "sampling.include_stop_str_in_output": False,
}
"""Options that came after the first records -> the value under which a run is what it was before them.

With that value an option is left out of the hash, so that a new option renames no run. Any other value is another run,
and so is a default that changes. Every new option of the schema gets a line here."""

CALIBRATION = "policy.options.calibration"
"""An option that is a file, of which the content is hashed instead of the path."""

LONGEST, _SHORTENED = 100, 32
"""Bytes of the names in the id of a run or sweep, and of each of a run's where they are more: with what goes before and
after, wandb takes 128 characters, and a file system 255 bytes."""


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

    The config goes in without `tracking` and without paths. Instead of paths, the hash covers the content of the model,
    the content of the data and the name of the device. Zipage's own code is not part of it: a hash of that is recorded
    apart, and `force` repeats a run after a change.

    Args:
        config: the resolved config as plain data.
        model, data: content hashes.
        device: name of the accelerator, or "cpu".
        files: sha256 of the user's other files that the run reads, by name.
    """
    deciding = as_before(config)
    for key in ("tracking", "results_dir", "force"):
        deciding.pop(key, None)
    if CALIBRATION in (files or {}):
        options = {name: value for name, value in deciding["policy"]["options"].items() if name != "calibration"}
        deciding["policy"] = deciding["policy"] | {"options": options}
    for group in ("model", "workload"):
        deciding[group] = {key: value for key, value in deciding[group].items() if key not in _IN_DATA}
    deciding["scenario"] = {
        key: value
        for key, value in deciding["scenario"].items()
        if key not in _NOT_SERVED or (key, value) in (("kind", "fidelity"), ("kind", "simulate"))
    }
    digest = content_hash([deciding, model, data, device, *([dict(files)] if files else [])])
    names = [config[group]["name"] for group in ("model", "workload", "policy")]
    return f"{_readable(names)}-{digest[:12]}"


def benchmark_id(name: str, config: Mapping[str, Any], *, inputs: Any, device: str) -> str:
    """The same of a benchmark.

    Args:
        name: of its scenario.
        config: the resolved config as plain data, without what only says where things lie.
        inputs: what decides the result beside the config, as plain data.
    """
    digest = content_hash([as_before(config) | {"tracking": None}, inputs, device])
    return f"{name}-{digest[:12]}"


def as_before(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the options that came later and ask for nothing new: hashes of it survive new options."""
    kept = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for option, before in LATER.items():
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
    """A name cut to at most this many bytes."""
    return os.fsencode(name)[:most].decode(errors="ignore")
