"""Policies that the ranks of tests import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zipage.eviction.event import Event
from zipage.eviction.policy import Policy


@dataclass(frozen=True, kw_only=True)
class FailsOnce(Policy):
    """Fails for the first request that an engine has, and combines the heads of all ranks for the others."""

    name: ClassVar[str] = "fails_once"
    variant: ClassVar[str] = "of tests"
    paper: ClassVar[str] = "none"

    def rank(self, event: Event) -> Tensor:
        if min(event.seeds) == FIRST_SEED:
            raise ArithmeticError("not this one")
        return event.mean_over_heads(event.key_norms())


@dataclass(frozen=True, kw_only=True)
class FailsOnOneRank(Policy):
    """The same on the second rank alone. With `combines` the first one waits for it there, else it is done by then."""

    name: ClassVar[str] = "fails_on_one_rank"
    variant: ClassVar[str] = "of tests"
    paper: ClassVar[str] = "none"

    combines: bool = True

    def rank(self, event: Event) -> Tensor:
        if event.head_offset and min(event.seeds) == FIRST_SEED:
            raise MemoryError("no memory on this rank")
        norms = event.key_norms()
        return event.mean_over_heads(norms) if self.combines else norms


@dataclass(frozen=True, kw_only=True)
class CatchesAll(Policy):
    """Fails on the second rank for the first request that an engine has, and goes on whatever happens elsewhere."""

    name: ClassVar[str] = "catches_all"
    variant: ClassVar[str] = "of tests"
    paper: ClassVar[str] = "none"

    def rank(self, event: Event) -> Tensor:
        if event.head_offset and min(event.seeds) == FIRST_SEED:
            raise MemoryError("no memory on this rank")
        norms = event.key_norms()
        try:
            return event.mean_over_heads(norms)
        except RuntimeError:
            return norms


FIRST_SEED = 0
