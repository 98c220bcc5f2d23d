"""Random eviction with one draw for all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from zipage.checks import one_of
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy

STREAM = 2


@dataclass(frozen=True, kw_only=True)
class RandomShared(Policy):
    """`S[j] = u(t, layer, j)` or `u(t, j)`: the marginals of `random` without diversity across heads. arXiv 2609.03430.

    [L, R, 1, N] for `share = heads`, [1, R, 1, N] for `share = all`.

    Attributes:
        share: "heads": one draw for the heads of a layer; "all": one for all layers too.
    """

    name: ClassVar[str] = "random_shared"
    variant: ClassVar[str] = "random, shared draw"
    paper: ClassVar[str] = "https://arxiv.org/abs/2609.03430"
    always_labelled: ClassVar[tuple[str, ...]] = ("share",)

    share: Annotated[str, one_of("heads", "all")] = "heads"

    @property
    def shared_heads(self) -> bool:
        return True

    @property
    def shared_layers(self) -> bool:
        return self.share == "all"

    def rank(self, event: Event) -> Tensor:
        return event.uniform(STREAM, per_layer=self.share == "heads", per_head=False)
