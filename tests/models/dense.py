"""Causal attention of one request whose keys and values all come at once: what the engine's paged attention means."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from kernels.paged_prefill import attend_reference
from zipage.models.decoder import Decoder


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
