"""What the scheduling process and the ranks tell each other, as plain data.

Ranks take what they are sent one after the other, in order, and decide nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zipage.config import EngineConfig
from zipage.scheduling.plan import CompressionOrder, StepPlan
from zipage.spread import Inherited
from zipage.worker.memory_plan import MemoryPlan
from zipage.worker.worker import DeviceMemory

# To a rank


class Start(NamedTuple):
    """Load a shard; the answer is `Ready`.

    Attributes:
        rendezvous: path at which the ranks find each other.
    """

    config: EngineConfig
    rank: int
    rendezvous: str
    inherited: Inherited


class Attach(NamedTuple):
    """Make the cache; the answer is `Done`."""

    plan: MemoryPlan


class Move(NamedTuple):
    """The moves of a step's plan; the answer, where anything is saved or restored, is `Moved`."""

    plan: StepPlan


class Launch(NamedTuple):
    """A step, whose moves were told before; rank 0 answers with a `StepResult`."""

    plan: StepPlan


class Compress(NamedTuple):
    """Orders to launch together; each is told of once in a `Compressed`."""

    orders: list[CompressionOrder]


class Poison(NamedTuple):
    """Overwrite blocks, as `KVCache.poison` does; of None, the queries of `slot`. `slides`: of
    sliding layers."""

    blocks: int | slice | None
    slot: int | slice
    slides: bool = False


class TellMisranked(NamedTuple):
    """The answer, once all compressions are through, is `Misranked`."""


class ReadPositions(NamedTuple):
    """The answer is `Positions`; as `CompressionRunner.positions`."""

    table: list[int]
    num_entries: int


class ComputeLogits(NamedTuple):
    """Rank 0 answers with a tensor [T, vocab]; hidden states [T, width]."""

    hidden: Tensor


# From a rank, beside `zipage.processes.Log` and, as the last of one that failed, `zipage.processes.Failure`


class Ready(NamedTuple):
    memory: DeviceMemory
    dtype: torch.dtype


class Done(NamedTuple):
    pass


class Moved(NamedTuple):
    """Numbers of requests whose entries were lost, and why."""

    lost: dict[int, str]


class Part(NamedTuple):
    """A compression, as one rank saw it; fields as in `CompressionResult`, `number` of the order."""

    number: int
    kept_pages: list[int] | None
    kept_positions: np.ndarray | None
    error: str | None


class Compressed(NamedTuple):
    parts: list[Part]


class Positions(NamedTuple):
    """int32 [L, H, num_entries], of the rank's KV heads."""

    positions: np.ndarray


class Misranked(NamedTuple):
    """Numbers of the orders in which the policy ranked an entry of this rank NaN."""

    numbers: list[int]
