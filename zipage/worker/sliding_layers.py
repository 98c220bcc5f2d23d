"""Which layers a policy ranks, and what the others keep: those with a window keep the latest entries.

All layers of a request have the same blocks and as many entries. In a sliding layer the latest of them stay, behind
pinned blocks, which no event writes to; so, within a window, places in the cache are as far apart as positions, and
attention by the one is attention by the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipage.worker.paged_event import PagedEvent


def ranked_layers(event: PagedEvent, full: range) -> slice | None:
    """Places in a launch of the `full` layers of the model; None: there is none."""
    places = [event.layers.index(number) for number in full if number in event.layers]
    return slice(places[0], places[-1] + 1, full.step) if places else None


def latest(event: PagedEvent, pinned: Tensor, num_kept: int) -> Tensor:
    """What each sliding layer keeps: its pinned entries and the latest, `keep` in all.

    Args:
        pinned: int32 [R], entries in pinned blocks.
        num_kept: K.

    Returns:
        int32 [R, K]: slots, ascending, then -1.
    """
    places = torch.arange(num_kept, dtype=torch.int32, device=event.device)
    keep = torch.minimum(event.keep, event.lens)[:, None]
    slots = torch.where(places < pinned[:, None], places, places + event.lens[:, None] - keep)
    return slots.masked_fill_(places >= keep, -1)
