"""Tensors by name into a decoder, each once; or drawn at random."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from zipage.models.decoder import Decoder
from zipage.models.loading.finite import is_finite, refuse_values
from zipage.models.registry import find_family
from zipage.models.shard import WHOLE, Piece, Shard, fill_pieces, whole_shape
from zipage.models.spec import ModelSpec

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Buffers that old checkpoints carry and that follow from the config.
HARMLESS_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class Weights(Protocol):
    """Tensors by their Hugging Face names."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """One tensor, or the rows or columns of it that a rank holds (`Piece.of`)."""


def check_before_allocating(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    weights: Weights | None,
    source: str,
    shard: Shard = WHOLE,
) -> None:
    """See that a spec tells the truth about its weights, or, where they are to be drawn, that they fit this machine.

    Args:
        weights: None where they are to be drawn.
        source: what errors call the model.
        shard: what of it is to be held here.

    Raises:
        ValueError: the weights are others (see `fill`), or too large for the host's memory.
    """
    if weights is not None and spec.depth > len(weights.shapes):
        raise ValueError(f"{source}: num_layers={spec.depth}, but there are {len(weights.shapes)} tensors")
    are_alike = weights is None and spec.recurrent is None
    try:
        family = find_family(spec.architecture)
        cut = dataclasses.replace(spec, attention=spec.attention[:1]) if are_alike else spec
        decoder = family.decoder(cut, dtype, torch.device("meta"), shard)
    except RuntimeError as error:  # no tensor can be as large
        raise ValueError(f"{source}: the sizes of its config overflow ({error})") from error
    if weights is not None:
        _names_to_read(decoder, weights, source)
    elif device.type == "cpu":
        layer, total = (sum(p.nbytes for p in module.parameters()) for module in (decoder.layers, decoder))
        needed = total + layer * (spec.depth - 1) if are_alike else total
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            raise ValueError(f"{source}: the model takes {needed >> 30:,} GiB, this machine has {memory >> 30:,} GiB")


def fill(decoder: Decoder, weights: Weights, source: str) -> None:
    """Copy each tensor into its place, each place once.

    `lm_head.weight` is passed over where embeddings are tied: `load_model` has seen that it equals the embedding.

    Args:
        source: what errors call the weights.

    Raises:
        ValueError: tensors are missing, left over or of another shape; the message names them. Nothing was read then.
            Or a value is not finite, which comes out while others are read.
    """
    views, pieces = decoder.weight_views(), decoder.weight_pieces()
    for name in _names_to_read(decoder, weights, source):
        view = views[name]
        if decoder.shard.is_whole or name not in pieces:
            view.copy_(weights.read(name))
        else:
            fill_pieces(pieces[name], view, partial(weights.read, name))
        if not is_finite(view):
            refuse_values(weights.read(name), f"{source}: {name}", view.dtype)


def _names_to_read(decoder: Decoder, weights: Weights, source: str) -> list[str]:
    views = decoder.weight_views()
    passed_over = (*HARMLESS_SUFFIXES, LM_HEAD) if decoder.spec.tie_embeddings else HARMLESS_SUFFIXES
    unread = find_family(decoder.spec.architecture).unread
    names = [name for name in weights.shapes if not name.endswith(passed_over) and not name.startswith(unread)]
    missing = [name for name in views if name not in weights.shapes]
    left_over = [name for name in names if name not in views]
    pieces = decoder.weight_pieces()
    shapes = {
        name: whole_shape(pieces[name], tuple(view.shape)) if name in pieces else tuple(view.shape)
        for name, view in views.items()
    }
    misshapen = [
        f"{name} is {list(weights.shapes[name])}, not {list(shapes[name])}"
        for name in names
        if name in shapes and weights.shapes[name] != shapes[name]
    ]
    problems = [
        f"{what}: {_first(found)}"
        for what, found in (("missing", missing), ("left over", left_over), ("wrong shape", misshapen))
        if found
    ]
    if problems:
        raise ValueError(f"{source} does not hold the tensors that its config describes: {'; '.join(problems)}")
    return names


@torch.no_grad()
def fill_random(decoder: Decoder, seed: int) -> None:
    """Draw weights on the decoder's device: the same on every call with one device type, dtype and seed, and a rank's
    shard of the same; each parameter is drawn whole.

    Matrices have variance 1 / fan-in, so that each sublayer adds about unit variance to the residual stream, which
    keeps activations finite in every dtype however deep the model. Norms are 1, biases small.
    """
    generator = torch.Generator(decoder.device).manual_seed(seed)
    pieces_of = {} if decoder.shard.is_whole else decoder.pieces()
    for name, parameter in decoder.named_parameters():
        whole, pieces = parameter, pieces_of.get(name)
        if pieces:
            shape = whole_shape(pieces, tuple(parameter.shape))
            whole = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        if whole.dim() >= 2:
            whole.normal_(0.0, whole.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            whole.normal_(0.0, 0.02, generator=generator)
        else:
            whole.fill_(1.0 if name.endswith("gated_norm") else 1.0 - decoder.spec.norm_offset)
        if pieces:
            fill_pieces(pieces, parameter, lambda run, whole=whole: run.of(whole))


def _first(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
