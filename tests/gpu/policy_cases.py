"""Kernels that a few policies ask for, beside their references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.cache_view import CacheView
from kernels.key_forms import key_forms_reference
from kernels.key_forms_triton import key_forms_triton
from kernels.key_squares import MOST_DIM, key_squares_reference
from kernels.key_squares_triton import key_squares_triton
from kernels.lag_spread import LEAST_RANGE, lag_spread_reference
from kernels.lag_spread_triton import lag_spread_triton
from kernels.output_norms import output_norms_reference
from kernels.output_norms_triton import output_norms_triton


def policy_cases(
    event: CacheView, host: CacheView, group: int, number: int
) -> Iterator[tuple[str, Tensor, Tensor, dict[str, Any]]]:
    """(kernel, its result, the reference's, what the case is) of an event, and of its float32 copy on the host.

    Args:
        group: query heads of a KV head.
        number: of the event; what is asked differs from one to the next.
    """
    layers, _, heads, _, head_dim = event.k_cache.shape
    device, dtype = event.k_cache.device, event.k_cache.dtype

    starts = torch.full_like(event.lens, 4)
    expected = lag_spread_reference(host, starts.cpu(), 128)
    yield "lag_spread", lag_spread_triton(event, starts, 128, LEAST_RANGE), expected, {}

    hidden = 1000 if number % 2 else 256  # a width in whole tiles, or not
    weights = [torch.randn(hidden, heads * group * head_dim, device=device).to(dtype) for _ in range(layers)]
    starts, norm = event.lens * (number % 3) // 3, ("l1", "l2")[number % 2]
    expected = output_norms_reference(host, [x.cpu().float() for x in weights], starts.cpu(), norm)
    yield "output_norms", output_norms_triton(event, weights, starts, norm), expected, {"norm": norm}

    shape = *event.lens.shape, group
    linear = torch.randn(*shape, head_dim, device=device)
    pairs = torch.randn(*shape, 3, head_dim // 2, device=device)
    for sizes, squares in ((None, None), (pairs[..., 0, :], None), (None, pairs), (pairs[..., 1, :], pairs)):
        expected = key_forms_reference(host, *(None if x is None else x.cpu() for x in (linear, sizes, squares)))
        case = {"sizes": sizes is not None, "squares": squares is not None}
        yield "key_forms", key_forms_triton(event, linear, sizes, squares), expected, case

    if head_dim > MOST_DIM:
        return
    spread = torch.randn(*shape, 20, head_dim, device=device)
    turn = torch.randn(shape[1], 2, head_dim // 2, device=device)
    for kind, matrices in (("covariance", spread.mT @ spread / 20), ("any", torch.randn_like(spread.mT @ spread))):
        weights = linear, matrices[:, :1].expand_as(matrices), turn  # one for all requests
        expected = key_squares_reference(host, *(x.cpu() for x in weights))
        yield "key_squares", key_squares_triton(event, *weights), expected, {"matrices": kind}
