"""What bounds one request's cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zipage.eviction.budget import Budget

if TYPE_CHECKING:
    from zipage.eviction.allocation import Allocation
    from zipage.eviction.policy import Policy
    from zipage.eviction.protection import Protection


@dataclass(frozen=True)
class EvictionRule:
    """Policy, budget and protection as they apply to one request.

    The scheduler reads the numbers, the compressor hands the policy its events; neither reads more.

    Attributes:
        policy: ranks the entries.
        budget: N_max and k.
        protected: leading entries that stay at every event.
        recent: r, latest entries that stay at every event.
        prompt_truncated: the whole prompt should be protected and does not fit the budget.
        allocation: how budgets differ by layer and head; None: they do not.
    """

    policy: Policy
    budget: Budget
    protected: int = 0
    recent: int = 0
    prompt_truncated: bool = False
    allocation: Allocation | None = None

    @classmethod
    def of(
        cls,
        policy: Policy,
        budget: Budget,
        protection: Protection,
        recent: int,
        prompt_len: int,
        allocation: Allocation | None = None,
    ) -> EvictionRule:
        """The rule for a prompt of `prompt_len` tokens.

        Raises:
            ValueError: policy, budget, protection and allocation do not go together; the message names what to change.
        """
        budget.check(policy, protection, recent)
        if allocation is not None:
            allocation.check(policy)
        size = prompt_len, budget.keep, recent, policy.page
        leading = protection.length(*size), recent, protection.prompt_truncated(*size)
        return cls(policy, budget, *leading, allocation)

    @property
    def keep(self) -> int:
        """k, entries per layer and KV head after an event."""
        return self.budget.keep

    @property
    def max_blocks(self) -> int:
        """N_max."""
        return self.budget.max_blocks

    @property
    def peak_blocks(self) -> int:
        """Blocks, or columns of tiles, that a request holds at most while it decodes."""
        return self.max_blocks + (self.allocation.extra_blocks if self.allocation else 0)

    @property
    def must(self) -> int:
        """Entries that an event may not evict."""
        return self.protected + self.recent

    @property
    def kept_blocks(self) -> int:
        """Blocks after an event."""
        return self.budget.kept_blocks

    @property
    def window(self) -> int:
        """w, latest queries that an event reads; 0: the request needs no query slot."""
        return self.policy.num_queries

    @property
    def drops_blocks(self) -> bool:
        """Survivors stay where they are and whole blocks go (native pages)."""
        return self.policy.drops_blocks

    @property
    def cuts_table(self) -> bool:
        """What a request keeps of its blocks is known once the scores are: whole pages, or tiles of unequal heads."""
        return self.drops_blocks or self.allocation is not None

    @property
    def pinned_blocks(self) -> int:
        """Leading blocks of protected entries alone: no event writes to them, so they may stay shared."""
        return self.protected // self.budget.block_size
