"""CriticalKV: a policy's attention, weighted by what an entry's value adds to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from zipage.checks import Unit, at_least, check_names, checked, one_of, shown, type_hints
from zipage.eviction import registry
from zipage.eviction.event import Event
from zipage.eviction.policy import HUGE, Policy


@dataclass(frozen=True, kw_only=True)
class Critical(Policy):
    """`S = (s + eps) * mean over the group of |V W_o|` [L, R, H, N], s the scores of another policy. Feng et al.,
    arXiv 2502.03805.

    The `floor(phi * free)` best by s alone stay before that, free being what is left beside the entries that must stay;
    the published code counts the whole budget, sinks and window included. s must be >= 0 (`Policy.nonnegative`), since
    a product turns the order of negative scores round. An entry carries |V W_o| along, 4 bytes.

    Options that are none of these are the base's: `base=h2o decay=0.5`. Under `expected_attention` set `vnorm=false`,
    or the value counts twice; its `eps` is out of reach.

    Attributes:
        base: policy that scores.
        phi: share of the free entries that the base alone chooses.
        eps: added to the base's scores.
        norm: "l1", as published, or "l2".
        scorer: no option: the base with its options.
    """

    name: ClassVar[str] = "critical"
    variant: ClassVar[str] = "CriticalKV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.03805"
    always_labelled: ClassVar[tuple[str, ...]] = ("norm",)

    base: str = "snapkv"
    phi: Unit = 0.5
    eps: Annotated[float, at_least(0)] = 1e-4
    norm: Annotated[str, one_of("l1", "l2")] = "l1"
    scorer: Policy | None = None

    def __post_init__(self) -> None:
        if self.scorer is None:
            object.__setattr__(self, "scorer", _made(self.base, {}))
        super().__post_init__()
        shares = "a policy whose scores are never negative: snapkv, h2o, tova, morphkv or expected_attention"
        self._require("base", self.scorer.nonnegative, shares)

    @classmethod
    def known_options(cls) -> dict[str, Field]:
        return {name: f for name, f in super().known_options().items() if name != "scorer"}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Policy:
        known, hints = cls.known_options(), type_hints(cls)
        own = {name: checked(f"{cls.name}.{name}", options[name], hints[name]) for name in known if name in options}
        rest = {name: value for name, value in options.items() if name not in known}
        return cls(scorer=_made(own.get("base", cls.base), rest), **own)

    # What the base needs.

    @property
    def calibration(self) -> str:
        return getattr(self.scorer, "calibration", "")

    @property
    def calibration_arrays(self) -> tuple[str, ...]:
        return self.scorer.calibration_arrays

    @property
    def calibration_kind(self) -> str:
        return self.scorer.calibration_kind

    @property
    def calibration_command(self) -> str:
        return self.scorer.calibration_command

    @property
    def needs_rotary_pairs(self) -> bool:
        return self.scorer.needs_rotary_pairs

    @property
    def predicts(self) -> bool:
        return self.scorer.predicts

    @property
    def num_queries(self) -> int:
        return self.scorer.num_queries

    @property
    def state(self) -> bool:
        return True

    @property
    def num_states(self) -> int:
        """The base's, and the length of the projected value, which never changes."""
        return self.scorer.num_states + 1

    @property
    def all_layers(self) -> bool:
        return self.scorer.all_layers

    @property
    def leaves_window_unscored(self) -> bool:
        return self.scorer.leaves_window_unscored

    @property
    def output_norm(self) -> str:
        return self.norm

    def check(self, *, block_size: int, recent: int) -> None:
        self.scorer.check(block_size=block_size, recent=recent)

    def check_budget(self, *, keep: int, protected: int) -> None:
        self.scorer.check_budget(keep=keep, protected=protected)

    @property
    def label(self) -> str:
        return f"{super().label} of {self.scorer.label}"

    def rank(self, event: Event) -> Tensor:
        scores = self.scorer.rank(event).float().expand(event.shape)
        free = (event.keep - event.forced.sum(dim=1)).clamp_min(0)
        ranked = event.valid & ~event.forced[:, None]
        first = event.top(scores.masked_fill(~ranked, float("-inf")), (self.phi * free.double()).floor())
        # What the base holds as HUGE may have overflowed.
        weighted = ((scores + self.eps) * self._lengths(event)).clamp_max(HUGE)
        return torch.where(first, HUGE, weighted)

    def _lengths(self, event: Event) -> Tensor:
        """|V W_o|: carried along, and made of the entries that have come since."""
        starts = torch.maximum(event.carried, event.protected)
        carried = event.slots < starts[:, None, None]
        lengths = torch.where(carried, event.stored_states[-1].clamp_min(0.0), event.output_norms(starts))
        event.store(*event.new_states[: self.scorer.num_states], lengths)
        return lengths


def _made(base: str, options: Mapping[str, Any]) -> Policy:
    """The base. Raises ValueError: there is no such policy, or `options` are not its own."""
    base = checked(f"{Critical.name}.base", base, str)
    try:
        found = registry.find(base)
    except ValueError as error:
        raise ValueError(f"{Critical.name}.base={shown(base)}: {error}") from error
    check_names(options, {**Critical.known_options(), **found.known_options()}, f"policy {Critical.name!r} of {base!r}")
    return registry.make(base, options)
