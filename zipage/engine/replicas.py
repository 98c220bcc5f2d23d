"""Several engine cores, each in a process of its own, that look like one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import wait
from typing import Any

from torch import Tensor

from zipage.config import EngineConfig
from zipage.engine.core_spec import CoreSpec
from zipage.engine.interface import Core, TokenDelta
from zipage.engine.prompt_order import PromptOrder
from zipage.engine.replica_messages import Abort, Logits, Look, ReadEntries, Reply, Report, Start, Stop
from zipage.engine.request_metrics import cut_short
from zipage.engine.telemetry import Listeners
from zipage.eviction.fault import first_line
from zipage.processes import Child, Failure, Log, close_all, unpacked
from zipage.scheduling.request import Request
from zipage.spread import Inherited, check_spread, count_gpus
from zipage.stats import EngineStats, HeldEntries, RequestMetrics, Snapshot

TARGET = "zipage.engine.replica_process:run"
PATIENCE = 0.005
"""Seconds that `step` waits for messages at most: its caller may have requests for those that are idle."""


def start_replicas(config: EngineConfig) -> tuple[Replicas, CoreSpec]:
    """Start `config.data_parallel_size` replicas beside each other, and wait until all have loaded the model.

    One alone is an engine in a process of its own.

    Returns:
        The replicas, and what every one of them can serve: the memory plan is that of the smallest.

    Raises:
        ValueError: there are too few GPUs, or the other processes could not find the policy.
        Exception: what kept a replica from starting; the others have ended.
    """
    environments = _environments(config)
    size = config.data_parallel_size
    check_spread("replicas", "data_parallel_size", size, config.policy)
    start = Start(replace(config, data_parallel_size=1), Inherited.by(size))
    children: list[Child] = []
    try:
        for number, environment in enumerate(environments):
            children.append(Child(f"replica {number}" if size > 1 else "the engine's process", TARGET, environment))
        for child in children:
            child.channel.send(start)
        specs = _wait_until_ready(children)
    except BaseException:
        close_all(children, grace=0)
        raise
    smallest = min(specs, key=lambda spec: spec.memory_plan.num_blocks)
    num_blocks = [spec.memory_plan.num_blocks for spec in specs]
    return Replicas(children, Listeners(strict=config.debug), num_blocks), smallest


def _environments(config: EngineConfig) -> list[dict[str, str]]:
    """By which each replica sees the GPUs that are its own, and no others."""
    size, each = config.data_parallel_size, config.tensor_parallel_size
    if size == 1:
        return [{}]
    asked = f"data_parallel_size={size}: with tensor_parallel_size={each}"
    count = count_gpus(config.device, size * each, "data_parallel_size", asked)
    if not count:
        return [{} for _ in range(size)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if visible is None else visible.replace(" ", "").split(",")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[m * each : (m + 1) * each])} for m in range(size)]


def _wait_until_ready(children: list[Child]) -> list[CoreSpec]:
    """What each of them serves."""
    specs: dict[str, CoreSpec] = {}
    while len(specs) < len(children):
        loading = {child.channel: child for child in children if child.name not in specs}
        for channel in wait(list(loading)):
            child = loading[channel]
            message = _receive(child)
            if isinstance(message, Failure):
                raise unpacked(message)
            if isinstance(message, Log):
                message.repeat(child.name)
            else:
                specs[child.name] = message
    return [specs[child.name] for child in children]


def _receive(child: Child) -> Any:
    """Its next message. Raises RuntimeError where none comes any more."""
    try:
        return child.channel.receive()
    except (EOFError, OSError):
        raise RuntimeError(child.death()) from None


@dataclass(slots=True)
class _Replica:
    """One of them, as far as it is known here.

    Attributes:
        load: tokens that its unfinished requests may still take.
        stats: as it reported last.
    """

    number: int
    child: Child
    load: int = 0
    stats: EngineStats = field(default_factory=EngineStats)


@dataclass(slots=True)
class _Prompt:
    """An unfinished prompt.

    Attributes:
        replica: that has all its samples, which share the cache of the prompt.
        to_come: of each unfinished sample, by index, the tokens that may still come.
        given: of each of these, the tokens that were handed out.
        prompt_len: its own length, until its first token comes.
    """

    replica: _Replica
    to_come: dict[int, int]
    given: dict[int, int]
    prompt_len: int


class Replicas(Core):
    """Cores that step by themselves. What they did comes in messages, which are read in `step` and where an answer is
    waited for.

    A sample may be some tokens further than was read here. When it is stopped, those are dropped.

    Args:
        children: processes that run `zipage.engine.replica_process` and have loaded the model.
        num_blocks: in the pool of each.
    """

    def __init__(self, children: Sequence[Child], listeners: Listeners, num_blocks: Sequence[int]) -> None:
        super().__init__(EngineStats(), listeners)
        self._replicas = [
            _Replica(number, child, stats=EngineStats(blocks_total=blocks))
            for number, (child, blocks) in enumerate(zip(children, num_blocks, strict=True))
        ]
        self._of_channel = {replica.child.channel: replica for replica in self._replicas}
        self._prompts: dict[str, _Prompt] = {}
        self._deltas: deque[TokenDelta] = deque()
        """Read, and not handed out yet."""
        self._answers: deque[Reply] = deque()
        self._dropped_tokens = 0

    # Requests

    def add(self, samples: Sequence[Request]) -> None:
        first = samples[0]
        replica = min(self._replicas, key=lambda replica: replica.load)  # of equal ones the first
        to_come = {sample.index: sample.max_total_tokens - sample.num_prompt_tokens for sample in samples}
        prompt = _Prompt(replica, to_come, dict.fromkeys(to_come, 0), first.num_prompt_tokens)
        self._prompts[first.request_id] = prompt
        replica.load += prompt.prompt_len + sum(to_come.values())
        with suppress(OSError):  # it has ended, of which `step` tells
            replica.child.channel.send(PromptOrder.of(samples))

    def step(self) -> Iterator[TokenDelta]:
        if not self._deltas:
            self._read(waiting=bool(self._prompts))
        return self._handed_out()

    def abort(self, request_id: str) -> Iterator[TokenDelta]:
        prompt = self._prompts.get(request_id)
        if prompt is not None:
            self._ask(prompt.replica, Abort(request_id))
        return self._handed_out()

    def stop(self, request_id: str, index: int) -> RequestMetrics:
        prompt = self._prompts[request_id]
        given = prompt.given[index]
        metrics = self._ask(prompt.replica, Stop(request_id, index)).value
        mine = [delta for delta in self._deltas if (delta.request_id, delta.index) == (request_id, index)]
        if metrics is None:  # it had ended
            metrics = mine[-1].metrics
        self._dropped_tokens += metrics.output_tokens - given
        self._forget(request_id, index)
        return cut_short(metrics, given)

    def _handed_out(self) -> Iterator[TokenDelta]:
        """What was read, but for samples that have ended here meanwhile."""
        while self._deltas:
            delta = self._deltas.popleft()
            prompt = self._prompts.get(delta.request_id)
            if prompt is None or delta.index not in prompt.to_come:
                continue
            num_tokens = len(delta.token_ids)
            prompt.replica.load -= prompt.prompt_len + num_tokens
            prompt.prompt_len = 0
            prompt.to_come[delta.index] -= num_tokens
            prompt.given[delta.index] += num_tokens
            if delta.finish_reason is not None:
                self._forget(delta.request_id, delta.index)
            yield delta

    def _forget(self, request_id: str, index: int) -> None:
        """A sample has ended."""
        prompt = self._prompts[request_id]
        prompt.replica.load -= prompt.to_come.pop(index)
        if not prompt.to_come:
            prompt.replica.load -= prompt.prompt_len
            del self._prompts[request_id]

    # Messages

    def _read(self, waiting: bool) -> None:
        """Take a message of each replica that has one; `waiting` a little for one."""
        for channel in wait(list(self._of_channel), PATIENCE if waiting else 0):
            self._take(self._of_channel[channel])

    def _ask(self, replica: _Replica, question: Abort | Stop | ReadEntries | Logits) -> Reply:
        """The answer, for which a step of the replica may have to end."""
        self._send(replica, question)
        return self._answer_of(replica)

    @staticmethod
    def _send(replica: _Replica, question: Abort | Stop | Look | ReadEntries | Logits) -> None:
        with suppress(OSError):  # it has ended, as will show
            replica.child.channel.send(question)

    def _answer_of(self, replica: _Replica) -> Reply:
        """To the one question that it was sent."""
        while not self._answers:
            self._take(replica)
        return self._answers.popleft()

    def _take(self, replica: _Replica) -> None:
        """Read a message, waiting for one.

        Raises:
            RuntimeError: the replica has failed or ended.
        """
        message = _receive(replica.child)
        if isinstance(message, Report):
            self._deltas += message.deltas
            for record in (*message.steps, *message.events):
                record.replica = replica.number
                self.listeners.keep(record)
            replica.stats = message.stats
        elif isinstance(message, Reply):
            self._answers.append(message)
        elif isinstance(message, Log):
            message.repeat(replica.child.name)
        else:
            error = unpacked(message)
            raise RuntimeError(f"{replica.child.name} failed: {first_line(error)}") from error

    # What is known of them

    def stats(self) -> EngineStats:
        parts = [self.counters, *(replica.stats for replica in self._replicas)]
        total = EngineStats(**{f.name: sum(getattr(part, f.name) for part in parts) for f in fields(EngineStats)})
        return replace(total, output_tokens=total.output_tokens - self._dropped_tokens)

    @property
    def output_tokens(self) -> int:
        return sum(replica.stats.output_tokens for replica in self._replicas) - self._dropped_tokens

    def logits(self, hidden: Tensor) -> Tensor:
        with self.whole():
            reply = self._ask(self._replicas[0], Logits(hidden.cpu()))
        if reply.error is not None:
            raise reply.error
        return reply.value

    def snapshot(self) -> Snapshot:
        for replica in self._replicas:  # all answer after the same time
            self._send(replica, Look())
        parts = [self._answer_of(replica).value for replica in self._replicas]
        return Snapshot([state for part in parts for state in part.requests], sum(part.blocks_cached for part in parts))

    def held_entries(self, request_id: str, index: int) -> HeldEntries | None:
        prompt = self._prompts.get(request_id)
        return None if prompt is None else self._ask(prompt.replica, ReadEntries(request_id, index)).value

    # Their end

    def _close(self) -> None:
        close_all([replica.child for replica in self._replicas])

    def _give_up(self) -> None:
        self._prompts.clear()
        self._deltas.clear()
        close_all([replica.child for replica in self._replicas], grace=0)
