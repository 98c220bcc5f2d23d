"""A rank's side: a worker on its own device that does as it is told."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from zipage.models.loading.loader import load_model
from zipage.models.shard import Shard
from zipage.parallel import messages as m
from zipage.parallel.communicator import Communicator, HostCommunicator, join
from zipage.processes import Channel, packed
from zipage.worker import model_runner
from zipage.worker.worker import Worker

PAUSE = 3e-4
"""Seconds between two looks at compressions under way while no message comes."""


def run(channel: Channel) -> None:
    """Serve until the channel is closed, or the rank fails."""
    outbox = Outbox(channel)
    try:
        start: m.Start = channel.receive()
        inherited = start.inherited
        if start.rank:  # what is no fault is the same on all, and rank 0 tells it
            inherited = inherited._replace(log_level=max(inherited.log_level, logging.WARNING))
        inherited.take_over(outbox.send)
        with suppress(EOFError):
            _serve(channel, outbox, start)
        # The other side does this too, unless it was killed.
        shutil.rmtree(os.path.dirname(start.rendezvous), ignore_errors=True)
    except BaseException as error:
        outbox.send(packed(error))
    outbox.close()


class Outbox:
    """Sends in a thread of its own what is not part of a step.

    Otherwise a rank that sends much and is not read would not read either, and the other side, when it sends much
    before it reads, would wait for the rank as the rank for it.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        """Does not wait. The message must not change any more."""
        self._messages.put(message)

    def close(self) -> None:
        """Wait until all is sent, or the other side is gone."""
        self._messages.put(None)
        self._thread.join()

    def _run(self) -> None:
        with suppress(OSError):  # the other side is gone
            while (message := self._messages.get()) is not None:
                self._channel.send(message)


def _serve(channel: Channel, outbox: Outbox, start: m.Start) -> None:
    config, rank = start.config, start.rank
    size = config.tensor_parallel_size
    device = torch.device("cpu") if config.device == "cpu" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host
    join(rank, size, start.rendezvous, device)
    communicator, beside = Communicator(dist.group.WORLD, device), HostCommunicator(dist.new_group(backend="gloo"))
    loaded = load_model(
        config.model,
        load_format=config.load_format,
        dtype=config.dtype,
        device=str(device),
        seed=config.seed,
        shard=Shard(rank, size, communicator),
    )
    communicator.reserve(config.max_num_batched_tokens, loaded.spec.width, loaded.decoder.dtype)
    worker = Worker(config, loaded, config.model_len(loaded.spec.max_position), Shard(rank, size, beside))
    outbox.send(m.Ready(worker.memory, worker.dtype))
    attach: m.Attach = channel.receive()
    worker.attach(attach.plan)
    outbox.send(m.Done())
    Rank(channel, outbox, worker, rank).serve()


class Rank:
    """Hands messages to a worker, and tells what came of them."""

    def __init__(self, channel: Channel, outbox: Outbox, worker: Worker, rank: int) -> None:
        self._channel = channel
        self._outbox = outbox
        self._worker = worker
        self._rank = rank
        self._launched: SimpleQueue[model_runner.Launch] = SimpleQueue()
        if rank == 0:
            threading.Thread(target=self._send_results, name="results", daemon=True).start()

    def serve(self) -> None:
        """Until the channel is closed, which raises EOFError."""
        while True:
            while self._worker.compressor.in_flight and not self._channel.poll(PAUSE):
                self._send_compressed()
            self._handle(self._channel.receive())
            self._send_compressed()

    def _handle(self, message: Any) -> None:
        worker, runner = self._worker, self._worker.runner
        match message:
            case m.Launch(plan):
                launch = runner.launch(plan)
                if self._rank == 0:
                    self._launched.put(launch)
            case m.Move(plan):
                lost = runner.move(plan)
                if plan.saves or plan.restores:
                    self._outbox.send(m.Moved(lost))
            case m.Compress(orders):
                worker.compressor.submit(orders)
            case m.Poison(None, slot, _):
                worker.cache.poison_queries(slot)
            case m.Poison(blocks, slot, slides):
                (worker.cache.sliding if slides else worker.cache).poison(blocks, slot)
            case m.TellMisranked():
                worker.compressor.ranks.poll(wait=True)
                self._outbox.send(m.Misranked([*worker.compressor.ranks.failed]))
            case m.ReadPositions(table, num_entries):
                self._outbox.send(m.Positions(worker.compressor.positions(table, num_entries)))
            case m.ComputeLogits(hidden):
                logits = runner.logits(hidden)
                if self._rank == 0:
                    self._outbox.send(logits.cpu())
            case _:
                raise RuntimeError(f"rank {self._rank} got {message!r}")

    def _send_compressed(self) -> None:
        if not self._worker.compressor.in_flight:
            return
        results = self._worker.compressor.poll()
        if results:
            parts = [m.Part(r.order.number, r.kept_pages, r.kept_positions, r.error) for r in results]
            self._outbox.send(m.Compressed(parts))

    def _send_results(self) -> None:
        """In a thread: wait for each step, in order, so that the next may be launched meanwhile."""
        try:
            with torch.inference_mode():
                while True:
                    self._channel.send(self._launched.get().wait())
        except BaseException as error:
            with suppress(OSError):
                self._channel.send(packed(error))
