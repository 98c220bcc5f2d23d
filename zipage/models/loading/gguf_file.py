"""The GGUF container: metadata, and tensors in ggml's types.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here because `gguf.GGUFReader`
makes several arrays for each of the vocabulary's strings, which takes seconds; dequantization is `gguf`'s.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zipage.models.fields import is_integer, is_number, is_text, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32, _F16, _BF16 = 0, 1, 30
MXFP4 = 39
"""Among ggml's types: 17 bytes a block of 32, the first of which is the exponent; 255 is none."""
_BROKEN = (struct.error, LookupError, ArithmeticError, MemoryError, RecursionError, TypeError, UnicodeDecodeError)
_KINDS: dict[type, tuple[Callable[[Any], bool], str]] = {
    int: (is_integer, "an integer"),
    float: (is_number, "a finite number"),
    str: (is_text, "a text"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
}
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
        ValueError: the file is not a GGUF file, broken, of another version, or a part of a split model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError(f"{path} is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._size = len(data)
                try:
                    self._parse(_Cursor(data, 4))
                except _BROKEN as error:
                    raise ValueError(f"{path}: broken GGUF header ({error!r}): download the file again") from error
        if self.get("split.count", int, 1) > 1:
            raise ValueError(f"{path} is one part of a split GGUF: join the parts with llama-gguf-split --merge")

    def get(self, key: str, kind: type | list[type], default: Any = None) -> Any:
        """A value of the metadata, or `default` without the key.

        Args:
            kind: int, float (integers too), str or bool; in a list of one, [int], a list of these.

        Raises:
            ValueError: the value is of another kind, or not finite; the message names the key.
        """
        if key not in self.metadata:
            return default
        value = self.metadata[key]
        is_right, what = _KINDS[kind[0] if isinstance(kind, list) else kind]
        if isinstance(kind, list):
            if not isinstance(value, list) or not all(map(is_right, value)):
                raise ValueError(f"{self.path}: GGUF key {key} is {shown(value)}: each of a list must be {what}")
        elif not is_right(value):
            raise ValueError(f"{self.path}: GGUF key {key} is {shown(value)}: must be {what}")
        return value

    def check_layout(self) -> None:
        """See that every tensor lies in the file, and no two in the same bytes.

        Raises:
            ImportError: one is quantized and the package `gguf` is absent.
            ValueError: one reaches past the end of the file or into another, or `gguf` does not know its type.
        """
        end, before = 0, ""
        for name, tensor in sorted(self.tensors.items(), key=lambda entry: entry[1].offset):
            if tensor.offset < end:
                raise ValueError(f"{self.path}: tensor {name} overlaps tensor {before}: download the file again")
            dtype, shape = self._stored(name)
            end, before = tensor.offset + math.prod(shape) * np.dtype(dtype).itemsize, name
            if end > self._size:
                raise ValueError(f"{self.path} ends before tensor {name} does: download the file again")

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """One tensor on the CPU: float32, float16 or bfloat16 as stored, float32 where it was quantized.

        Args:
            rows: these alone, none of which lies past the end; no others are read.

        Raises:
            ImportError: it is quantized and the package `gguf` is absent.
            ValueError: the file ends before the tensor does, or `gguf` does not know its type.
        """
        tensor = self.tensors[name]
        dtype, shape = self._stored(name)
        row = math.prod(shape[1:])
        if tensor.offset + shape[0] * row * np.dtype(dtype).itemsize > self._size:
            raise ValueError(f"{self.path} ends before tensor {name} does: download the file again")
        first, count = (0, shape[0]) if rows is None else (rows.start, len(rows))
        if count == 0:
            return torch.empty(0, *tensor.shape[1:])
        offset = tensor.offset + first * row * np.dtype(dtype).itemsize
        values = np.fromfile(self.path, dtype=dtype, count=count * row, offset=offset).reshape(count, *shape[1:])
        if tensor.ggml_type in _FLOATS:
            result = torch.from_numpy(values)
            return result.view(torch.bfloat16) if tensor.ggml_type == _BF16 else result
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        if tensor.ggml_type == MXFP4 and (values.reshape(-1, 17)[:, 0] == 255).any():
            raise ValueError(
                f"{self.path}: tensor {name} has a scale of 255, which is no exponent: download the file again"
            )
        # gguf works on 16 rows at a time: longer rows, of whole blocks all the same, take a third of the time.
        joined = math.gcd(values.shape[0], 32) if values.ndim == 2 else 1
        values = values.reshape(-1, joined * values.shape[-1])
        try:
            return torch.from_numpy(dequantize(values, GGMLQuantizationType(tensor.ggml_type))).view(
                count, *tensor.shape[1:]
            )
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: tensor {name}: {error}; convert the file to another type") from error

    def _stored(self, name: str) -> tuple[type[np.generic], tuple[int, ...]]:
        """A tensor as it lies in the file: floats of its shape, or the bytes of its quantized rows."""
        tensor = self.tensors[name]
        if tensor.ggml_type in _FLOATS:
            return _FLOATS[tensor.ggml_type], tensor.shape
        try:
            from gguf.constants import GGMLQuantizationType
            from gguf.quants import quant_shape_to_byte_shape
        except ImportError as error:
            raise ImportError(f"{self.path} is quantized, which takes the package gguf: pip install gguf") from error
        try:
            shape = quant_shape_to_byte_shape(tensor.shape, GGMLQuantizationType(tensor.ggml_type))
        except (ValueError, LookupError) as error:
            raise ValueError(f"{self.path}: tensor {name}: {error}; convert the file to another type") from error
        if len(shape) < 2:
            raise ValueError(
                f"{self.path}: tensor {name} has no rows to be quantized in: convert the file to another type"
            )
        return np.uint8, shape

    def _parse(self, cursor: _Cursor) -> None:
        version = cursor.scalar("I")
        if version not in VERSIONS:
            raise ValueError(f"{self.path} is GGUF version {version} or big-endian; supported: little-endian 2 and 3")
        num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(num_keys):
            key = cursor.string()
            if key in self.metadata:
                raise ValueError(f"{self.path} holds GGUF key {key} twice")
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        entries = []
        for _ in range(num_tensors):
            name = cursor.string()
            shape = tuple(reversed([cursor.scalar("Q") for _ in range(cursor.scalar("I"))]))
            entries.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
        alignment = self.get("general.alignment", int, 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: GGUF key general.alignment is {alignment}: must be a power of two")
        begin = -(-cursor.position // alignment) * alignment
        for name, shape, ggml_type, offset in entries:
            if name in self.tensors:
                raise ValueError(f"{self.path} holds tensor {name} twice")
            if not shape or 0 in shape:
                raise ValueError(f"{self.path}: tensor {name} has shape {list(shape)}: must have elements")
            if offset % alignment:
                raise ValueError(f"{self.path}: tensor {name} lies at {offset}, no multiple of {alignment}")
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
