"""Causal attention of one request whose keys and values all come at once: what the engine's paged attention means."""

from torch import Tensor
from torch.nn import functional as F


def dense_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [T, Hq, d], k and v [T, H, d] -> [T, Hq, d]."""
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)
