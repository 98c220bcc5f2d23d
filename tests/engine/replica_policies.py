"""Policies of which only their module's name is known to a replica."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zipage.engine.core import EngineCore
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy


@dataclass(frozen=True, kw_only=True)
class RanksNan(Policy):
    name: ClassVar[str] = "ranks_nan"
    variant: ClassVar[str] = "of tests"
    paper: ClassVar[str] = "none"

    def rank(self, event: Event) -> Tensor:
        return event.uniform(1) * float("nan")


@dataclass(frozen=True, kw_only=True)
class EndsTheEngine(Policy):
    """Not a fault of the policy's own, which would cost one request: the next step raises."""

    name: ClassVar[str] = "ends_the_engine"
    variant: ClassVar[str] = "of tests"
    paper: ClassVar[str] = "none"

    def rank(self, event: Event) -> Tensor:
        EngineCore.step = _broken
        return event.uniform(1)


def _broken(core: EngineCore) -> None:
    raise ArithmeticError("a step broke")
