"""What a request holds in sliding layers."""

from __future__ import annotations

from dataclasses import dataclass, field


def most_blocks(window: int, block_size: int, max_model_len: int | None = None) -> int:
    """Blocks that the entries of a window lie in at most, wherever it begins in a block of a request.

    Args:
        max_model_len: tokens of the longest request; None: there is no bound.
    """
    blocks = -(-(window - 1) // block_size) + 1
    return blocks if max_model_len is None else min(blocks, -(-max_model_len // block_size))


@dataclass(slots=True)
class SlidingTable:
    """The end of a block table, whose beginning is out of every window and given back. Entries are numbered by their
    logical positions: those of block i of the whole table are i * b to (i + 1) * b - 1.

    Attributes:
        first: blocks that were given back.
        block_ids: those from there on.
        num_registered: leading blocks of the whole table that the prefix index was told of.
        num_told: leading blocks of the whole table that the worker knows of.
    """

    first: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_registered: int = 0
    num_told: int = 0

    @property
    def end(self) -> int:
        """Blocks of the whole table."""
        return self.first + len(self.block_ids)

    @property
    def has_grown(self) -> bool:
        return self.num_told < self.end

    def take_growth(self) -> tuple[int, list[int]]:
        """What the table has gained since the last time: from which place on, and the blocks."""
        first, self.num_told = max(self.num_told, self.first), self.end
        return first, self.block_ids[first - self.first :]
