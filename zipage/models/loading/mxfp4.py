"""Experts stored as MXFP4: blocks of 32 four-bit floats with a common exponent (OCP Microscaling, arXiv:2310.10537)."""

from __future__ import annotations

import torch
from torch import Tensor

from zipage.models.loading.quantized_folder import QuantizedFolder
from zipage.models.shard import Piece

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7; 8 to 15 are the same, negative."""
BLOCK = 32
BLOCK_BYTES = 16
"""Of a block, two floats a byte, the first in its lower half."""
BIAS = 127
"""Of a block's exponent."""
NO_EXPONENT = 255
"""What the format has for a block that is not a number."""


class Mxfp4Folder(QuantizedFolder):
    """A folder whose tensors NAME_blocks and NAME_scales are read as one, NAME, in bfloat16, which holds it exactly."""

    what = "MXFP4 experts"
    codes, scales = "_blocks", "_scales"
    code_dtype, scale_dtypes = torch.uint8, (torch.uint8,)
    packed = ((codes, "U8"), (scales, "U8"))

    def scale_shape(self, codes: tuple[int, ...]) -> tuple[int, ...] | None:
        return codes[:3] if len(codes) == 4 and codes[3] == BLOCK_BYTES else None

    def shape_of(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        experts, rows, blocks, _ = codes
        return experts, blocks * BLOCK, rows

    def dequantized(self, name: str, piece: Piece | None) -> Tensor:
        """Of a run of the inner dimension (axis 1) the blocks in which it lies are read."""
        stored, skipped = piece, 0
        if piece is not None and piece.axis == 1:
            begin, skipped = divmod(piece.first, BLOCK)
            stored = Piece(2, begin, -(-(piece.first + piece.count) // BLOCK) - begin, piece.full // BLOCK)
        elif piece is not None and piece.axis == 2:
            stored = piece.along(1)
        blocks, scales = (self._files.read(name + end, stored) for end in (self.codes, self.scales))
        self.check_values(name, scales, scales != NO_EXPONENT, f"below {NO_EXPONENT}, which is no exponent")
        values = dequantized(blocks, scales).mT
        return values if piece is None or piece.axis != 1 else values[:, skipped : skipped + piece.stored]


def dequantized(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [experts, rows, n, 16] and [experts, rows, n] -> bfloat16 [experts, rows, 32 * n]."""
    values = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.bfloat16, device=blocks.device)
    out = torch.empty((*scales.shape, BLOCK), dtype=torch.bfloat16, device=blocks.device)
    for expert, codes, exponents in zip(out, blocks, scales, strict=True):  # one by one, to save memory
        halves = values[torch.stack((codes & 15, codes >> 4), dim=-1).int()].flatten(-2)
        expert.copy_(torch.ldexp(halves, exponents.int()[..., None] - BIAS))
    return out.flatten(-2)
