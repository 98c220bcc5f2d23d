"""A layer with a recurrence in place of attention: gated DeltaNet (Yang et al. 2024, arXiv:2412.06464)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.causal_conv import causal_conv
from kernels.gated_delta import gated_delta
from kernels.linear import linear
from zipage.models.delta_net_spec import DeltaNetSpec
from zipage.models.layer_mlp import new_mlp
from zipage.models.mlp import new_parameter, prefixed
from zipage.models.shard import Piece, Shard
from zipage.models.spec import ModelSpec

Recurrence = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]


def recur(
    spec: DeltaNetSpec, x: Tensor, decay: Tensor, beta: Tensor, weight: Tensor, conv: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a `Recurrence` does with B pieces of sequences.

    Args:
        x: [B, T, channels]; queries, keys and values before their convolution.
        decay, beta: float32 [B, T, Hv], of `gated_delta`.
        weight: [channels, K], of the convolution.
        conv: [B, *spec.conv_shape], of x's dtype, and
        state: float32 [B, *spec.state_shape]: what the pieces before these left, or zeros.

    Returns:
        float32 [B, T, Hv, dv], and what these pieces leave.
    """
    x, conv = causal_conv(x, conv, weight)
    q, k, v = x.split([spec.keys, spec.keys, spec.values], dim=-1)
    q, k = (heads.unflatten(-1, (spec.num_key_heads, spec.key_dim)) for heads in (q, k))
    v = v.unflatten(-1, (spec.num_value_heads, spec.value_dim))
    out, state = gated_delta(q, k, v, decay, beta, state)
    return out, conv, state


class GatedDeltaNet(nn.Module):
    """The recurrent part of a layer.

    Rows of the first weight are those of q, k, v and the output's gate z, rows of the second those of beta and of the
    decay; of all heads, or, where a checkpoint groups them, of each key head in turn.
    """

    def __init__(self, spec: ModelSpec, place: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        net = spec.recurrent
        self.spec = net
        self.place = place
        self.eps = spec.rms_norm_eps
        parameter = partial(new_parameter, dtype=dtype, device=device)
        self.input_weight = parameter(net.channels + net.values, spec.width)
        self.control_weight = parameter(2 * net.num_value_heads, spec.width)
        self.conv_weight = parameter(net.channels, net.taps)
        self.decay_log = new_parameter(net.num_value_heads, dtype=torch.float32, device=device)
        self.decay_bias = new_parameter(net.num_value_heads, dtype=torch.float32, device=device)
        self.gated_norm = parameter(net.value_dim)
        self.output_weight = parameter(spec.width, net.values)

    def forward(self, x: Tensor, recurrence: Recurrence) -> Tensor:
        """[T, width] -> [T, width]."""
        mixed, z, b, a = self._projected(x)
        decay = -self.decay_log.exp() * F.softplus(a.float() + self.decay_bias)
        out = recurrence(self.place, mixed, decay, b.float().sigmoid(), self.conv_weight)
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.eps)
        out = (self.gated_norm * out.to(x.dtype)).float() * F.silu(z.float())
        return linear(out.to(x.dtype).flatten(1), self.output_weight)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v [T, channels], z [T, Hv, dv], b and a [T, Hv]."""
        net, inputs, controls = self.spec, linear(x, self.input_weight), linear(x, self.control_weight)
        groups = net.num_key_heads if net.grouped else 1
        sizes = [size // groups for size in (net.keys, net.keys, net.values, net.values)]
        q, k, v, z = (part.flatten(1) for part in inputs.unflatten(1, (groups, -1)).split(sizes, dim=-1))
        b, a = (part.flatten(1) for part in controls.unflatten(1, (groups, -1)).chunk(2, dim=-1))
        return torch.cat((q, k, v), dim=1), z.unflatten(1, (net.num_value_heads, net.value_dim)), b, a

    def weight_views(self) -> dict[str, Tensor]:
        """As `Decoder.weight_views`."""
        views = {
            "conv1d.weight": self.conv_weight[:, None],
            "A_log": self.decay_log,
            "dt_bias": self.decay_bias,
            "norm.weight": self.gated_norm,
            "out_proj.weight": self.output_weight,
        }
        if self.spec.grouped:
            return views | {"in_proj_qkvz.weight": self.input_weight, "in_proj_ba.weight": self.control_weight}
        qkv, z = self.input_weight.split([self.spec.channels, self.spec.values])
        b, a = self.control_weight.chunk(2)
        parts = {"in_proj_qkv": qkv, "in_proj_z": z, "in_proj_b": b, "in_proj_a": a}
        return views | {f"{name}.weight": part for name, part in parts.items()}


class RecurrentLayer(nn.Module):
    """Pre-norm block: a recurrence, then an MLP. It is not split over ranks.

    Args:
        index: of the layer in the model.
        place: among the recurrent layers.
    """

    def __init__(
        self, spec: ModelSpec, index: int, place: int, dtype: torch.dtype, device: torch.device, shard: Shard
    ) -> None:
        super().__init__()
        self.index = index
        self.shard = shard
        self.eps = spec.rms_norm_eps
        self.norm_offset = spec.norm_offset
        self.input_norm = new_parameter(spec.width, dtype=dtype, device=device)
        self.net = GatedDeltaNet(spec, place, dtype, device)
        self.mlp_norm = new_parameter(spec.width, dtype=dtype, device=device)
        self.mlp = new_mlp(spec, index, dtype, device, shard)

    def forward(self, hidden: Tensor, delta: Tensor | None, recurrence: Recurrence) -> Tensor:
        """As `DecoderLayer.forward`."""
        normed = self.shard.add_rms_norm(hidden, delta, 1, self.input_norm, self.eps, self.norm_offset)
        delta = self.net(normed, recurrence)
        return self.mlp(self.shard.add_rms_norm(hidden, delta, 0, self.mlp_norm, self.eps, self.norm_offset))

    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """As `Decoder.pieces`."""
        return prefixed("mlp", self.mlp.pieces())

    def weight_pieces(self) -> dict[str, tuple[Piece, ...]]:
        """As `Decoder.weight_pieces`."""
        return prefixed("mlp", self.mlp.weight_pieces())

    def weight_views(self) -> dict[str, Tensor]:
        """As `Decoder.weight_views`."""
        return {
            "input_layernorm.weight": self.input_norm,
            "post_attention_layernorm.weight": self.mlp_norm,
            **prefixed("linear_attn", self.net.weight_views()),
            **prefixed("mlp", self.mlp.weight_views()),
        }
