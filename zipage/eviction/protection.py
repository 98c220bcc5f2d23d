"""Entries that stay whatever the policy says: an axis of its own, valid for every policy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zipage.checks import shown

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Protection:
    """Leading entries that must stay. They are the leading slots at every event, because survivors keep their order.

    Attributes:
        kind: "none"; "sink": the first `sinks` entries; "prompt": the prompt's, as far as the budget holds them.
        sinks: m.
    """

    kind: Literal["none", "sink", "prompt"] = "none"
    sinks: int = 0

    def __str__(self) -> str:
        return f"sink:{self.sinks}" if self.kind == "sink" else self.kind

    @classmethod
    def parse(cls, text: str, implied: str = "none", where: str = "") -> Protection:
        """Read "none", "sink:m" or "prompt".

        Args:
            implied: what "none" means for the policy (`Policy.implied_protection`).
            where: stands before the option's name in messages.
        """
        text = implied if text == "none" else text
        if text in ("none", "prompt"):
            return cls(text)
        sinks = re.fullmatch("sink:([1-9][0-9]{0,9})", text)
        if sinks is None:
            raise ValueError(f"{where}protection={shown(text)}: must be none, prompt or sink:N")
        return cls("sink", int(sinks[1]))

    def check(self, keep: int, recent: int, page: int = 1, budget: str = "the budget") -> None:
        """Check against a budget of `keep` entries, `recent` of them the latest, in pages of `page`.

        Args:
            budget: what messages call it.

        Raises:
            ValueError: what must stay leaves nothing to choose.
        """
        if recent < 0:
            raise ValueError(f"recent_tokens={recent}: must be at least 0")
        if keep <= recent:
            raise ValueError(
                f"{budget} leaves nothing to choose beside recent_tokens={recent}: "
                f"raise budget_tokens above {recent} or lower recent_tokens"
            )
        if self.sinks + recent > keep:
            raise ValueError(
                f"{budget} is less than protection=sink:{self.sinks} and recent_tokens={recent} together: "
                f"raise budget_tokens to at least {self.sinks + recent} or protect less"
            )
        if page > 1 and self._free_pages(keep, recent, page) < 1:
            raise ValueError(
                f"{budget} holds only pages of {page} that must stay (recent_tokens={recent}, protection={self}): "
                "raise budget_tokens, lower recent_tokens or take smaller pages"
            )

    def length(self, prompt_len: int, keep: int, recent: int, page: int = 1) -> int:
        """Leading entries protected.

        Of a prompt of P tokens, the first `P_eff = min(P, k - r - 1)`, so that one entry remains to choose; with pages,
        as many as leave one page free.
        """
        if self.kind == "sink":
            return self.sinks
        if self.kind == "none":
            return 0
        room = keep - recent - 1 if page == 1 else (self._free_pages(keep, recent, page) - 1) * page
        return min(prompt_len, room)

    def prompt_truncated(self, prompt_len: int, keep: int, recent: int, page: int = 1) -> bool:
        """The whole prompt should be protected and does not fit."""
        return self.kind == "prompt" and self.length(prompt_len, keep, recent, page) < prompt_len

    def _free_pages(self, keep: int, recent: int, page: int) -> int:
        """Pages of the budget that hold neither recent entries nor sinks, the last page being full."""
        return keep // page - -(-recent // page) - -(-self.sinks // page)


def forced_mask(lens: Tensor, protected: Tensor, recent: int, num_slots: int) -> Tensor:
    """Entries that must stay: the protected leading ones and the latest `recent`.

    Args:
        lens: int32 [R], entries held.
        protected: int32 [R], of `Protection.length`.
        num_slots: N.

    Returns:
        bool [R, N]; False past n.
    """
    import torch

    slots = torch.arange(num_slots, device=lens.device)
    lens, protected = lens[:, None], protected[:, None]
    return (slots < lens) & ((slots < protected) | (slots >= lens - recent))
