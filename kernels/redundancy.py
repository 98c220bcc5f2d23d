"""How much paged keys repeat each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.entries import entries_reference, gather_entries, scores_like
from kernels.layout import check_all_layers, check_requests, fail

PIECE_BYTES = 2 << 20
"""K copied at a time: still in the caches when it is multiplied, and worth the calls."""


def redundancy(
    k_cache: Tensor, block_tables: Tensor, lens: Tensor, *, tau: float, threshold: float = 0.5, chunk: int | None = None
) -> Tensor:
    """How much each key repeats others (R-KV, arXiv 2505.24133; in chunks: Zipage, arXiv 2603.08743).

    With c(m, j) the cosine of two keys and c(j, j) = 0, last(j) is the highest slot m with c(m, j) > threshold, and
    raw[m] the sum over j of c(m, j), leaving out each j with last(j) = m. The result is the softmax over the request
    of raw / (tau * keys compared).

    Args:
        k_cache: [L, num_blocks, H, b, d], any range of layers; float32, float16 or bfloat16.
        block_tables: int32 [R, max_blocks]; never read past ceil(n / b).
        lens: int32 [R], n.
        tau: temperature.
        threshold: cosine above which a key is a near-duplicate.
        chunk: keys are compared within aligned runs of this many slots, a power of two from 16, the last one partial;
            None: with all.

    Returns:
        float32 [L, R, H, max_blocks * b], summing to 1 over a request's n entries; -inf past n.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    _check(k_cache, block_tables, lens, tau, chunk)
    kinds = {"tau": tau, "threshold": threshold, "chunk": chunk}
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            return _triton()(k_cache, block_tables, lens, **kinds)
    return redundancy_torch(k_cache, block_tables, lens, **kinds)


def _check(k_cache: Tensor, block_tables: Tensor, lens: Tensor, tau: float, chunk: int | None) -> None:
    """Check the arguments of `redundancy`. Raises ValueError naming the argument, its value and the remedy."""
    check_all_layers(k_cache, k_cache)
    check_requests(block_tables, lens, k_cache.device)
    if not tau > 0:
        fail("tau", "value", tau, "give a temperature above 0")
    if chunk is not None and (chunk < 16 or chunk & (chunk - 1)):
        fail("chunk", "value", chunk, "give a power of two from 16, or None for the whole request")


def redundancy_reference(
    k_cache: Tensor, block_tables: Tensor, lens: Tensor, *, tau: float, threshold: float = 0.5, chunk: int | None = None
) -> Tensor:
    """`redundancy`, layer by layer and request by request."""
    layers, _, kv_heads, block_size, _ = k_cache.shape
    out = torch.full((layers, len(lens), kv_heads, block_tables.shape[1] * block_size), float("-inf"))
    for layer, row in product(range(layers), range(len(lens))):
        length = int(lens[row])
        if length == 0:
            continue
        keys = entries_reference(k_cache[layer], block_tables[row], length).cpu()
        keys = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        runs = keys.split(length if chunk is None else chunk, dim=1)
        logits = [_unexcused_reference(run, threshold) / (tau * run.shape[1]) for run in runs]
        out[layer, row, :, :length] = torch.cat(logits, dim=1).softmax(dim=-1)
    return out.to(k_cache.device)


def _unexcused_reference(keys: Tensor, threshold: float) -> Tensor:
    """raw of each of the normalised keys [H, n, d]: [H, n]."""
    heads, length, _ = keys.shape
    cosine = keys @ keys.transpose(1, 2)
    cosine.diagonal(dim1=1, dim2=2).zero_()
    raw = cosine.sum(dim=2)
    for head, j in product(range(heads), range(length)):
        duplicates = (cosine[head, :, j] > threshold).nonzero()
        if len(duplicates):
            last = int(duplicates.max())
            raw[head, last] -= cosine[head, last, j]
    return raw


def redundancy_torch(
    k_cache: Tensor, block_tables: Tensor, lens: Tensor, *, tau: float, threshold: float = 0.5, chunk: int | None = None
) -> Tensor:
    """`redundancy`, the runs of a request together as far as their cosines stay small."""
    out = scores_like(k_cache, block_tables)
    for row, length in enumerate(lens.tolist()):
        if length == 0:
            continue
        run = min(chunk or length, length)
        compared = torch.full((length,), run)
        compared[length // run * run :] = length % run
        for layer in range(k_cache.shape[0]):
            keys = gather_entries(k_cache[layer], block_tables[row], length)[:, 0].float()
            keys = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            runs = torch.nn.functional.pad(keys, (0, 0, 0, -length % run)).view(-1, run, keys.shape[-1])
            pieces = runs.split(max(1, PIECE_BYTES // (4 * run * run)))
            raw = torch.cat([_unexcused_sums(piece, threshold) for piece in pieces]).view(keys.shape[0], -1)
            out[layer, row, :, :length] = (raw[:, :length] / (tau * compared)).softmax(dim=-1)
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
