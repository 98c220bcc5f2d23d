"""Who runs in a step: what the scheduler decides and the engine books. The worker gets what `plan_step` makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from zipage.scheduling.request import Request
from zipage.tile_table import Table


class Chunk(NamedTuple):
    """`num_tokens` tokens of a request's known text to compute, from position `request.num_computed` on."""

    request: Request
    num_tokens: int


class Preemption(NamedTuple):
    """A request that gave its blocks up before its first compression, and what it held."""

    request: Request
    num_entries: int
    num_blocks: int


class Swap(NamedTuple):
    """Blocks of a request to copy to host memory or back.

    Attributes:
        block_ids: of the request when it is paused; those it gets when it resumes.
        num_shared: leading blocks that a resumed request found unchanged, to be left alone.
        query_slot: whose queries go with the blocks; -1 for none.
        row: of the batch, which it leaves or takes.
        sliding_ids: the same of blocks of sliding layers; all of them are copied.
    """

    request: Request
    block_ids: Table
    num_shared: int
    query_slot: int
    row: int = -1
    sliding_ids: Sequence[int] = ()


@dataclass(slots=True, eq=False)
class Batch:
    """What one step does, in the order of the fields: pauses, resumptions, copies, then the forward pass.

    Attributes:
        paused: requests that lost their blocks to this step after a compression; the entries go to host memory.
        resumed: paused requests that come back; they decode from the next step on.
        copies, sliding_copies: (source, destination) blocks to copy before the forward pass; of sliding layers.
        entered: requests that got a row with this step, new ones and resumed ones.
        decodes: running requests that compute their one newest token.
        prefills: chunks of prompts (and of texts that are recomputed after a preemption).
        preempted: requests that lost their blocks to this step; their text is computed again.
        sampled: requests that get a token from this step: `decodes`, then prefills that reach the end of their text.
        slides: the model has sliding layers, whose tables may have grown.
        num_stalled: running requests that could decode if they had a query slot or a block; they wait.
    """

    paused: list[Swap] = field(default_factory=list)
    resumed: list[Swap] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    sliding_copies: list[tuple[int, int]] = field(default_factory=list)
    entered: list[Request] = field(default_factory=list)
    decodes: list[Request] = field(default_factory=list)
    prefills: list[Chunk] = field(default_factory=list)
    preempted: list[Preemption] = field(default_factory=list)
    sampled: list[Request] = field(default_factory=list)
    slides: bool = False
    num_stalled: int = 0

    @property
    def num_decodes(self) -> int:
        return len(self.decodes)

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + sum(chunk.num_tokens for chunk in self.prefills)

    @property
    def is_empty(self) -> bool:
        """Nothing changes with this step."""
        return not (self.num_decodes or self.prefills or self.paused or self.resumed or self.preempted)
