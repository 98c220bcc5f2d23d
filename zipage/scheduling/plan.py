"""What the worker gets: arrays, ids and block numbers, so that several processes can get the same.

Nothing here refers to a live request, and all of it can be pickled.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from zipage.eviction.rule import EvictionRule
from zipage.sampling_params import SamplingParams
from zipage.tile_table import Table, TileTable

SEED_STEP = 0xD1342543DE82EF95
"""Between the samples of a prompt. Odd, so that each gets a seed of its own, and not what lies between the engine's own
seeds: sample 1 under seed 0 is not to draw what sample 0 draws under seed 1."""


class Save(NamedTuple):
    """Blocks to copy to host memory under a request's number; with the queries of `query_slot`, unless it is -1, what
    recurrent layers keep of `row`, and blocks of sliding layers.
    """

    number: int
    block_ids: Table
    query_slot: int
    row: int = -1
    sliding_ids: Sequence[int] = ()


class Restore(NamedTuple):
    """Blocks that take back what was saved under a request's number.

    Attributes:
        num_shared: leading blocks that hold the same already, to be left alone.
        query_slot: takes the queries that were saved; -1 for none.
        row: takes the recurrent layers' state.
        sliding_ids: the same of sliding layers, where none are left alone.
    """

    number: int
    block_ids: Table
    num_shared: int
    query_slot: int
    row: int = -1
    sliding_ids: Sequence[int] = ()


class RowStart(NamedTuple):
    """A request takes a row of the batch: what its tokens are drawn by for as long as it is there.

    Attributes:
        seed, index: a draw is a function of these and of the token's number in the output.
        stop_ids: tokens that end the request.
        bad_words: tokens of texts that may not come.
        token_ids: the text so far, C ints, where the options need it (`SamplingParams.needs_history`); else None.
    """

    row: int
    sampling_params: SamplingParams
    num_prompt_tokens: int
    seed: int = 0
    index: int = 0
    stop_ids: frozenset[int] = frozenset()
    bad_words: Sequence[Sequence[int]] = ()
    token_ids: array | None = None


class TableGrowth(NamedTuple):
    """Blocks that a row's table holds from place `first` on."""

    row: int
    first: int
    block_ids: Table


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


@dataclass(slots=True, eq=False)
class StepPlan:
    """One step: blocks are moved, rows and tables are brought up to date, then n requests compute T tokens.

    Attributes:
        drops: numbers of requests whose saved blocks are not needed any more.
        saves, restores: blocks of requests that are paused and resumed; saves come first, since others, resumed ones
            among them, get their blocks.
        copies, sliding_copies: (source, destination) blocks to copy after that; of sliding layers.
        starts: rows that requests take.
        tables, sliding_tables: what block tables have gained; of a table that was replaced, all of it. In those of
            sliding layers, what is out of the window has no meaning.
        num_decodes: leading requests, which compute one token each; the others compute a chunk of their text.
        rows: int64 [n], row of each request.
        counts: int64 [n], tokens that it computes, at least one.
        positions: int64 [n], logical position of its first token.
        lens: int64 [n], entries that it holds already.
        query_slots: int64 [n], where its queries are kept, or -1.
        token_rows: int64 [n], where its token lies among those that the step before samples; -1 where it is known.
        samples: bool [n], whether it gets a token. It has then reached the end of its text.
        token_ids: int64 [T], those of each request in turn; without meaning where `token_rows` is not -1.
    """

    drops: list[int] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    restores: list[Restore] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    sliding_copies: list[tuple[int, int]] = field(default_factory=list)
    starts: list[RowStart] = field(default_factory=list)
    tables: list[TableGrowth] = field(default_factory=list)
    sliding_tables: list[TableGrowth] = field(default_factory=list)
    num_decodes: int = 0
    rows: np.ndarray = field(default_factory=_none)
    counts: np.ndarray = field(default_factory=_none)
    positions: np.ndarray = field(default_factory=_none)
    lens: np.ndarray = field(default_factory=_none)
    query_slots: np.ndarray = field(default_factory=_none)
    token_rows: np.ndarray = field(default_factory=_none)
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    token_ids: np.ndarray = field(default_factory=_none)

    def blocks_taken(self) -> set[int]:
        """Blocks, or tiles, that tables have gained, and those that are copied within the cache."""
        taken = {block for copy in self.copies for block in copy}
        for growth in self.tables:
            ids = growth.block_ids
            taken.update(ids.ids.tolist() if isinstance(ids, TileTable) else ids)
        return taken

    def sliding_blocks_taken(self) -> set[int]:
        """The same of sliding layers."""
        taken = {block for copy in self.sliding_copies for block in copy}
        return taken.union(*(growth.block_ids for growth in self.sliding_tables))


class CompressionOrder(NamedTuple):
    """One request to compress to its budget.

    Attributes:
        number: of the order; never used again.
        rule: the request's.
        block_ids: its block table, the sources.
        new_ids: the table afterwards, k / b blocks. Those from `rule.pinned_blocks` on are private and take the
            survivors; those before it stay as they are. Empty where whole blocks are dropped or budgets are unequal:
            what stays is known once the scores are.
        num_entries: n, entries that it holds; where budgets are unequal, its cache length (`TileTable.lens`).
        window_end: its logical length: the last query of the window is that of position `window_end - 1`.
        query_slot: where the window's queries are, or -1.
        num_compressions: t, before this one.
        num_prompt_tokens: P.
        seed, index: what is random is a function of these and of t.
    """

    number: int
    rule: EvictionRule
    block_ids: Table
    new_ids: list[int]
    num_entries: int
    window_end: int
    query_slot: int = -1
    num_compressions: int = 0
    num_prompt_tokens: int = 1
    seed: int = 0
    index: int = 0

    @property
    def num_places(self) -> int:
        """Blocks of the longest head."""
        return self.block_ids.tiles.shape[1] if self.rule.allocation is not None else len(self.block_ids)

    @property
    def sample_seed(self) -> int:
        """A seed of the sample's own, below 2^63."""
        return (self.seed + self.index * SEED_STEP) % 2**63
