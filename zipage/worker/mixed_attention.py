"""Attention of models with full and sliding layers, which have caches of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kernels.attention_form import AttentionForm
from zipage.models.attention import AttentionSpec
from zipage.models.decoder import Decoder
from zipage.worker.kv_cache import KVCache
from zipage.worker.paged_attention import PagedAttention


class LayerGroup(NamedTuple):
    """Layers with one cache: the attention of each, and its form."""

    attention: Sequence[AttentionSpec]
    forms: Sequence[AttentionForm]


@dataclass(slots=True)
class MixedAttention:
    """Attention of one step over two caches.

    Attributes:
        full, sliding: over each cache.
        places: of each layer of the model: whether it slides, and its place among those of its kind.
    """

    full: PagedAttention
    sliding: PagedAttention
    places: Sequence[tuple[bool, int]]

    @property
    def slots(self) -> Tensor:
        """Of full layers."""
        return self.full.slots

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `PagedAttention`."""
        slides, place = self.places[layer]
        return (self.sliding if slides else self.full)(place, q, k, v)


class LayerGroups:
    """The layers of a model by what holds their entries.

    Attributes:
        full, sliding: the second is None where all layers have one cache.
    """

    def __init__(self, decoder: Decoder) -> None:
        spec = decoder.spec
        self.full = self._of(decoder, spec.full_layers)
        self.sliding = self._of(decoder, spec.sliding_layers) if spec.sliding_layers else None
        places = {layer: (True, place) for place, layer in enumerate(spec.sliding_layers)}
        places |= {layer: (False, place) for place, layer in enumerate(spec.full_layers)}
        self._places = [places[layer] for layer in range(spec.num_layers)]

    @staticmethod
    def _of(decoder: Decoder, layers: Sequence[int]) -> LayerGroup:
        return LayerGroup(*(tuple(x[layer] for layer in layers) for x in (decoder.spec.attention, decoder.forms)))

    def over(
        self, cache: KVCache, attend: Callable[[KVCache, LayerGroup], PagedAttention]
    ) -> PagedAttention | MixedAttention:
        """The attention of all layers, as `attend` makes that of those with one cache."""
        sliding = None if self.sliding is None else attend(cache.sliding, self.sliding)
        return self.join(attend(cache, self.full), sliding)

    def join(self, full: PagedAttention, sliding: PagedAttention | None) -> PagedAttention | MixedAttention:
        """The attention of all layers."""
        return full if sliding is None else MixedAttention(full, sliding, self._places)
