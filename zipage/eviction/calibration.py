"""The calibration file of a model: what a policy knows of its queries beforehand, per layer and head.

A safetensors file of float32 arrays `[L, rows, ...]`, whose rows are the model's KV heads, or its query heads in order.
Its header holds what the file is, and all that a model must have in common with the one it was made of.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipage.checks import shown

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
HEADER = "calibration"
"""Key of the file's metadata, a JSON object."""
Identity = Mapping[str, Any]
"""Of a model, as plain data: sizes, rotary frequencies, flags and a hash of its weights."""

COMMAND = "python -m experiments.calibrate MODEL --out FILE"


def write_calibration(
    path: Path, kind: str, arrays: Mapping[str, Tensor], identity: Identity, source: Mapping[str, Any]
) -> None:
    """Write a file.

    Args:
        kind: of policy.
        arrays: by name, [L, rows, ...]; stored in float32.
        identity: of the model.
        source: where the numbers come from: corpus and its hash, tokens, seed.
    """
    from safetensors.torch import save_file

    header = {"kind": kind, "version": VERSION, **identity, **source}
    path.parent.mkdir(parents=True, exist_ok=True)
    # One key, since safetensors writes several in no order: the same content is the same file.
    save_file(
        {name: array.float().cpu().contiguous() for name, array in arrays.items()}, path, {HEADER: json.dumps(header)}
    )


def read_calibration(
    path: str, kind: str, names: Sequence[str], identity: Identity, command: str = COMMAND
) -> dict[str, Tensor]:
    """The arrays `names` of a file, float32 [L, rows, ...], on the CPU. `command` makes one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no calibration file, one of another kind or model, or lacks an array; the message names all
            that differs.
    """
    from safetensors import SafetensorError, safe_open

    where = f"{kind}.calibration={shown(path)}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: there is no such file; make it: {command}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{where}: no calibration file can be read there ({error}); make it: {command}") from error
    wanted = {"kind": kind, "version": VERSION, **identity}
    differing = [
        f"{name} is {_told(header.get(name))}, not {_told(value)}"
        for name, value in wanted.items()
        if not _same(header.get(name), value)
    ]
    lacking = [f"it has no {name}, but {', '.join(arrays) or 'nothing'}" for name in names if name not in arrays]
    if differing or lacking:
        raise ValueError(f"{where}: made for another model or policy: {'; '.join(differing + lacking)}")
    found = {name: arrays[name].float() for name in names}
    layers, rows = identity["num_layers"], (identity["num_kv_heads"], identity["num_heads"])
    for name, array in found.items():
        if array.dim() < 2 or array.shape[0] != layers or array.shape[1] not in rows or not array.isfinite().all():
            raise ValueError(f"{where}: {name} {list(array.shape)} is not of {layers} layers and finite numbers")
    return found


def file_digest(path: str) -> str | None:
    """sha256 of a file, in hex; None where there is none."""
    try:
        status = Path(path).stat()
        return _digest(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return None


@lru_cache(maxsize=64)
def _digest(path: str, _changed: int, _size: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _same(found: Any, wanted: Any) -> bool:
    """Equal, floats up to what formats of models round off."""
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(_same, found, wanted))
    if isinstance(wanted, float):
        return isinstance(found, int | float) and math.isclose(found, wanted, rel_tol=1e-6)
    return found == wanted


def _told(value: Any) -> str:
    if isinstance(value, list):
        return f"of {len(value)} numbers from {value[0]:.4g} to {value[-1]:.4g}" if value else "empty"
    return "absent" if value is None else str(value)[:16]
