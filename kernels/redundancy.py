"""How much paged keys repeat each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.cache_view import CacheView, check_view, entries_reference, gather_entries, scores_like
from kernels.layout import fail

PIECE_BYTES = 2 << 20
"""Cosines made at a time: still in the processor's cache when they are summed, and worth the calls."""


def redundancy(view: CacheView, *, tau: float, threshold: float = 0.5, chunk: int | None = None) -> Tensor:
    """How much each key repeats others (R-KV, arXiv 2505.24133; in chunks: Zipage, arXiv 2603.08743).

    With c(m, j) the cosine of two keys and c(j, j) = 0, last(j) is the highest slot m with c(m, j) > threshold, and
    raw[m] the sum over j of c(m, j), leaving out each j with last(j) = m. The result is the softmax over the request
    of raw / (tau * keys compared).

    Args:
        view: any range of layers. V is not read.
        tau: temperature.
        threshold: cosine above which a key is a near-duplicate.
        chunk: keys are compared within aligned runs of this many slots, a power of two from 16, the last one partial;
            None: with all.

    Returns:
        float32 [L, R, H, max_blocks * b], summing to 1 over a request's n entries; -inf past n.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    _check(view, tau, chunk)
    kinds = {"tau": tau, "threshold": threshold, "chunk": chunk}
    if view.lens.is_cuda:
        with torch.cuda.device(view.lens.device):
            return _triton()(view, **kinds)
    return redundancy_torch(view, **kinds)


def _check(view: CacheView, tau: float, chunk: int | None) -> None:
    """Check the arguments of `redundancy`. Raises ValueError naming the argument, its value and the remedy."""
    check_view(view, all_layers=True)
    if not tau > 0:
        fail("tau", "value", tau, "give a temperature above 0")
    if chunk is not None and (chunk < 16 or chunk & (chunk - 1)):
        fail("chunk", "value", chunk, "give a power of two from 16, or None for the whole request")


def redundancy_reference(view: CacheView, *, tau: float, threshold: float = 0.5, chunk: int | None = None) -> Tensor:
    """`redundancy`, layer by layer, request by request and head by head."""
    out = scores_like(view).cpu()
    for layer, row, head in product(*map(range, view.lens.shape)):
        length = int(view.lens[layer, row, head])
        if length == 0:
            continue
        keys = entries_reference(view.k_cache[layer], view.block_tables[layer, row, head], length, head).cpu()
        keys = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        runs = keys.split(length if chunk is None else chunk)
        logits = [_unexcused_reference(run, threshold) / (tau * len(run)) for run in runs]
        out[layer, row, head, :length] = torch.cat(logits).softmax(dim=-1)
    return out.to(view.k_cache.device)


def _unexcused_reference(keys: Tensor, threshold: float) -> Tensor:
    """raw of each of the normalised keys [n, d]: [n]."""
    cosine = (keys @ keys.T).fill_diagonal_(0)
    raw = cosine.sum(dim=1)
    for j in range(len(keys)):
        duplicates = (cosine[:, j] > threshold).nonzero()
        if len(duplicates):
            last = int(duplicates.max())
            raw[last] -= cosine[last, j]
    return raw


def redundancy_torch(view: CacheView, *, tau: float, threshold: float = 0.5, chunk: int | None = None) -> Tensor:
    """`redundancy`, the runs of a request together as far as their cosines stay small."""
    out = scores_like(view)
    caches = view.k_cache.unbind()
    divisors = {}
    for layer, row, heads, length, table in view.lines():
        run = min(chunk or length, length)
        if length not in divisors:
            compared = torch.full((length,), run)
            compared[length // run * run :] = length % run
            divisors[length] = tau * compared
        keys = gather_entries(caches[layer], table, length, heads)[:, 0].float()
        keys = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        runs = torch.nn.functional.pad(keys, (0, 0, 0, -length % run)).view(-1, run, keys.shape[-1])
        pieces = runs.split(max(1, PIECE_BYTES // (4 * run * run)))
        raw = torch.cat([_unexcused_sums(piece, threshold) for piece in pieces]).view(keys.shape[0], -1)
        out[layer, row, heads, :length] = (raw[:, :length] / divisors[length]).softmax(dim=-1)
    return out


def _unexcused_sums(keys: Tensor, threshold: float) -> Tensor:
    """For normalised keys [M, n, d], the sum of each one's cosines but those that it excuses: [M, n]."""
    cosine = torch.bmm(keys, keys.transpose(1, 2))
    cosine.diagonal(dim1=1, dim2=2).zero_()
    slots = torch.arange(cosine.shape[1])
    last = torch.where(cosine > threshold, slots, -1).amax(dim=2)
    excused = cosine.gather(2, last.clamp(min=0)[..., None])[..., 0].masked_fill_(last < 0, 0)
    return cosine.sum(dim=2).scatter_add_(1, last.clamp(min=0), -excused)


@cache
def _triton() -> Callable:
    from kernels.redundancy_triton import redundancy_triton

    return redundancy_triton
