"""The MLP of a sparse layer: a router and its experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.expert_mlp import expert_mlp
from kernels.route import route
from zipage.models.expert_spec import ExpertSpec
from zipage.models.mlp import GatedMLP, new_parameter, prefixed
from zipage.models.shard import Piece, Shard


class SparseMLP(nn.Module):
    """A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538), as Qwen's models have it.

    The router is float32, whatever the model's dtype, and whole on each rank; the experts are split by their inner
    width. So all ranks send a token to the same experts.

    Args:
        width: of the residual stream.
    """

    def __init__(self, width: int, spec: ExpertSpec, *, dtype: torch.dtype, device: torch.device, shard: Shard) -> None:
        super().__init__()
        self.shard = shard
        self.spec = spec
        options = {"dtype": dtype, "device": device}
        self._own = shard.piece(0, spec.width)
        inner = self._own.count
        self.router_weight = new_parameter(spec.num_experts, width, dtype=torch.float32, device=device)
        self.gate_up_weight = new_parameter(spec.num_experts, 2 * inner, width, **options)
        self.down_weight = new_parameter(spec.num_experts, width, inner, **options)
        if spec.shared_width:
            self.shared_gate = new_parameter(1, width, **options)
            self.shared = GatedMLP(width, spec.shared_width, bias=False, fused=False, shard=shard, **options)

    def forward(self, x: Tensor) -> Tensor:
        """[T, width] -> the rank's part of [T, width], in place 1 (`Shard.row_parallel`)."""
        shares, experts = route(x, self.router_weight, None, self.spec.num_active, self.spec.normalized)
        out = expert_mlp(x, experts, shares, self.gate_up_weight, self.down_weight)
        if not self.spec.shared_width:
            return self.shard.part(out, 1)
        return self.shared(x).mul_(F.linear(x, self.shared_gate).sigmoid()).add_(out)

    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """As `Decoder.pieces`."""
        rows, columns = self._own.along(1), self._own.along(2)
        own = {"gate_up_weight": (rows, rows), "down_weight": (columns,)}
        return own | (prefixed("shared", self.shared.pieces()) if self.spec.shared_width else {})

    def weight_pieces(self) -> dict[str, tuple[Piece, ...]]:
        """As `Decoder.weight_pieces`."""
        of_expert = {"gate_proj": self._own, "up_proj": self._own, "down_proj": self._own.along(1)}
        pieces = {
            f"experts.{expert}.{name}.weight": (piece,)
            for expert in range(self.spec.num_experts)
            for name, piece in of_expert.items()
        }
        return pieces | (prefixed("shared_expert", self.shared.weight_pieces()) if self.spec.shared_width else {})

    def weight_views(self) -> dict[str, Tensor]:
        """As `Decoder.weight_views`."""
        views = {"gate.weight": self.router_weight}
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_weight, self.down_weight, strict=True)):
            gate, up = gate_up.chunk(2)
            views |= prefixed(
                f"experts.{expert}", {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
            )
        if self.spec.shared_width:
            views |= prefixed("shared_expert", self.shared.weight_views())
            views["shared_expert_gate.weight"] = self.shared_gate
        return views
