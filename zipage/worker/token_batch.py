"""The tokens of a step, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


@dataclass(slots=True)
class TokenBatch:
    """n tokens, each as if it were a decode: it stores one entry and attends to its request's entries up to this one.

    Tokens of one request stand in the order of their positions.

    Attributes:
        token_ids: int64 [n]; without meaning where `places` is not -1.
        places: int64 [n], where among the tokens of the step before the token lies, or -1.
        positions: int64 [n], of the tokens.
        slots: int64 [n], where their entries go.
        queries: int64 [n], where their queries go, -1 for nowhere.
        rows: int64 [n], of the block tables.
        lens: int64 [n], entries of each request up to this one.
    """

    token_ids: np.ndarray
    places: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    queries: np.ndarray
    rows: np.ndarray
    lens: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def concatenate(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """The tokens of all, in order."""
        if len(batches) == 1:
            return batches[0]
        return cls(*(np.concatenate([getattr(batch, field.name) for batch in batches]) for field in fields(cls)))
