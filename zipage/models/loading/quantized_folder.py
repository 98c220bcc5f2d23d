"""Model folders whose large tensors are stored as two: codes of a few bits, and scales of blocks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from zipage.models.loading.safetensors_folder import SafetensorsFolder
from zipage.models.shard import Piece

REMEDY = "download the model again"


class QuantizedFolder(ABC):
    """A folder in which NAME + `codes` and NAME + `scales` are read as one tensor, NAME; others are read as they are.

    Args:
        folder, device: as `SafetensorsFolder`'s.

    Attributes:
        shapes: name -> shape, of every tensor, as a checkpoint that is not quantized has it.

    Raises:
        FileNotFoundError, ValueError: as `SafetensorsFolder`; codes without scales or the other way, or of shapes or
            dtypes that don't fit. The message names the tensor.
    """

    what: ClassVar[str]
    """Its quantized tensors, in messages."""
    codes: ClassVar[str]
    scales: ClassVar[str]
    code_dtype: ClassVar[torch.dtype]
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]]
    packed: ClassVar[tuple[tuple[str, str], ...]]
    """As `SafetensorsFolder`'s."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._files = SafetensorsFolder(folder, device, self.packed)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._quantized: dict[str, tuple[int, ...]] = {}
        for stored, shape in self._files.shapes.items():
            if self._files.dtypes[stored] is self.code_dtype and stored.endswith(self.codes):
                name = stored.removesuffix(self.codes)
                self._check_scales(folder, name)
                self._quantized[name] = self.shapes[name] = self.shape_of(shape)
            elif not stored.endswith(self.scales):
                self.shapes[stored] = shape
        for stored in self._files.shapes:
            if stored.endswith(self.scales) and stored.removesuffix(self.scales) not in self._quantized:
                raise ValueError(f"{folder}: {stored} is of no {self.what}: {REMEDY}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor that is not quantized."""
        return next((self._files.dtypes[name] for name in self.shapes if name not in self._quantized), torch.bfloat16)

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """One tensor, or a piece of it. Raises a ValueError where a scale is none."""
        return self.dequantized(name, piece) if name in self._quantized else self._files.read(name, piece)

    def cost(self, dtype: torch.dtype) -> str:
        """What dequantizing to the model's dtype costs."""
        before = sum(self._files.num_bytes(name + end) for name in self._quantized for end in (self.codes, self.scales))
        after = sum(torch.Size(shape).numel() for shape in self._quantized.values()) * dtype.itemsize
        return (
            f"{self.what} are dequantized to the model's dtype: {before / 2**30:.1f} GiB of them take "
            f"{after / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}"
        )

    @abstractmethod
    def scale_shape(self, codes: tuple[int, ...]) -> tuple[int, ...] | None:
        """Of the scales of codes of a shape; None: no codes have it."""

    @abstractmethod
    def shape_of(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor that is stored as codes of a shape."""

    @abstractmethod
    def dequantized(self, name: str, piece: Piece | None) -> Tensor:
        """As `read`, of a quantized tensor."""

    def check_values(self, name: str, scales: Tensor, are_right: Tensor, rule: str) -> None:
        """Raise a ValueError where a scale of tensor NAME is wrong; `rule` ends the sentence "must be ..."."""
        if not are_right.all():
            wrong = scales[~are_right]
            raise ValueError(
                f"{self._files.folder}: {name}{self.scales} holds {wrong[0].item():.3g} ({len(wrong)} of "
                f"{scales.numel()} scales): must be {rule}: {REMEDY}"
            )

    def _check_scales(self, folder: Path, name: str) -> None:
        codes, scales = name + self.codes, name + self.scales
        shape, found = self._files.shapes[codes], self._files.shapes.get(scales)
        expected = self.scale_shape(shape)
        problem = None
        if expected is None:
            problem = f"{codes} is {list(shape)}, which no {self.what} are"
        elif found is None:
            problem = f"{codes} is quantized and {scales} is missing"
        elif found != expected:
            problem = f"{scales} is {list(found)}, not {list(expected)} as {codes} of {list(shape)} has it"
        elif self._files.dtypes[scales] not in self.scale_dtypes:
            problem = f"{scales} is {self._files.dtypes[scales]}, not {' or '.join(map(str, self.scale_dtypes))}"
        if problem:
            raise ValueError(f"{folder}: {problem}: {REMEDY}")
