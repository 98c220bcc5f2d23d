"""Experts stored as MXFP4: blocks of 32 four-bit floats with a common exponent (OCP Microscaling, arXiv:2310.10537)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from zipage.models.loading.safetensors_folder import SafetensorsFolder
from zipage.models.shard import Piece

logger = logging.getLogger(__name__)

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7; 8 to 15 are the same, negative."""
BLOCK_BYTES = 16
"""Of 32 floats, two a byte, the first in its lower half."""
BIAS = 127
"""Of a block's exponent."""
BLOCKS, SCALES = "_blocks", "_scales"


class Mxfp4Folder:
    """A folder whose tensors NAME_blocks and NAME_scales are read as one, NAME, in bfloat16, which holds it exactly.

    Args:
        folder, device: as `SafetensorsFolder`'s.

    Attributes:
        shapes: name -> shape, of every tensor, as a checkpoint that is not packed has it.

    Raises:
        FileNotFoundError, ValueError: as `SafetensorsFolder`; blocks and scales don't fit.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._files = SafetensorsFolder(folder, device, packed=(BLOCKS, SCALES))
        stored = self._files.shapes
        self._packed = {name.removesuffix(BLOCKS): shape for name, shape in stored.items() if name.endswith(BLOCKS)}
        self.shapes = {name: shape for name, shape in stored.items() if not name.endswith((BLOCKS, SCALES))}
        for name, shape in self._packed.items():
            scales = stored.get(name + SCALES)
            if len(shape) != 4 or shape[3] != BLOCK_BYTES or scales != shape[:3]:
                shapes = f"{list(shape)} and {list(scales or ())}"
                raise ValueError(f"{folder}: {name}{BLOCKS} and {SCALES}, {shapes}, are not MXFP4: download it again")
            experts, rows, blocks, _ = shape
            self.shapes[name] = (experts, blocks * 2 * BLOCK_BYTES, rows)
        left_over = [name for name in stored if name.endswith(SCALES) and name.removesuffix(SCALES) not in self._packed]
        if left_over:
            raise ValueError(f"{folder}: {left_over[0]} has no blocks: download it again")
        packed = sum(torch.Size(shape).numel() for shape in self._packed.values())
        logger.warning(
            "MXFP4 experts are dequantized to the model's dtype: %.1f GiB of them take %.1f GiB in bfloat16",
            (packed + packed / BLOCK_BYTES) / 2**30,
            4 * packed / 2**30,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._files.dtype

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """One tensor; a piece of a packed one is some of its experts (axis 0)."""
        if name not in self._packed:
            return self._files.read(name, piece)
        blocks, scales = (self._files.read(name + suffix, piece) for suffix in (BLOCKS, SCALES))
        return dequantized(blocks, scales).mT


def dequantized(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [experts, rows, n, 16] and [experts, rows, n] -> bfloat16 [experts, rows, 32 * n]."""
    values = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.bfloat16, device=blocks.device)
    out = torch.empty((*scales.shape, 2 * BLOCK_BYTES), dtype=torch.bfloat16, device=blocks.device)
    for expert, codes, exponents in zip(out, blocks, scales, strict=True):  # one by one, to save memory
        halves = values[torch.stack((codes & 15, codes >> 4), dim=-1).int()].flatten(-2)
        expert.copy_(torch.ldexp(halves, exponents.int()[..., None] - BIAS))
    return out.flatten(-2)
