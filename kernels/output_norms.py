"""How long values are once the output projection has taken them to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.cache_view import CacheView, entries_reference, once
from kernels.layout import check_caches, check_choice, check_index, check_like, check_numbers, fail

PROJECTED = 2**24
"""Numbers that a product on a CPU holds at once."""


def output_norms(view: CacheView, weights: Sequence[Tensor], starts: Tensor, norm: str = "l1") -> Tensor:
    """Mean over a KV head's group of |V W_o|, W_o the output projection of a query head (CriticalKV, arXiv 2502.03805).

    Args:
        view: any range of layers; layers or heads of the caches may be expanded. K is not read.
        weights: of each layer, [width, Hq * d] of v_cache's dtype, all with the same strides, rows contiguous.
        starts: int32 [L, R, H], at least 0: slots from here on are asked for.
        norm: "l1" or "l2".

    Returns:
        float32 [L, R, H, N], N = max_blocks * b. 0 before `starts` and past n.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    _check(view, weights, starts, norm)
    if view.lens.is_cuda:
        with torch.cuda.device(view.lens.device):
            return _triton()(view, weights, starts, norm)
    return output_norms_torch(view, weights, starts, norm)


def _check(view: CacheView, weights: Sequence[Tensor], starts: Tensor, norm: str) -> None:
    _, v_cache, block_tables, lens = view
    stored = once(v_cache)[0]
    check_caches(stored, stored)
    (layers, _, heads, _, head_dim), device = v_cache.shape, v_cache.device
    check_numbers("lens", lens, torch.int32, (layers, -1, heads), device, "v_cache")
    check_index("block_tables", block_tables, torch.int32, (*lens.shape, -1), device, "v_cache")
    check_numbers("starts", starts, torch.int32, tuple(lens.shape), device, "v_cache")
    check_choice("norm", norm, ("l1", "l2"))
    if len(weights) != layers:
        fail("weights", "length", len(weights), f"give that of each of {layers} layers")
    first = weights[0]
    if first.dim() != 2 or first.shape[1] == 0 or first.shape[1] % (heads * head_dim):
        fail("weights", "shape", tuple(first.shape), f"give [width, a multiple of {heads} * {head_dim}]")
    for weight in weights:
        if weight.shape != first.shape or weight.stride() != first.stride() or weight.stride(1) != 1:
            what = tuple(weight.shape), weight.stride()
            fail("weights", "shape and stride", what, "give all layers the same, rows contiguous")
        check_like("weights", weight, v_cache, "v_cache")


def by_head(weight: Tensor, heads: int, head_dim: int) -> Tensor:
    """[width, Hq * d] -> [H, G, d, width]."""
    return weight.unflatten(1, (heads, -1, head_dim)).permute(1, 2, 3, 0)


def output_norms_reference(view: CacheView, weights: Sequence[Tensor], starts: Tensor, norm: str = "l1") -> Tensor:
    """`output_norms`, layer by layer, request by request and head by head."""
    heads, head_dim = view.v_cache.shape[2], view.v_cache.shape[4]
    out = torch.zeros(*view.lens.shape, view.width)
    for layer, row, head in product(*map(range, view.lens.shape)):
        length, start = int(view.lens[layer, row, head]), int(starts[layer, row, head])
        if start >= length:
            continue
        values = entries_reference(view.v_cache[layer], view.block_tables[layer, row, head], length, head)[start:]
        projected = values @ by_head(weights[layer].float(), heads, head_dim)[head]
        out[layer, row, head, start:length] = projected.norm(p={"l1": 1, "l2": 2}[norm], dim=-1).mean(dim=0).cpu()
    return out.to(view.lens.device)


def output_norms_torch(view: CacheView, weights: Sequence[Tensor], starts: Tensor, norm: str = "l1") -> Tensor:
    """`output_norms`, a head's products together as far as they stay small."""
    heads, block_size, head_dim = view.v_cache.shape[2:]
    out = torch.zeros(*view.lens.shape, view.width)
    order = {"l1": 1, "l2": 2}[norm]
    firsts, lengths = starts.tolist(), view.lens.tolist()
    for layer, row, head in product(*map(range, view.lens.shape)):
        start, length = firsts[layer][row][head], lengths[layer][row][head]
        if start >= length:
            continue
        weight = by_head(weights[layer], heads, head_dim)[head]
        skipped = start // block_size
        blocks = view.block_tables[layer, row, head, skipped : -(-length // block_size)].long()
        values = view.v_cache[layer, :, head][blocks].flatten(0, 1)
        values = values[start - skipped * block_size : length - skipped * block_size]
        parts = values.split(max(1, PROJECTED // weight[:, 0].numel()))
        lengths_of = [(part @ weight).norm(p=order, dim=-1, dtype=torch.float32).mean(dim=0) for part in parts]
        out[layer, row, head, start:length] = torch.cat(lengths_of)
    return out


@cache
def _triton() -> Callable[..., Tensor]:
    from kernels.output_norms_triton import output_norms_triton

    return output_norms_triton
