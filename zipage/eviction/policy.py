"""The base of every eviction policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from torch import Tensor

from zipage.checks import check_names, checked
from zipage.eviction.event import Event

HUGE = torch.finfo(torch.float32).max / 4
"""A score above all others that is still finite, as is its sum with another."""


def option(default: Any, name: str) -> Any:
    """A field whose option has a name that Python keeps for itself."""
    return field(default=default, metadata={"option": name})


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Scores the entries of one event; its fields are its options.

    A policy ranks and nothing else: what must stay (protection, recent entries) and how many stay come with the event,
    the same for every policy. Subclasses set `name`, `variant` and `paper`, define their options as fields and
    implement `rank`.

    Attributes:
        name: as the registry knows it.
        variant: what exactly is computed, for tables.
        paper: link.
        evicts: False only where no event ever happens.
        state: entries carry a float32 from one event to the next.
        all_layers: one event must span all layers, because scores are averaged over them.
        implied_protection: what "none" means for this policy.
        always_labelled: options that `label` shows at their defaults too.
    """

    name: ClassVar[str]
    variant: ClassVar[str]
    paper: ClassVar[str]
    evicts: ClassVar[bool] = True
    implied_protection: ClassVar[str] = "none"
    always_labelled: ClassVar[tuple[str, ...]] = ()

    @property
    def num_queries(self) -> int:
        """w, the latest queries of a request that an event reads; 0 for policies that read none."""
        return getattr(self, "window", 0)

    @property
    def needs_queries(self) -> bool:
        return self.num_queries > 0

    @property
    def state(self) -> bool:
        return False

    @property
    def scope(self) -> Literal["token", "page"]:
        """What goes or stays as a whole."""
        return "token"

    @property
    def page(self) -> int:
        """Neighbouring slots that go or stay together."""
        return 1

    @property
    def drops_blocks(self) -> bool:
        """An event drops whole blocks from a request's table and moves nothing."""
        return False

    @property
    def shared_heads(self) -> bool:
        """All KV heads of a layer keep the same entries."""
        return False

    @property
    def shared_layers(self) -> bool:
        """All layers keep the same entries."""
        return False

    @property
    def all_layers(self) -> bool:
        return False

    @property
    def leaves_window_unscored(self) -> bool:
        """The entries of the window have no score, so they must be among the recent ones that stay."""
        return False

    @abstractmethod
    def rank(self, event: Event) -> Tensor:
        """Scores [L, R, H, N] (or broadcastable to it), higher stays; anything past a request's n entries.

        Finite for every entry that is not in `event.must`.
        """

    def score(self, event: Event) -> Tensor:
        """Scores of the entries, float32 [L, R, H, N]: finite up to each request's n, -inf past it.

        Raises:
            ValueError: `rank` returned something else.
        """
        scores, device = self.rank(event), event.lens.device
        if not isinstance(scores, Tensor) or scores.is_complex() or scores.device != device:
            what = f"{scores.dtype} on {scores.device}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"{self.name}.rank returned {what}: must be a tensor of real numbers on {device}")
        try:
            scores = scores.float().expand(event.shape)
        except RuntimeError as error:
            raise ValueError(
                f"{self.name}.rank returned shape {tuple(scores.shape)}: must be {tuple(event.shape)}, which are "
                "layers, requests, KV heads and entries, or broadcast to it"
            ) from error
        return torch.where(event.valid, scores, float("-inf"))

    def check(self, *, block_size: int, recent: int) -> None:
        """Check the policy against a run's sizes.

        Args:
            block_size: b.
            recent: r, latest entries that always stay.

        Raises:
            ValueError: they do not go together; the message says what would.
        """
        if self.num_queries > block_size:
            raise ValueError(
                f"{self.name}: window={self.num_queries} queries do not fit a block of {block_size}: "
                "lower the window or raise block_size"
            )
        if self.leaves_window_unscored and recent < self.num_queries:
            raise ValueError(
                f"{self.name}: recent={recent} is less than window={self.num_queries}, whose entries get no score: "
                "raise recent or lower the window"
            )

    @property
    def label(self) -> str:
        """Name of the variant with every option that is not at its default, for tables."""
        changed = [
            f"{name}={getattr(self, f.name)}"
            for name, f in self.known_options().items()
            if name in self.always_labelled or getattr(self, f.name) != f.default
        ]
        return f"{self.variant} ({', '.join(changed)})" if changed else self.variant

    @classmethod
    def known_options(cls) -> dict[str, Field]:
        """Option name -> field."""
        return {f.metadata.get("option", f.name): f for f in fields(cls)}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Policy:
        """Build from option names and values.

        Raises:
            ValueError: an option is unknown (the message names the closest) or its value is outside its range.
        """
        known = cls.known_options()
        hints = get_type_hints(cls, include_extras=True)
        given = {}
        check_names(options, tuple(known), f"policy {cls.name!r}")
        for name, value in options.items():
            given[known[name].name] = checked(f"{cls.name}.{name}", value, hints[known[name].name])
        return cls(**given)

    def _require(self, attribute: str, ok: bool, what: str) -> None:
        if not ok:
            name = next(name for name, f in self.known_options().items() if f.name == attribute)
            raise ValueError(f"{self.name}.{name}={getattr(self, attribute)!r}: must be {what}")

    def _one_of(self, attribute: str, *values: str) -> None:
        self._require(attribute, getattr(self, attribute) in values, f"one of {', '.join(values)}")

    def _unit(self, attribute: str) -> None:
        self._require(attribute, 0 <= getattr(self, attribute) <= 1, "in [0, 1]")

    def _positive(self, *attributes: str) -> None:
        for attribute in attributes:
            self._require(attribute, getattr(self, attribute) > 0, "positive")

    def _pooling(self) -> None:
        self._one_of("pooling", "never", "first", "always")
        self._require("pool_width", self.pool_width > 0 and self.pool_width % 2 == 1, "odd and positive")
