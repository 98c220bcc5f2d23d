"""What a scorer of entries learns to predict: how much of an entry later queries add to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-12
ROWS = 128
"""Queries whose attention is held at once."""


def entry_targets(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, output: Tensor, scale: float, first: Tensor, last: Tensor
) -> Tensor:
    """`log max over queries p and the group of A[p, j] |W_o V_j| / |x_p|`, at least log(1e-12), of leading entries.

    A is causal attention over all tokens of the text; W_o is the part of the output projection that belongs to a query
    head; x is the input of the layer's attention.

    Args:
        q, k, v: [T, Hq, d] and [T, H, d], one layer of one text, after RoPE.
        hidden: [T, width].
        output: [width, Hq * d], the layer's output projection.
        scale: of the logits.
        first, last: int64 [n], entry j counts the queries of tokens first[j] .. last[j]-1, all behind it.

    Returns:
        float32 [n, H].
    """
    q, k, v, hidden, output = (x.float() for x in (q, k, v, hidden, output))
    (tokens, num_heads, _), heads = q.shape, k.shape[1]
    most = torch.zeros(num_heads, len(first), device=q.device)
    keys = k.repeat_interleave(num_heads // heads, dim=1).permute(1, 2, 0)
    places = torch.arange(tokens, device=q.device)
    queries = q.transpose(0, 1) * scale
    sizes = hidden.norm(dim=-1)
    for begin in range(int(first.min()), int(last.max()), ROWS):
        end = min(begin + ROWS, int(last.max()))
        rows, num = places[begin:end, None], min(end, len(first))
        logits = queries[:, begin:end] @ keys[..., :end]
        shares = logits.masked_fill(places[:end] > rows, float("-inf")).softmax(dim=-1)[..., :num]
        counted = (rows >= first[:num]) & (rows < last[:num])
        added = (shares / sizes[begin:end, None]).masked_fill(~counted, 0.0)
        most[:, :num] = torch.maximum(most[:, :num], added.amax(dim=1))
    lengths = [
        (v[: len(first), head // (num_heads // heads)] @ part.mT).norm(dim=-1)
        for head, part in enumerate(output.unflatten(1, (num_heads, -1)).unbind(1))
    ]
    targets = (most * torch.stack(lengths)).unflatten(0, (heads, -1)).amax(dim=1)
    return targets.clamp_min(LEAST).log().mT
