"""Causal attention of one request whose keys and values all come at once: what the engine's paged attention means."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.causal_conv import causal_conv_reference
from kernels.delta_gates import DeltaGates
from kernels.gated_delta import gated_delta_reference
from kernels.paged_prefill import attend_reference
from zipage.models.decoder import Decoder
from zipage.models.delta_net import Recurrence


def dense_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [T, Hq, d], k and v [T, H, d] -> [T, Hq, d]."""
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def dense_attention_of(decoder: Decoder) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """The same by each layer's scale and form."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale, form, group = decoder.spec.attention[layer].scale, decoder.forms[layer], q.shape[1] // k.shape[1]
        out = q.new_empty(q.shape)
        for head in range(k.shape[1]):
            some = slice(head * group, (head + 1) * group)
            of_heads = form.of_heads(some)
            out[:, some] = attend_reference(q[:, some], k[:, head].float(), v[:, head].float(), scale, 1, of_heads)
        return out

    return attend


def dense_recurrence_of(decoder: Decoder) -> Recurrence | None:
    """The same for recurrent layers, of a text from its beginning."""
    net = decoder.spec.recurrent
    if net is None:
        return None

    def recur(layer: int, x: Tensor, gates: DeltaGates, weight: Tensor) -> Tensor:
        x, _ = causal_conv_reference(x, torch.zeros(net.conv_shape, dtype=x.dtype), weight)
        q, k, v = x.split([net.keys, net.keys, net.values], dim=-1)
        q, k = (heads.unflatten(-1, (net.num_key_heads, net.key_dim)) for heads in (q, k))
        v = v.unflatten(-1, (net.num_value_heads, net.value_dim))
        return gated_delta_reference(q, k, v, *gates.computed(), torch.zeros(net.state_shape))[0].contiguous()

    return recur
