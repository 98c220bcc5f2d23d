"""The base of every eviction policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zipage.checks import check_fields, check_names, checked, type_hints
from zipage.eviction.calibration import COMMAND, file_digest
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
        state: entries carry `num_states` numbers (float32) from one event to the next.
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

    def __post_init__(self) -> None:
        check_fields(self, f"{self.name}.")
        if self.calibration_arrays and not getattr(self, "calibration", ""):
            command = self.calibration_command
            raise ValueError(f"{self.name}.calibration: give the calibration file of the model; make it: {command}")

    @property
    def calibration_arrays(self) -> tuple[str, ...]:
        """Names of the arrays that an event needs of the file at the policy's option `calibration`; most need none."""
        return ()

    @property
    def needs_rotary_pairs(self) -> bool:
        """Whether it reads `Event.inv_freq`: one set of frequencies, and all dimensions of a head in pairs."""
        return False

    @property
    def calibration_kind(self) -> str:
        """What that file must be."""
        return self.name

    @property
    def calibration_command(self) -> str:
        """What makes that file."""
        return f"{COMMAND} --kind {self.calibration_kind}"

    @property
    def predicts(self) -> bool:
        """A trained scorer gives every new entry a number, which `Event.predictions` tells.

        It is `x @ weight.T + bias`, x the input of the layer's attention. `calibration_arrays` names the two, of
        [L, H, width] and [L, H].
        """
        return False

    @property
    def output_norm(self) -> Literal["l1", "l2"] | None:
        """The norm in which an event tells how long projected values are (`Event.output_norms`); most need none."""
        return None

    @property
    def nonnegative(self) -> bool:
        """Scores are never below 0, so that they can be multiplied (`critical`)."""
        return False

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
    def num_states(self) -> int:
        """Numbers that an entry carries, 4 bytes each."""
        return int(self.state)

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

    @property
    def comparable(self) -> bool:
        """Scores of different heads compare, as shares of attention do: heads may compete for entries by them."""
        return False

    @abstractmethod
    def rank(self, event: Event) -> Tensor:
        """Scores [L, R, H, N] (or broadcastable to it), higher stays; anything past a request's n entries.

        Of any real dtype, on the event's device. Finite for every entry that is not in `event.forced`.
        """

    def score(self, event: Event) -> Tensor:
        """Scores of the entries, float32 [L, R, H, N]: finite up to each request's n, -inf past it.

        Raises:
            ValueError: `rank` returned anything but what it must, or a policy with `state` stored none.
        """
        valid = event.valid
        scores = event.check_scores(self.rank(event), f"{self.name}: rank must return").float().expand(event.shape)
        if self.num_states and len(event.new_states) != self.num_states:
            raise ValueError(f"{self.name}: has state, so rank must hand the new one to event.store")
        return torch.where(valid, scores, float("-inf"))

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
                f"{self.name}: recent_tokens={recent} is less than window={self.num_queries}, whose entries get no "
                "score: raise recent_tokens or lower the window"
            )

    def check_budget(self, *, keep: int, protected: int) -> None:  # noqa: B027
        """Check the policy against what one request keeps.

        Args:
            keep: k, entries after an event.
            protected: leading entries that always stay.

        Raises:
            ValueError: the policy has nothing to rank there; the message says what would help.
        """

    @property
    def label(self) -> str:
        """Name of the variant with every option that is not at its default, for tables."""
        changed = [
            f"{name}={self._labelled(name, getattr(self, f.name))}"
            for name, f in self.known_options().items()
            if name in self.always_labelled or getattr(self, f.name) != f.default
        ]
        return f"{self.variant} ({', '.join(changed)})" if changed else self.variant

    def _labelled(self, name: str, value: Any) -> Any:
        """A calibration file goes by the first 8 digits of its sha256, where it is there."""
        digest = file_digest(value) if name == "calibration" and self.calibration_arrays else None
        return value if digest is None else digest[:8]

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
        hints = type_hints(cls)
        fields_by_option = cls.known_options()
        check_names(options, fields_by_option, f"policy {cls.name!r}")
        given = {fields_by_option[name].name: (name, value) for name, value in options.items()}
        # Checked before a `__post_init__` of the policy's own sees them.
        return cls(**{f: checked(f"{cls.name}.{name}", value, hints[f]) for f, (name, value) in given.items()})

    def _require(self, attribute: str, ok: bool, what: str) -> None:
        if not ok:
            name = next(name for name, f in self.known_options().items() if f.name == attribute)
            raise ValueError(f"{self.name}.{name}={getattr(self, attribute)!r}: must be {what}")
