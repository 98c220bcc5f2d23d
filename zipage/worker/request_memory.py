"""What a bounded request takes, told before its model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from zipage.config import EngineConfig
from zipage.eviction import allocation as allocations
from zipage.eviction import registry
from zipage.eviction.budget import Budget
from zipage.models.loading.loader import read_shape
from zipage.sliding_table import most_blocks
from zipage.worker.memory_plan import bounded_sizes, sliding_block_bytes


@dataclass(frozen=True, slots=True)
class RequestMemory:
    """Bytes of a request's cache by its budget, for one model, policy and interval.

    Blocks that a long prompt takes beyond N_max come on top, as do those that a compression of shared blocks takes.

    Attributes:
        block_size: entries in a block.
        interval_blocks: blocks that fill between two compressions, and what unequal budgets may take beside them.
        block_bytes, query_slot_bytes: as in `MemoryPlan`.
        sliding_bytes: of what a request holds in sliding layers while it decodes, whatever its budget.
    """

    block_size: int
    interval_blocks: int
    block_bytes: int
    query_slot_bytes: int
    sliding_bytes: int = 0

    @classmethod
    def of(cls, config: EngineConfig, policy: str | None = None) -> RequestMemory:
        """Reads the headers of the model's files.

        Args:
            policy: instead of the config's policy and its options, this one at its defaults.

        Raises:
            ValueError, FileNotFoundError: there is no such policy, it never evicts, or the model can't be read.
        """
        made = registry.make(config.policy, config.policy_options) if policy is None else registry.make(policy, {})
        if not made.evicts:
            raise ValueError(f"policy {made.name!r} never evicts, so nothing bounds a request")
        options = {"load_format": config.load_format, "dtype": config.dtype, "device": config.device}
        spec, dtype = read_shape(config.model, **options)
        budget = Budget.from_tokens(1, config.block_size, config.interval)
        allocation = allocations.make(config.allocation, config.allocation_options)
        interval_blocks = budget.interval_blocks + (allocation.extra_blocks if allocation else 0)
        sizes = spec, config.block_size, dtype
        sliding_bytes = 0
        if spec.sliding_layers:
            longest = config.model_len(spec.max_position)
            window = most_blocks(spec.sliding_window, config.block_size, longest)
            sliding_bytes = window * sliding_block_bytes(*sizes)
        return cls(config.block_size, interval_blocks, *bounded_sizes(*sizes, made), sliding_bytes)

    def bytes_of(self, budget_tokens: int) -> int:
        """What a request of this budget holds at most while it decodes: N_max blocks, a query slot, and a window."""
        blocks = -(-budget_tokens // self.block_size) + self.interval_blocks
        return blocks * self.block_bytes + self.query_slot_bytes + self.sliding_bytes

    def budget_in(self, num_bytes: int) -> int:
        """The largest budget, in entries of whole blocks, with which a request holds at most `num_bytes`.

        Raises:
            ValueError: not one block can be kept; the message says what that takes.
        """
        left = num_bytes - self.query_slot_bytes - self.sliding_bytes
        blocks = left // self.block_bytes - self.interval_blocks
        if blocks < 1:
            raise ValueError(
                f"{num_bytes:,} bytes are too few for a request: a block of {self.block_size} entries kept and an "
                f"interval of {self.interval_blocks * self.block_size} to come take {self.bytes_of(1):,}"
            )
        return blocks * self.block_size
