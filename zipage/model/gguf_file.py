"""The GGUF container: metadata, and tensors in ggml's types.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here because `gguf.GGUFReader`
makes several arrays for each of the vocabulary's strings, which takes seconds; dequantization is `gguf`'s.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32, _F16, _BF16 = 0, 1, 30
_BROKEN = (struct.error, LookupError, ArithmeticError, MemoryError, RecursionError, TypeError, UnicodeDecodeError)
_FLOATS = {_F32: np.float32, _F16: np.float16, _BF16: np.int16}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's entry in the header: shape (outermost axis first), ggml type and offset in the file."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


class GgufFile:
    """A GGUF file, version 2 or 3, little-endian, in one piece.

    Attributes:
        path: of the file.
        metadata: key -> number, bool, string or list.
        tensors: name -> entry, in the file's order.

    Raises:
        ValueError: the file is no GGUF, broken, of another version, or a part of a split model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError(f"{path} is no GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._size = len(data)
                try:
                    self._parse(_Cursor(data, 4))
                except _BROKEN as error:
                    raise ValueError(f"{path}: broken GGUF header ({error!r}): download the file again") from error
        if self.metadata.get("split.count", 1) > 1:
            raise ValueError(f"{path} is one part of a split GGUF: join the parts with llama-gguf-split --merge")

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU: float32, float16 or bfloat16 as stored, float32 where it was quantized.

        Raises:
            ImportError: it is quantized and the package `gguf` is absent.
            ValueError: the file ends before the tensor does, or `gguf` does not know its type.
        """
        tensor = self.tensors[name]
        if tensor.ggml_type in _FLOATS:
            values = self._numbers(name, _FLOATS[tensor.ggml_type], tensor.shape)
            result = torch.from_numpy(values)
            return result.view(torch.bfloat16) if tensor.ggml_type == _BF16 else result
        try:
            from gguf.constants import GGMLQuantizationType
            from gguf.quants import dequantize, quant_shape_to_byte_shape
        except ImportError as error:
            raise ImportError(f"{self.path} is quantized, which takes the package gguf: pip install gguf") from error
        try:
            ggml_type = GGMLQuantizationType(tensor.ggml_type)
            values = self._numbers(name, np.uint8, quant_shape_to_byte_shape(tensor.shape, ggml_type))
            # gguf works on 16 rows at a time: longer rows, of whole blocks all the same, take a third of the time.
            joined = math.gcd(values.shape[0], 32) if values.ndim == 2 else 1
            values = values.reshape(-1, joined * values.shape[-1])
            return torch.from_numpy(dequantize(values, ggml_type)).view(tensor.shape)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: tensor {name}: {error}; convert the file to another type") from error

    def _numbers(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
        count = int(np.prod(shape))
        offset = self.tensors[name].offset
        if offset + count * np.dtype(dtype).itemsize > self._size:
            raise ValueError(f"{self.path} ends before tensor {name} does: download the file again")
        return np.fromfile(self.path, dtype=dtype, count=count, offset=offset).reshape(shape)

    def _parse(self, cursor: _Cursor) -> None:
        version = cursor.scalar("I")
        if version not in VERSIONS:
            raise ValueError(f"{self.path} is GGUF version {version} or big-endian; supported: little-endian 2 and 3")
        num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(num_keys):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        entries = []
        for _ in range(num_tensors):
            name = cursor.string()
            shape = tuple(reversed([cursor.scalar("Q") for _ in range(cursor.scalar("I"))]))
            entries.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        begin = -(-cursor.position // alignment) * alignment
        for name, shape, ggml_type, offset in entries:
            if name in self.tensors:
                raise ValueError(f"{self.path} holds tensor {name} twice")
            self.tensors[name] = GgufTensor(shape, ggml_type, begin + offset)


class _Cursor:
    """Reads GGUF's metadata values one after the other."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data = data
        self.position = position

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        begin = self.position + 8
        end = begin + self.scalar("Q")
        if end > len(self.data):
            raise struct.error("a string reaches past the end of the file")
        self.position = end
        return self.data[begin:end].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind == _ARRAY:
            return [self.value(_ARRAY) for _ in range(count)]
        code = f"<{count}{_SCALARS[kind]}"
        values = struct.unpack_from(code, self.data, self.position)
        self.position += struct.calcsize(code)
        return list(values)
