"""A model spread over ranks, behind the interface of a `Worker`: what it does, processes of their own do."""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from zipage.config import EngineConfig
from zipage.models.loading.loader import read_shape
from zipage.models.shard import PeerFailed, Shard
from zipage.models.spec import ModelSpec
from zipage.parallel import messages as m
from zipage.parallel.rank_group import RankGroup
from zipage.scheduling.plan import CompressionOrder, StepPlan
from zipage.spread import Inherited, check_spread, count_gpus
from zipage.worker.compression_batch import check_orders
from zipage.worker.compression_runner import CompressionResult
from zipage.worker.memory_plan import MemoryPlan
from zipage.worker.model_runner import StepResult, check_width
from zipage.worker.worker import DeviceMemory

BATCHES_UNDER_WAY = 2
"""Of compressions; orders that come meanwhile are joined into the next."""


def start_ranks(config: EngineConfig) -> RankedWorker:
    """Start `config.tensor_parallel_size` ranks, and wait until each has loaded its shard.

    Raises:
        ValueError, FileNotFoundError: as `LLM`; there are too few GPUs; the model cannot be spread; the other processes
            could not find the policy.
        RuntimeError: a rank died.
    """
    size = config.tensor_parallel_size
    check_spread("ranks", "tensor_parallel_size", size, config.policy)
    gpus = count_gpus(config.device, size, "tensor_parallel_size", f"tensor_parallel_size={size}:")
    device = "cuda" if gpus else "cpu"
    spec, _ = read_shape(config.model, load_format=config.load_format, dtype=config.dtype, device=device)
    Shard(size=size).check(spec)
    folder = tempfile.TemporaryDirectory(prefix="zipage-")
    # Where a debug run checks that ranks keep the same entries, they tell which.
    told = replace(config, device=device, trace_positions=config.trace_positions or config.debug)
    shared = os.path.join(folder.name, "rendezvous"), Inherited.by(size)
    group = RankGroup([m.Start(told, rank, *shared) for rank in range(size)], folder)
    try:
        ready = group.take_all(m.Ready)
        group.is_ready = True
    except BaseException:
        group.close(grace=0)
        raise
    return RankedWorker(config, group, spec, device, ready)


class RankedWorker:
    """Attributes are those of `Worker`.

    Attributes:
        model: spec of the whole model; `spec` is that of a rank.
        max_model_len: longest prompt plus output, in tokens.
        memory: of the rank that has the least.
    """

    def __init__(
        self, config: EngineConfig, group: RankGroup, model: ModelSpec, device: str, ready: Sequence[m.Ready]
    ) -> None:
        self._group = group
        self.model = model
        self.max_model_len = config.model_len(model.max_position)
        self.policy = config.make_policy()
        self.spec = Shard(size=config.tensor_parallel_size).spec(model)
        self.device = torch.device(device)
        self.dtype = ready[0].dtype
        free = [rank.memory.free for rank in ready]
        self.memory = DeviceMemory(
            max(rank.memory.weights for rank in ready),
            max(rank.memory.activations for rank in ready),
            None if None in free else min(free),
        )
        self.runner = RankedRunner(group, model.width)
        self.compressor = RankedCompressor(group, config, model.num_kv_heads)
        self.cache = RankedCache(group, config.block_size)

    def attach(self, plan: MemoryPlan) -> None:
        self._group.tell(m.Attach(plan))
        self._group.take_all(m.Done)

    def close(self) -> None:
        """End the ranks."""
        self._group.close()


class RankedRunner:
    """`ModelRunner` of all ranks."""

    device = torch.device("cpu")
    """Nothing is computed in this process."""

    def __init__(self, group: RankGroup, width: int) -> None:
        self._group = group
        self._width = width

    def move(self, plan: StepPlan) -> dict[int, str]:
        if not (plan.drops or plan.saves or plan.restores or plan.copies):
            return {}
        self._group.tell(m.Move(plan))
        lost: dict[int, str] = {}
        if plan.saves or plan.restores:
            for answer in self._group.take_all(m.Moved):
                lost |= answer.lost
        return lost

    def launch(self, plan: StepPlan) -> RankedLaunch:
        self._group.tell(m.Launch(plan))
        return RankedLaunch(self._group)

    def logits(self, hidden: Tensor) -> Tensor:
        check_width(hidden, self._width)
        self._group.tell(m.ComputeLogits(hidden.cpu()))
        return self._group.take(0, Tensor)


class RankedLaunch:
    """A step under way. Steps are waited for in the order of their launches."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group

    def wait(self) -> StepResult:
        return self._group.take(0, StepResult)


class RankedCache:
    """`KVCache` of all ranks, as far as debug checks use it."""

    recurrent = None
    """Models with recurrent layers are not spread."""

    def __init__(self, group: RankGroup, block_size: int, slides: bool = False) -> None:
        self._group = group
        self.block_size = block_size
        self._slides = slides
        self.sliding = None if slides else RankedCache(group, block_size, slides=True)

    def poison(self, blocks: int | slice, first_slot: int = 0) -> None:
        self._group.tell(m.Poison(blocks, first_slot, self._slides))

    def poison_queries(self, slot: int | slice) -> None:
        self._group.tell(m.Poison(None, slot))


@dataclass(eq=False)
class _UnderWay:
    """An order that was sent to the ranks in batch `batch`, or waits for that (None)."""

    order: CompressionOrder
    start: float
    batch: int | None = None
    parts: dict[int, m.Part] = field(default_factory=dict)


class RankedCompressor:
    """`CompressionRunner` of all ranks, which launch the same batches in the same order.

    Batches are made here, since a rank that joined orders by its own clock would differ from the others.
    """

    def __init__(self, group: RankGroup, config: EngineConfig, num_kv_heads: int) -> None:
        self.ranks = RankedRankWatch(group)
        self._group = group
        self._size = config.tensor_parallel_size
        self._block_size = config.block_size
        self._shows_positions = config.trace_positions
        self._num_kv_heads = num_kv_heads
        self._waiting: deque[CompressionOrder] = deque()
        self._under_way: dict[int, _UnderWay] = {}
        self._num_batches = 0

    def submit(self, orders: Sequence[CompressionOrder]) -> None:
        check_orders(orders, self._block_size)
        for order in orders:
            self._under_way[order.number] = _UnderWay(order, time.perf_counter())
        self._waiting.extend(orders)
        self._send()

    def _send(self) -> None:
        batches = {under_way.batch for under_way in self._under_way.values()} - {None}
        if self._waiting and len(batches) < BATCHES_UNDER_WAY:
            orders = list(self._waiting)
            self._waiting.clear()
            for order in orders:
                self._under_way[order.number].batch = self._num_batches
            self._num_batches += 1
            self.ranks.is_known = False
            self._group.tell(m.Compress(orders))

    def poll(self, wait: bool = False) -> list[CompressionResult]:
        results = self._finished()
        while wait and self._under_way:
            self._group.wait()
            results += self._finished()
        return results

    def _finished(self) -> list[CompressionResult]:
        if not self._under_way:
            return []
        results = []
        for rank, message in self._group.arrived(m.Compressed):
            for part in message.parts:
                parts = self._under_way[part.number].parts
                parts[rank] = part
                if len(parts) == self._size:
                    results.append(self._joined(self._under_way.pop(part.number)))
        self._send()
        return results

    def _joined(self, done: _UnderWay) -> CompressionResult:
        """What all ranks made of an order. Raises RuntimeError where they did not keep the same."""
        order, parts = done.order, [done.parts[rank] for rank in range(self._size)]
        seconds = time.perf_counter() - done.start
        errors = [part.error for part in parts if part.error is not None]
        if errors:
            own = [error for error in errors if PeerFailed.__name__ not in error]
            return CompressionResult(order, None, None, seconds, (own or errors)[0])
        if any(part.kept_pages != parts[0].kept_pages for part in parts):
            raise RuntimeError(f"{order}: ranks kept different blocks: {[part.kept_pages for part in parts]}")
        positions = None
        if parts[0].kept_positions is not None:
            positions = self._positions(order, [part.kept_positions for part in parts])
        return CompressionResult(order, parts[0].kept_pages, positions if self._shows_positions else None, seconds)

    def _positions(self, order: CompressionOrder, of_ranks: list[np.ndarray]) -> np.ndarray:
        """int32 [L, H, k] of the model's heads, once it is seen that the ranks agree where they must."""
        copies = self._copies(of_ranks)
        policy = order.rule.policy
        same = (copies == copies[:, :, :1]).all()
        if policy.shared_heads:
            same &= (copies == copies[:, :1, :1]).all()
        if not same:
            raise RuntimeError(f"{order}: ranks kept different entries of the same heads under {policy.name!r}")
        return np.ascontiguousarray(copies[:, :, 0])

    def _copies(self, of_ranks: list[np.ndarray]) -> np.ndarray:
        """[L, H, copies, k], where several ranks have the same of the model's KV heads."""
        every = np.concatenate(of_ranks, axis=1)
        return every.reshape(len(every), self._num_kv_heads, -1, every.shape[2])

    def positions(self, table: list[int], num_entries: int) -> np.ndarray:
        self._group.tell(m.ReadPositions(table, num_entries))
        return self._copies([told.positions for told in self._group.take_all(m.Positions)])[:, :, 0]

    @property
    def in_flight(self) -> int:
        return len(self._under_way)

    def close(self) -> None:
        """End the ranks: a core that closes its compressor computes nothing more."""
        self._waiting.clear()
        self._under_way.clear()
        self._group.close()


class RankedRankWatch:
    """`RankWatch` of all ranks, as of the last time that they were asked."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self.num_failed = 0
        self.is_known = True

    def poll(self, wait: bool = False) -> None:
        if wait and not self.is_known:
            self._group.tell(m.TellMisranked())
            self.num_failed = len({number for told in self._group.take_all(m.Misranked) for number in told.numbers})
            self.is_known = True
