"""Policies that the ranks of tests import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zipage.eviction.event import Event
from zipage.eviction.policy import Policy


@dataclass(frozen=True, kw_only=True)
class FailsOnce(Policy):
    """Fails for requests of `FAILING_SEED`, and combines the heads of all ranks for the others."""

    name: ClassVar[str] = "fails_once"
    variant: ClassVar[str] = "of tests"
    paper: ClassVar[str] = "none"

    def rank(self, event: Event) -> Tensor:
        if FAILING_SEED in event.seeds:
            raise ArithmeticError("not this one")
        return event.mean_over_heads(event.key_norms())


@dataclass(frozen=True, kw_only=True)
class FailsOnOneRank(Policy):
    """The same on the second rank alone, for which the first one waits there."""

    name: ClassVar[str] = "fails_on_one_rank"
    variant: ClassVar[str] = "of tests"
    paper: ClassVar[str] = "none"

    def rank(self, event: Event) -> Tensor:
        if event.head_offset and FAILING_SEED in event.seeds:
            raise MemoryError("no memory on this rank")
        return self.score_of(event)

    def score_of(self, event: Event) -> Tensor:
        return event.mean_over_heads(event.key_norms())


@dataclass(frozen=True, kw_only=True)
class FailsBesideOne(FailsOnOneRank):
    """The same, where the first one is done by then."""

    name: ClassVar[str] = "fails_beside_one"

    def score_of(self, event: Event) -> Tensor:
        return event.key_norms()


@dataclass(frozen=True, kw_only=True)
class CatchesAll(Policy):
    """Fails on the second rank for requests of `FAILING_SEED`, and goes on whatever happens elsewhere."""

    name: ClassVar[str] = "catches_all"
    variant: ClassVar[str] = "of tests"
    paper: ClassVar[str] = "none"

    def rank(self, event: Event) -> Tensor:
        if event.head_offset and FAILING_SEED in event.seeds:
            raise MemoryError("no memory on this rank")
        norms = event.key_norms()
        try:
            return event.mean_over_heads(norms)
        except RuntimeError:
            return norms


FAILING_SEED = 1234
POLICIES = (FailsOnce, FailsOnOneRank, FailsBesideOne, CatchesAll)
