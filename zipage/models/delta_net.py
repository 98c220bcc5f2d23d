"""A layer with a recurrence in place of attention: gated DeltaNet (Yang et al. 2024, arXiv:2412.06464)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kernels.causal_conv import causal_conv
from kernels.delta_gates import DeltaGates
from kernels.gated_delta import gated_delta
from kernels.gated_norm import gated_norm
from kernels.linear import linear
from kernels.spans import Spans
from zipage.models.delta_net_spec import DeltaNetSpec
from zipage.models.layer_mlp import new_mlp
from zipage.models.mlp import new_parameter, prefixed
from zipage.models.shard import Piece, Shard
from zipage.models.spec import ModelSpec

Recurrence = Callable[[int, Tensor, DeltaGates, Tensor], Tensor]


def recur(
    spec: DeltaNetSpec,
    x: Tensor,
    gates: DeltaGates,
    weight: Tensor,
    conv: Tensor,
    state: Tensor,
    spans: Spans,
    mixed: Tensor,
    out: Tensor,
) -> None:
    """What a `Recurrence` does with spans of sequences.

    Args:
        x: [T, channels]; queries, keys and values before their convolution.
        gates: of `gated_delta`.
        weight: [channels, K], of the convolution.
        conv: [rows, *spec.conv_shape], of x's dtype, and
        state: float32 [rows, *spec.state_shape]: what the spans before these left; written in place.
        spans: of the tokens.
        mixed: [T, channels], of x's dtype, overwritten.
        out: float32 [T, Hv, dv], written where spans are.
    """
    causal_conv(x, weight, conv, spans, mixed)
    q, k, v = mixed.split([spec.keys, spec.keys, spec.values], dim=1)
    q, k = (heads.unflatten(1, (spec.num_key_heads, spec.key_dim)) for heads in (q, k))
    gated_delta(q, k, v.unflatten(1, (spec.num_value_heads, spec.value_dim)), gates, state, spans, out)


def _ungrouped(parts: Sequence[int], groups: int, device: torch.device) -> Tensor:
    """int64: where columns of parts, one after another, are if each group has its own of all parts together."""
    columns = torch.arange(sum(parts), device=device).view(groups, -1).split([part // groups for part in parts], dim=1)
    return torch.cat([part.flatten() for part in columns])


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
        if net.grouped:
            parts = net.keys, net.keys, net.values, net.values
            self._inputs = _ungrouped(parts, net.num_key_heads, device)
            self._controls = _ungrouped((net.num_value_heads,) * 2, net.num_key_heads, device)

    def forward(self, x: Tensor, recurrence: Recurrence) -> Tensor:
        """[T, width] -> [T, width]."""
        net, inputs, controls = self.spec, linear(x, self.input_weight), linear(x, self.control_weight)
        if net.grouped:
            inputs, controls = inputs.index_select(1, self._inputs), controls.index_select(1, self._controls)
        mixed, z = inputs.split([net.channels, net.values], dim=1)
        b, a = controls.chunk(2, dim=1)
        gates = DeltaGates(a, b, self.decay_log, self.decay_bias)
        out = recurrence(self.place, mixed, gates, self.conv_weight)
        z = z.unflatten(1, (net.num_value_heads, net.value_dim))
        return linear(gated_norm(out, z, self.gated_norm, self.eps).flatten(1), self.output_weight)

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
