"""Experts with biases (gpt-oss): a GGUF file holds gate and up apart, a checkpoint as one, whose columns take turns."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from zipage.models.fields import MOST_EXPERTS
from zipage.models.loading.gguf_file import MXFP4, GgufFile
from zipage.models.shard import Piece

_PARTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
_SUFFIXES = {"weight": "", "bias": "_bias"}


@dataclass(frozen=True)
class JoinedExperts:
    """One tensor of all experts of a layer: [experts, columns, rows] of weights, [experts, rows] of biases.

    Attributes:
        parts: tensors of the file, [experts, rows / parts, columns] or [experts, rows / parts]; their rows take turns.
    """

    file: GgufFile
    parts: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, *columns = self.file.tensors[self.parts[0]].shape
        return experts, *columns, rows * len(self.parts)

    def read(self, piece: Piece | None) -> Tensor:
        """The tensor, or a piece of it. MXFP4 comes in bfloat16, which holds it exactly."""
        held = None
        for expert in range(self.shape[0]):  # one by one, to save memory
            of_parts = [self.file.read(part, range(expert, expert + 1))[0] for part in self.parts]
            rows = torch.stack(of_parts, dim=1).flatten(0, 1)
            one = rows.mT if rows.dim() == 2 else rows
            one = one if piece is None else piece.along(piece.axis - 1).of(one)
            if held is None:
                is_exact = self.file.tensors[self.parts[0]].ggml_type == MXFP4
                held = torch.empty(self.shape[0], *one.shape, dtype=torch.bfloat16 if is_exact else one.dtype)
            held[expert] = one
        return held


def joined_experts(file: GgufFile) -> dict[str, JoinedExperts]:
    """Hugging Face's names of the experts' tensors whose parts are all there, and alike."""
    joined = {}
    for name, tensor in file.tensors.items():
        layer = re.fullmatch(r"blk\.(\d+)\.(ffn_gate_exps|ffn_down_exps)\.(weight|bias)", name)
        if layer is None or tensor.shape[0] > MOST_EXPERTS or len(tensor.shape) != (3 if layer[3] == "weight" else 2):
            continue
        hf_name, stems = next(item for item in _PARTS.items() if layer[2] in item[1])
        parts = tuple(f"blk.{layer[1]}.{stem}.{layer[3]}" for stem in stems)
        if all(part in file.tensors and file.tensors[part].shape == tensor.shape for part in parts):
            joined[f"model.layers.{layer[1]}.mlp.experts.{hf_name}{_SUFFIXES[layer[3]]}"] = JoinedExperts(file, parts)
    return joined
