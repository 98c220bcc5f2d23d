"""An example of a user's own policy: attention weighted by the length of the value vectors."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from zipage.checks import at_least
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy
from zipage.eviction.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class MyPolicy(Policy):
    """`S = A_mean * |V|^power` [L, R, H, N]."""

    name: ClassVar[str] = "my_policy"
    variant: ClassVar[str] = "value-weighted attention"
    paper: ClassVar[str] = ""

    window: ClassVar[int] = 16  # latest queries that `attention` reads; leave it out where none are needed
    power: Annotated[float, at_least(0)] = 1.0

    def rank(self, event: Event) -> Tensor:
        attention = event.attention("all", group="mean", window="mean")
        return attention * event.values().norm(dim=-1) ** self.power
