"""Decode requests cut into pieces of about the same length."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from kernels.cache_view import CacheView
from kernels.decode_spans import DecodeSpans, decode_spans
from kernels.pieces import Pieces


def decode_pieces(view: CacheView) -> Pieces | DecodeSpans | None:
    """How `paged_decode` cuts the requests of a step, to be given to it in every layer.

    Args:
        view: of any one layer: its lengths, and the room of its block tables, are those of all. Or of all layers, where
            lengths differ.

    Returns:
        The pieces, of all layers where the view has them. On a CPU the spans of the requests, which stay whole; None
        where lengths differ.
    """
    if not view.lens.is_cuda:
        return None if view.lens.dim() == 3 or view.heads_differ else decode_spans(view)
    with torch.cuda.device(view.lens.device):
        return _triton()(view)


@cache
def _triton() -> Callable:
    from kernels.decode_pieces_triton import decode_pieces_triton

    return decode_pieces_triton
