"""How the work of a step's decode attention is divided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from kernels.attention_form import PLAIN, AttentionForm
from kernels.cache_view import CacheView
from kernels.decode_spans import DecodeSpans, decode_spans
from kernels.hopper import hopper_kernels
from kernels.pieces import Pieces
from kernels.shares import Shares


def decode_pieces(
    view: CacheView, group: int = 1, forms: Sequence[AttentionForm] = (PLAIN,)
) -> Pieces | Shares | DecodeSpans | None:
    """How `paged_decode` divides the requests of a step, to be given to it in every layer.

    Args:
        view: of any one layer: its lengths, and the room of its block tables, are those of all. Or of all layers, where
            lengths differ.
        group: query heads of a KV head.
        forms: of the layers' attention.

    Returns:
        On a GPU the pieces of requests, of all layers where the view has them, or the shares of programs where the
        kernel for Hopper takes all forms. On a CPU the spans of the requests, which stay whole; None where lengths
        differ.
    """
    if not view.lens.is_cuda:
        return None if view.lens.dim() == 3 or view.heads_differ else decode_spans(view)
    with torch.cuda.device(view.lens.device):
        return gpu_pieces(view, group, forms)


def gpu_pieces(view: CacheView, group: int, forms: Sequence[AttentionForm]) -> Pieces | Shares:
    """`decode_pieces` on a GPU."""
    hopper = hopper_kernels("paged_decode")
    if hopper is not None and all(hopper.takes(view, group, form) for form in forms):
        return hopper.decode_shares(view)
    return _triton()(view)


@cache
def _triton() -> Callable:
    from kernels.decode_pieces_triton import decode_pieces_triton

    return decode_pieces_triton
