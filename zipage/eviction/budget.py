"""How many entries a request may hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipage.eviction.policy import Policy
    from zipage.eviction.protection import Protection


def is_enlarged(held: Any, asked: Any) -> Any:
    """Whether whole blocks made a budget or an interval larger by more than 5 %, which is to be pointed out.

    Args:
        held, asked: entries: numbers, or arrays of them, which are compared one by one.
    """
    return held > 1.05 * asked


@dataclass(frozen=True)
class Budget:
    """A request's bound: at most `max_blocks` blocks while it decodes, `keep` entries after an event.

    Attributes:
        max_blocks: N_max.
        block_size: b.
        interval_blocks: blocks that fill from one event to the next; the other blocks are those kept.
        tokens: what the user asked for, before rounding, for messages; None where blocks were asked for.
    """

    max_blocks: int
    block_size: int
    interval_blocks: int = 1
    tokens: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.interval_blocks < 1:
            raise ValueError(f"interval_blocks={self.interval_blocks}: must be at least 1")
        if self.kept_blocks < 1:
            raise ValueError(
                f"max_blocks={self.max_blocks}: must be at least {self.interval_blocks + 1}, one of entries kept and "
                f"{self.interval_blocks} of entries to come"
            )

    @classmethod
    def from_tokens(cls, tokens: int, block_size: int, interval: int | None = None) -> Budget:
        """Round both up to whole blocks: `N_max = ceil(tokens / b) + ceil(interval / b)`.

        Args:
            tokens: entries to keep.
            interval: entries between two events; None: a block.
        """
        if tokens < 1:
            raise ValueError(f"budget_tokens={tokens}: must be at least 1")
        if interval is not None and interval < 1:
            raise ValueError(f"interval={interval}: must be at least 1, or None for a block")
        interval_blocks = -(-(interval or block_size) // block_size)
        return cls(-(-tokens // block_size) + interval_blocks, block_size, interval_blocks, tokens)

    @property
    def kept_blocks(self) -> int:
        """Blocks after an event."""
        return self.max_blocks - self.interval_blocks

    @property
    def keep(self) -> int:
        """k, entries per layer and KV head after an event: the kept blocks, full."""
        return self.kept_blocks * self.block_size

    @property
    def peak(self) -> int:
        """`N_max * b`, entries held at most while decoding under the trigger `block_full`."""
        return self.max_blocks * self.block_size

    def __str__(self) -> str:
        """As the user gave it, and what that is in whole blocks."""
        if self.tokens is None:
            return f"a budget of {self.keep} entries"
        rounded = (
            f", rounded up to {self.keep} entries in blocks of {self.block_size}," if self.tokens < self.keep else ""
        )
        return f"budget_tokens={self.tokens}{rounded}"

    def check(self, policy: Policy, protection: Protection, recent: int) -> None:
        """Check that policy, protection and budget go together.

        Raises:
            ValueError: they do not; the message names what to change.
        """
        if not policy.evicts:
            return
        policy.check(block_size=self.block_size, recent=recent)
        protection.check(self.keep, recent, policy.page, str(self))
        policy.check_budget(keep=self.keep, protected=protection.sinks)
