"""Attention of one step, whose scale is the layer's own."""

import torch

from zipage.models.attention import AttentionSpec
from zipage.worker.kv_cache import KVCache
from zipage.worker.paged_attention import PagedAttention


class Spec:
    attention = tuple(AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, scale=scale) for scale in (0.5, 2.0))
    num_layers, num_heads, num_kv_heads, head_dim = 2, 4, 2, 8
    sliding_layers = ()


def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A prompt of three tokens, and a decode with one entry before its own."""
    ints = torch.int32
    cache = KVCache(Spec, 2, 16, torch.float32, torch.device("cpu"))
    cache.k.fill_(0.3)
    cache.v.fill_(0.7)
    attention = PagedAttention(
        cache,
        Spec.attention,
        slots=torch.tensor([1, 16, 17, 18]),
        num_decodes=1,
        decode_tables=torch.tensor([[0]], dtype=ints),
        decode_lens=torch.tensor([2], dtype=ints),
        prefill_tables=torch.tensor([[1]], dtype=ints),
        prefill_lens=torch.tensor([3], dtype=ints),
        cu_seqlens=torch.tensor([1, 4], dtype=ints),
        max_seqlen=3,
    )
    return attention(layer, q, k, v)


def test_each_layer_attends_by_its_own_scale():
    q, k, v = (torch.randn(4, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    assert torch.equal(attend(1, q, k, v), attend(0, 4 * q, k, v))
    assert not torch.allclose(attend(1, q, k, v), attend(0, q, k, v))
