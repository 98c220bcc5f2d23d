"""Where a record comes from: code, command, versions, hardware."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.paths import ROOT

if TYPE_CHECKING:
    from experiments.simulation.machine import Machine

PACKAGES = (
    "zipage",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "datasets",
    "numpy",
    "vllm",
)

FOLDERS = re.compile(r"""(?<=[\s=\["',:])/(?:[^\s/"',\]]+/)+""")
"""The folders of an absolute path, in a config or a command line."""


def without_folders(text: str) -> str:
    """A config or a command line in which files that were given with their whole paths go by their names alone."""
    return FOLDERS.sub("", text)


def simulate_command(what: str, arguments: Sequence[str]) -> str:
    """A line of `python -m experiments.simulate`, as its records tell it."""
    return without_folders(f"python -m experiments.simulate {what} {shlex.join(arguments)}")


def collect(
    command: Sequence[str] | None = None, machine: Machine | None = None, code: dict[str, str] | None = None
) -> dict[str, Any]:
    """Everything about this process and this machine that a number may depend on.

    Args:
        command: what was run, where it is not this process's command line.
        machine: that the engine was simulated on: its GPU stands in the place of this machine's.
        code: `code_state` as it was before, where it may have changed since.
    """
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    simulated = {} if machine is None else {"simulated": asdict(machine)}
    return simulated | {
        "code": code_state() if code is None else code,
        "command": shlex.join([Path(sys.executable).name, *(sys.orig_argv[1:] if command is None else command)]),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "hardware": {
            "cpu": _cpu_model(),
            "cpus": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": gpus if machine is None else [f"{machine.name} (simulated)"],
            "driver": _driver(),
            "cuda": torch.version.cuda,
        },
        "system": platform.platform(),
    }


def code_state() -> dict[str, str]:
    """The commit, and a sha256 of what differs from it ("none" where nothing does).

    Where git can't tell, as in a copy without its history, the commit is `$ZIPAGE_COMMIT` or "unknown", and the
    difference "unknown".
    """
    commit = (_git("rev-parse", "--verify", "HEAD") or b"").decode().strip()
    if not commit:
        return {"commit": os.environ.get("ZIPAGE_COMMIT", "unknown"), "diff": "unknown"}
    if not _git("status", "--porcelain", "--untracked-files=all"):
        return {"commit": commit, "diff": "none"}
    digest = hashlib.sha256(_git("diff", "--binary", "HEAD") or b"")
    untracked = _git("ls-files", "--others", "--exclude-standard", "-z") or b""
    for name in sorted(untracked.split(b"\0")):
        path = ROOT / os.fsdecode(name)
        if name and path.is_file():
            digest.update(name + path.read_bytes())
    return {"commit": commit, "diff": digest.hexdigest()}


def device_name(device: str) -> str:
    """The accelerator that `hardware.device` means here: the GPU's model, or "cpu"."""
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name(0 if device == "auto" else device)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(*arguments: str) -> bytes | None:
    try:
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else None
