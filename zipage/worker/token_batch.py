"""The tokens of a step, and its chunks of prompts, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zipage.scheduling.plan import StepPlan
from zipage.worker.block_tables import BlockTables
from zipage.worker.tile_tables import TileTables


@dataclass(slots=True)
class TokenBatch:
    """T tokens, each as if it were a decode: it stores one entry and attends to its request's entries up to this one.

    Tokens of one request stand in the order of their positions.

    Attributes:
        token_ids: int64 [T]; without meaning where `token_rows` is not -1.
        token_rows: int64 [T], where among the tokens of the step before the token lies, or -1.
        positions: int64 [T], of the tokens.
        slots: int64 [T], where their entries go; where heads hold unequal lengths, by the cache length of the request.
        queries: int64 [T], where their queries go, -1 for nowhere.
        rows: int64 [T], of the block tables.
        lens: int64 [T], entries of each request up to this one.
        sliding_slots: int64 [T], where their entries go in sliding layers; None where there are none. These hold the
            entries up to `positions`, as far as they are in the window.
    """

    token_ids: np.ndarray
    token_rows: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    queries: np.ndarray
    rows: np.ndarray
    lens: np.ndarray
    sliding_slots: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def of(
        cls, plan: StepPlan, tables: BlockTables | TileTables, window: int, sliding: BlockTables | None = None
    ) -> TokenBatch:
        """The tokens of a plan that `tables` are up to date with, and those of `sliding` layers.

        Args:
            window: w, queries in a query slot. Of a longer chunk only the last w are kept, so that no two share a place
                of the ring.
        """
        token_rows, positions, entries = plan.token_rows, plan.positions, plan.lens
        rows, query_slots = plan.rows, plan.query_slots
        if len(plan.token_ids) > len(plan.counts):
            counts = plan.counts
            left = np.repeat(np.cumsum(counts), counts) - np.arange(len(plan.token_ids))
            done = np.repeat(counts, counts) - left
            token_rows, rows = np.repeat(token_rows, counts), np.repeat(rows, counts)
            positions, entries = np.repeat(positions, counts) + done, np.repeat(entries, counts) + done
            query_slots = np.where(left <= window, np.repeat(query_slots, counts), -1)
        queries = query_slots  # -1, unless there are any
        if window:
            queries = np.where(query_slots >= 0, query_slots * window + positions % window, -1)
        sliding_slots = None if sliding is None else sliding.slots(rows, positions)
        slots = tables.slots(rows, entries)
        return cls(plan.token_ids, token_rows, positions, slots, queries, rows, entries + 1, sliding_slots)


@dataclass(slots=True)
class PromptChunks:
    """The chunks of prompts that end a batch.

    Attributes:
        rows: int64 [P], of the block tables.
        lens: int64 [P], entries of each request with its chunk's.
        bounds: int64 [P + 1], places of their tokens in the batch.
        ends: int64 [P], logical positions behind them: `lens` of sliding layers, which alone read them.
    """

    rows: np.ndarray
    lens: np.ndarray
    bounds: np.ndarray
    ends: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, plan: StepPlan) -> PromptChunks:
        """The chunks of a plan."""
        n = plan.num_decodes
        counts = plan.counts[n:]
        bounds = n + np.cumsum([0, *counts])
        return cls(plan.rows[n:], plan.lens[n:] + counts, bounds, plan.positions[n:] + counts)
