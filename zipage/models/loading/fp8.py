"""Weights stored as FP8: eight-bit floats (e4m3) with a scale for each block of rows and columns (DeepSeek-V3,
arXiv:2412.19437, section 3.3; Qwen3's checkpoints whose names end in FP8).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from zipage.models.loading.quantized_folder import QuantizedFolder
from zipage.models.shard import Piece


class Fp8Folder(QuantizedFolder):
    """A folder whose eight-bit tensors NAME.weight are read as float32, each value times its block's
    NAME.weight_scale_inv. A scale is what the largest code of its block was divided by: positive, or 0 where all are 0.

    Args:
        folder, device: as `SafetensorsFolder`'s.
        block: rows and columns of a block, which is cut off where the weight ends.
    """

    what = "FP8 weights"
    codes, scales = "", "_scale_inv"
    code_dtype, scale_dtypes = torch.float8_e4m3fn, (torch.float32, torch.bfloat16)
    packed = ((".weight", "F8_E4M3"),)

    def __init__(self, folder: Path, device: torch.device, block: tuple[int, int]) -> None:
        self._block = block
        super().__init__(folder, device)

    def scale_shape(self, codes: tuple[int, ...]) -> tuple[int, ...] | None:
        if len(codes) != 2:
            return None
        return tuple(-(-full // size) for full, size in zip(codes, self._block, strict=True))

    def shape_of(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        return codes

    def dequantized(self, name: str, piece: Piece | None) -> Tensor:
        codes = self._files.read(name, piece)
        first = [0, 0]
        if piece is not None:
            first[piece.axis] = min(piece.first, piece.full)
        scales = self._files.read(name + self.scales)
        self.check_values(name, scales, scales.isfinite() & (scales >= 0), "finite and not negative")
        if not scales.all() and dequantized(codes, (scales == 0).float(), self._block, tuple(first)).any():
            self.check_values(name, scales, scales > 0, "positive where codes are not zero")
        return dequantized(codes, scales, self._block, tuple(first))


def dequantized(codes: Tensor, scales: Tensor, block: tuple[int, int], first: tuple[int, int] = (0, 0)) -> Tensor:
    """float8 [rows, columns] and scales of the whole weight's blocks -> float32 [rows, columns].

    Args:
        block: rows and columns of a block.
        first: where in the weight the codes begin.
    """
    rows, columns = (
        torch.arange(start, start + count, device=codes.device) // size
        for start, count, size in zip(first, codes.shape, block, strict=True)
    )
    return codes.float().mul_(scales.float()[:, columns][rows])
