"""What is left to do of a compression whose batch failed."""

from __future__ import annotations

import traceback
from typing import NamedTuple

from torch import Tensor

from zipage.worker.compressor import PartlyCompressed


class Rest(NamedTuple):
    """What is left of a compression whose batch failed.

    Attributes:
        first_layer: the layers before it are compressed.
        is_misranked: the policy ranked an entry of theirs NaN.
        counts: int64 [first_layer, 1, H], what their heads keep, where budgets are unequal.
    """

    first_layer: int
    is_misranked: bool
    counts: Tensor | None = None


def first_layer_of(error: BaseException) -> int | None:
    """The first layer that is untouched by what failed with `error`; None where what layers hold is unknown."""
    return error.first_layer if isinstance(error, PartlyCompressed) else 0


def rests(num_orders: int, error: BaseException) -> list[Rest] | None:
    """What is left of each order of a batch that failed with `error`; None where no order can be helped alone."""
    first_layer = first_layer_of(error)
    if num_orders == 1 or first_layer is None:
        return None
    _drop_tensors(error)
    if not isinstance(error, PartlyCompressed):
        return [Rest(first_layer, False)] * num_orders
    counts = [None] * num_orders if error.counts is None else error.counts.split(1, dim=1)
    return [Rest(first_layer, *of_order) for of_order in zip(error.failed(), counts, strict=True)]


def _drop_tensors(error: BaseException) -> None:
    """Free what the frames of a failed computation hold: what follows may need their memory."""
    chain: BaseException | None = error
    seen = set()  # an error may be its own cause
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
