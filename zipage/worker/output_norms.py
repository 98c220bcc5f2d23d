"""What takes values to the residual stream, for policies that ask how long they are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor


class OutputNorms(NamedTuple):
    """The output projections of a model.

    Attributes:
        weights: of each layer, [width, Hq * d], the heads in order; kept, not copied.
        norm: of the values behind them.
    """

    weights: Sequence[Tensor]
    norm: Literal["l1", "l2"]
