"""Linear and quadratic forms of paged keys, for policies that know the queries to come."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.cache_view import CacheView, check_view, entries_reference
from kernels.layout import check_index, fail


def key_forms(view: CacheView, linear: Tensor, sizes: Tensor | None = None, squares: Tensor | None = None) -> Tensor:
    """G numbers of each key: what it is to G queries, or to queries of G distributions.

    Dimensions f and f + d / 2 of a key K are a rotary pair (x_f, y_f). A number is `linear . K + sum over f of sizes_f
    |(x_f, y_f)| + squares_f . (x_f^2, 2 x_f y_f, y_f^2)`.

    Args:
        view: any range of layers. V is not read.
        linear: float32 [L, R, H, G, d], the last dimension contiguous; others may be expanded.
        sizes: float32 [L, R, H, G, d / 2], alike; None: all 0. An odd d has no pairs.
        squares: float32 [L, R, H, G, 3, d / 2], alike; None: all 0.

    Returns:
        float32 [L, R, H, G, N], N = max_blocks * b. 0 past n.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    _check(view, linear, sizes, squares)
    if view.lens.is_cuda:
        with torch.cuda.device(view.lens.device):
            return _triton()(view, linear, sizes, squares)
    return key_forms_reference(view, linear, sizes, squares)


def _check(view: CacheView, linear: Tensor, sizes: Tensor | None, squares: Tensor | None) -> None:
    check_view(view, all_layers=True)
    lines, head_dim, device = tuple(view.lens.shape), view.k_cache.shape[4], view.k_cache.device
    check_index("linear", linear, torch.float32, (*lines, -1, head_dim), device)
    group, half = linear.shape[3], head_dim // 2
    for name, weights, shape in (("sizes", sizes, (half,)), ("squares", squares, (3, half))):
        if weights is None:
            continue
        if head_dim % 2:
            fail(name, "value", "a tensor", f"give None: {head_dim} dimensions are not in pairs")
        check_index(name, weights, torch.float32, (*lines, group, *shape), device)


def forms(keys: Tensor, linear: Tensor, sizes: Tensor | None, squares: Tensor | None) -> Tensor:
    """Of keys [..., N, d] under [..., G, d], [..., G, d / 2] and [..., G, 3, d / 2]: [..., G, N]."""
    found = linear @ keys.mT
    if sizes is not None:
        found = found + sizes @ keys.unflatten(-1, (2, -1)).norm(dim=-2).mT
    if squares is not None:
        x, y = keys.chunk(2, dim=-1)
        found = found + squares.flatten(-2) @ torch.cat((x * x, 2 * x * y, y * y), dim=-1).mT
    return found


def key_forms_reference(
    view: CacheView, linear: Tensor, sizes: Tensor | None = None, squares: Tensor | None = None
) -> Tensor:
    """`key_forms`, layer by layer, request by request and head by head."""
    out = torch.zeros(*linear.shape[:4], view.width, device=linear.device)
    for line in product(*map(range, view.lens.shape)):
        length = int(view.lens[line])
        if length:
            keys = entries_reference(view.k_cache[line[0]], view.block_tables[line], length, line[2])
            weights = (None if x is None else x[line] for x in (sizes, squares))
            out[*line, :, :length] = forms(keys, linear[line], *weights)
    return out


@cache
def _triton() -> Callable[..., Tensor]:
    from kernels.key_forms_triton import key_forms_triton

    return key_forms_triton
