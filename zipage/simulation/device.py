"""A device that computes nothing: its steps and compressions take modelled time on a virtual clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zipage.scheduling.plan import CompressionOrder, StepPlan
from zipage.simulation.times import CompressionTime, CompressionWork, DeviceTimes, StepWork
from zipage.worker.compression_runner import CompressionResult
from zipage.worker.model_runner import StepResult


class VirtualClock:
    """Seconds that pass only when somebody waits. It never goes back."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds

    def wait_until(self, time: float) -> None:
        self._now = max(self._now, time)


class Timeline:
    """When the device is through with what is queued on it.

    Attributes:
        clock: of the host.
        free: when the step queued last has ended.
        shared: seconds of compressions that run beside the steps to come, and make them longer.
        interrupted: seconds that another thread kept the host's interpreter from the next step.
    """

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.free = self.shared = self.interrupted = 0.0

    def queue(self, seconds: float, launch: float = 0.0) -> float:
        """Queue a step behind the others, and return when it begins.

        Args:
            launch: seconds that the host takes from now to launch its kernels one by one; it ends no sooner.
        """
        now = self.clock()
        begin = max(now, self.free)
        self.free = max(begin + seconds, now + launch) + self.shared
        self.shared = 0.0
        return begin


@dataclass(slots=True)
class SimulatedLaunch:
    """A step under way; `wait` is `Launch`'s."""

    clock: VirtualClock
    tokens: list[int]
    begin: float
    end: float

    def wait(self) -> StepResult:
        self.clock.wait_until(self.end)
        return StepResult(self.tokens, None, None, self.end - self.begin)


@dataclass(slots=True)
class PlannedWork:
    """What the runner gets in place of a `StepPlan`: the work of a step, and the tokens that it shall give."""

    work: StepWork
    tokens: list[int]


class SimulatedRunner:
    """Stands for `ModelRunner`."""

    device = torch.device("cpu")

    def __init__(self, timeline: Timeline, times: DeviceTimes) -> None:
        self._timeline = timeline
        self._times = times

    def move(self, plan: PlannedWork | StepPlan) -> dict[int, str]:
        """Nothing is lost; the time of moves is the step's."""
        return {}

    def launch(self, plan: PlannedWork) -> SimulatedLaunch:
        clock = self._timeline.clock
        clock.sleep(self._times.host(plan.work) + self._timeline.interrupted)
        self._timeline.interrupted = 0.0
        if plan.work.num_captures:  # none begins before the device is idle
            clock.wait_until(self._timeline.free)
        launch = self._times.launch(plan.work)
        begin = self._timeline.queue(self._times.step(plan.work), launch)
        clock.sleep(launch)
        return SimulatedLaunch(clock, plan.tokens, begin, self._timeline.free)

    def logits(self, hidden: Tensor) -> Tensor:
        raise ValueError("a simulated engine has no weights to compute logits with")


@dataclass(slots=True)
class _Batch:
    """Compressions that were launched together, and when they end."""

    orders: list[tuple[CompressionOrder, float]]
    end: float


class SimulatedRanks:
    """Stands for `RankWatch`: no policy ranks anything."""

    num_failed = 0

    def poll(self, wait: bool = False) -> None:
        pass


class SimulatedCompressor:
    """Stands for `CompressionRunner`, whose rules it follows.

    Synchronous, a compression is queued between two steps. Asynchronous, a worker launches it beside the steps to come,
    once the step is over that filled the request's last block; orders that come while two batches are under way are
    launched together.

    Of a policy that drops whole blocks the last ones stay: which ones is known to scores alone.
    """

    def __init__(self, timeline: Timeline, times: DeviceTimes, asynchronous: bool) -> None:
        self.ranks = SimulatedRanks()
        self._timeline = timeline
        self._times = times
        self._asynchronous = asynchronous
        self._waiting: list[tuple[CompressionOrder, float]] = []
        self._ready = self._worker_free = self._stream_free = 0.0
        self._batches: deque[_Batch] = deque()

    def submit(self, orders: Sequence[CompressionOrder]) -> None:
        now = self._timeline.clock()
        taken = [(order, now) for order in orders]
        if not self._asynchronous:
            for group in _groups(taken):
                time = self._time(group)
                self._timeline.clock.sleep(time.launch)
                self._timeline.queue(time.device)
                self._batches.append(_Batch(group, 0.0))
            return
        self._advance(now)
        self._waiting += taken
        self._ready = self._timeline.free
        self._advance(now)

    def poll(self, wait: bool = False) -> list[CompressionResult]:
        clock, done = self._timeline.clock, []
        self._advance(clock())
        while self._batches and (wait or self._batches[0].end <= clock()):
            batch = self._batches.popleft()
            clock.wait_until(batch.end)
            done += [
                CompressionResult(order, _kept_pages(order), None, max(batch.end, clock()) - start)
                for order, start in batch.orders
            ]
            self._advance(clock())
        return done

    def close(self) -> None:
        self._waiting.clear()
        self._batches.clear()

    def _advance(self, now: float) -> None:
        """Launch what the worker has taken by `now`: not before all but one of its batches are over."""
        while self._waiting:
            begin = max(self._worker_free, self._batches[-2].end if len(self._batches) > 1 else 0.0)
            if begin > now:
                return
            taken, self._waiting = self._waiting, []
            for group in _groups(taken):
                time = self._time(group)
                self._worker_free = max(begin, group[-1][1]) + time.launch
                self._stream_free = max(self._worker_free, self._ready, self._stream_free) + time.beside
                self._timeline.shared += time.device
                self._timeline.interrupted += time.interrupts
                self._batches.append(_Batch(group, self._stream_free))

    def _time(self, group: Sequence[tuple[CompressionOrder, float]]) -> CompressionTime:
        orders = [order for order, _ in group]
        return self._times.compression(
            CompressionWork(
                orders[0].rule.policy,
                len(orders),
                sum(order.num_entries for order in orders),
                sum(min(order.rule.keep, order.num_entries) for order in orders),
            )
        )


def _groups(taken: Sequence[tuple[CompressionOrder, float]]) -> list[list[tuple[CompressionOrder, float]]]:
    """Orders of one policy together."""
    groups: dict[object, list[tuple[CompressionOrder, float]]] = {}
    for order, start in taken:
        groups.setdefault(order.rule.policy, []).append((order, start))
    return list(groups.values())


def _kept_pages(order: CompressionOrder) -> list[int] | None:
    if not order.rule.drops_blocks:
        return None
    pinned, kept = order.rule.pinned_blocks, order.rule.kept_blocks
    count = len(order.block_ids)
    return [*range(pinned), *range(count - (kept - pinned), count)]
