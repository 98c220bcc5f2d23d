"""The weights of a Hugging Face model folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zipage.checks import shown
from zipage.models.loading.hf_config import read_json
from zipage.models.shard import Piece

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_NAME = 255
"""Bytes of a file's name, on the file systems that are in use."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
"""Of tensors that mean something with others alone."""


class SafetensorsFolder:
    """Tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Only headers are read until `read`.

    Args:
        folder: holds the files.
        device: where `read` puts tensors.
        packed: ends of tensors' names, each with which of `CODES` such a tensor may be.

    Attributes:
        shapes, dtypes: name -> shape and dtype, of every tensor, shard by shard.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a file is broken, a tensor lies in two shards, a shard lacks a tensor that the index puts there, the
            index names a file elsewhere, or a tensor is not a float.
    """

    def __init__(self, folder: Path, device: torch.device, packed: tuple[tuple[str, str], ...] = ()) -> None:
        self.folder = folder
        self._packed = packed
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._shards: dict[str, safe_open] = {}
        self._shard_of: dict[str, str] = {}
        weight_map = self._weight_map()
        for shard in sorted({*weight_map.values()}) or [SINGLE]:
            self._open(shard, device)
        for name, shard in weight_map.items():
            if self._shard_of.get(name) != shard:
                raise ValueError(f"{folder / INDEX} puts {name} in {shard}, which does not hold it")
        if not self.shapes:
            raise ValueError(f"{folder / SINGLE} holds no tensors: download it again")

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor."""
        return next(iter(self.dtypes.values()))

    def num_bytes(self, name: str) -> int:
        """Of one tensor, in the file."""
        return torch.Size(self.shapes[name]).numel() * self.dtypes[name].itemsize

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """One tensor, in the file's dtype, or a piece of it; no more is read."""
        file = self._shards[self._shard_of[name]]
        if piece is None:
            return file.get_tensor(name)
        first = min(piece.first, piece.full)
        run = slice(first, first + piece.stored)
        return file.get_slice(name)[(slice(None),) * piece.axis + (run,)]

    def _weight_map(self) -> dict[str, str]:
        """Tensor name -> shard, as the index has it; empty for a single file, which comes first where both exist."""
        if (self.folder / SINGLE).is_file():
            return {}
        index = self.folder / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index} has no weight_map")
            for shard in weight_map.values():
                if not _names_a_file(shard):
                    raise ValueError(f"{index} names {shown(shard)}: must be the name of a file beside it")
            return weight_map
        found = sorted(file.name for pattern in ("*.safetensors", "*.bin") for file in self.folder.glob(pattern))
        hint = f" ({', '.join(found[:4])} there cannot be used)" if found else ""
        raise FileNotFoundError(
            f"{self.folder} has neither {SINGLE} nor {INDEX}{hint}: add the weights, or pass load_format='dummy'"
        )

    def _open(self, shard: str, device: torch.device) -> None:
        path = self.folder / shard
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {INDEX} names it: download the model again")
        try:
            file = safe_open(path, framework="pt", device=str(device))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}): download it again") from error
        self._shards[shard] = file
        for name in file.keys():  # noqa: SIM118 - not a dict
            if name in self._shard_of:
                raise ValueError(f"{self.folder}: tensor {name} lies in two shards, {self._shard_of[name]} and {shard}")
            tensor = file.get_slice(name)
            stored = tensor.get_dtype()
            if stored not in DTYPES and not any(stored == codes and name.endswith(end) for end, codes in self._packed):
                raise ValueError(f"{path}: tensor {name} is {stored}; supported: {', '.join(DTYPES)}")
            self._shard_of[name] = shard
            self.dtypes[name] = (DTYPES | CODES)[stored]
            self.shapes[name] = tuple(tensor.get_shape())


def _names_a_file(name: object) -> bool:
    """Whether a file of some folder may have that name."""
    if not isinstance(name, str) or name in ("", "..") or "\0" in name or Path(name).name != name:
        return False
    try:
        return len(os.fsencode(name)) <= LONGEST_NAME
    except UnicodeEncodeError:
        return False
