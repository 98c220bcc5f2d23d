"""Spans of a step's tokens, each of a sequence whose state lies in a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.layout import check_numbers, fail

NO_ROW = -1
"""Row of a span that belongs to no sequence."""


class Spans(NamedTuple):
    """B spans.

    Attributes:
        rows: int64 [B], of their states, no two the same. A span of row -1 is left out: nothing of it is read, and
            nothing written.
        starts: int32 [B + 1]: span i is tokens `starts[i]` to `starts[i + 1]`; one without tokens leaves its state
            as it is. None: of one token each.
        fresh: bool [B], whether a span begins its sequence: its state is zero, whatever the row holds. None: none does.
    """

    rows: Tensor
    starts: Tensor | None = None
    fresh: Tensor | None = None

    def check(self, tokens: int, device: torch.device) -> None:
        """Raise a ValueError that names what is not as above, its value and the remedy."""
        if self.rows.dim() != 1:
            fail("rows", "shape", tuple(self.rows.shape), "give [spans]")
        count = len(self.rows)
        check_numbers("rows", self.rows, torch.int64, (count,), device, "x")
        if self.starts is None:
            if count != tokens:
                fail("rows", "shape", (count,), f"give one for each of {tokens} tokens, or `starts`")
        else:
            check_numbers("starts", self.starts, torch.int32, (count + 1,), device, "x")
        if self.fresh is not None:
            check_numbers("fresh", self.fresh, torch.bool, (count,), device, "x")

    @property
    def fresh_bytes(self) -> Tensor | None:
        """`fresh` as int8."""
        return None if self.fresh is None else self.fresh.view(torch.int8)

    def each(self) -> list[tuple[int, int, int, bool]]:
        """Row, begin and end of each span that has a row and tokens, and whether it is fresh; waits for the device."""
        count = len(self.rows)
        starts = range(count + 1) if self.starts is None else self.starts.tolist()
        fresh = [False] * count if self.fresh is None else self.fresh.tolist()
        spans = zip(self.rows.tolist(), starts[:-1], starts[1:], fresh, strict=True)
        return [span for span in spans if span[0] != NO_ROW and span[1] < span[2]]
