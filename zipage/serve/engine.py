"""An `LLM` on a thread of its own, and how the event loop talks to it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar

from zipage.engine.input_processor import Tokens
from zipage.eviction.fault import first_line
from zipage.llm import LLM
from zipage.outputs import RequestOutput, StreamEvent
from zipage.serve.errors import ApiError
from zipage.serve.generation import ACCEPTED, Generation, Item
from zipage.stats import EngineStats, HeldEntries, Snapshot

logger = logging.getLogger(__name__)

LONG = 2**18
"""Bytes of a body from which on to read or tokenize it takes a good part of a second."""

Command = Callable[[LLM], None]
Answer = TypeVar("Answer")


class View(NamedTuple):
    """The engine as the event loop sees it, after a step.

    Attributes:
        stats: of the engine.
        num_taken: samples that it has taken from its inbox since the start.
    """

    stats: EngineStats
    num_taken: int


class Look(NamedTuple):
    """What runs.

    Attributes:
        time: host clock (`time.perf_counter`).
        prompts: of the requests, by the engine's request id; more than `snapshot` has.
    """

    time: float
    stats: EngineStats
    snapshot: Snapshot
    prompts: dict[str, Tokens]


class Engine:
    """The thread that makes an `LLM`, steps it, and hands what comes to the event loop: neither waits for the other.

    All methods but those with an underscore are called in the event loop's thread.

    Args:
        make: builds the engine; called on its thread, as is everything that the engine does.

    Attributes:
        view: as of the last step.
        failure: why it serves nothing more; None while it does.
        observers: called in the event loop with each item that a generation gets.
        has_failed: called in the event loop when the engine has failed.
    """

    def __init__(self, make: Callable[[], LLM]) -> None:
        self._make = make
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._requests: dict[str, tuple[Generation, int]] = {}
        """Of the engine's thread: generation, and unfinished samples, by the engine's request id."""
        self._num_taken = 0
        self._num_admitted = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._tokenizing_long = ThreadPoolExecutor(1, "tokenizer of long texts")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._start_error: BaseException | None = None
        self.view = View(EngineStats(), 0)
        self.failure: str | None = None
        self.observers: list[Callable[[Generation, Item], None]] = []
        self.has_failed: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Load the model and wait until it is loaded.

        Raises:
            BaseException: what kept the engine from starting.
        """
        self._thread.start()
        self._ready.wait()
        if self._start_error is not None:
            raise self._start_error

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver to this event loop."""
        self._loop = loop

    def stop(self) -> None:
        """Abort what runs, shut the engine down, and wait for its end."""
        self._inbox.put(None)
        self._thread.join()
        self._tokenizing.shutdown()
        self._tokenizing_long.shutdown()

    # Requests

    @property
    def num_waiting(self) -> int:
        """Samples that wait, those in the inbox for which there is no room in a step included."""
        stats = self.view.stats
        return stats.num_waiting + max(0, self._num_pending - self._num_free)

    @property
    def _num_pending(self) -> int:
        return self._num_admitted - self.view.num_taken

    @property
    def _num_free(self) -> int:
        stats, config = self.view.stats, self.llm.config
        return 0 if stats.num_waiting else config.max_num_seqs * config.data_parallel_size - stats.num_running

    def admit(self, num_samples: int, max_queue: int) -> None:
        """Give samples a place; `submit` or `leave` must follow.

        Raises:
            ApiError: more than `max_queue` would wait, or the engine has failed.
        """
        self.check_alive()
        is_idle = not (self._num_pending or self.view.stats.num_running or self.view.stats.num_waiting)
        would_wait = self.view.stats.num_waiting + max(0, self._num_pending + num_samples - self._num_free)
        if would_wait > max_queue and not is_idle:
            raise ApiError(
                429,
                f"{self.num_waiting} samples wait already, {would_wait} would with those of this request, and at most "
                f"{max_queue} may (--max-queue): try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self._num_admitted += num_samples

    def leave(self, num_samples: int) -> None:
        """Admitted samples will not be submitted."""
        self._num_admitted -= num_samples

    def check_alive(self) -> None:
        if self.failure is not None:
            raise ApiError(503, f"the engine has failed: {self.failure}", code="engine_failed")

    async def read(self, read: Callable[[], Answer], num_bytes: int) -> Answer:
        """Run what reads a body of so many bytes: here, or on the thread of long texts."""
        if num_bytes <= LONG:
            return read()
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing_long, read)

    async def tokenize(self, read: Callable[[], Answer], num_bytes: int) -> Answer:
        """Run what tokenizes a body of so many bytes on a thread beside: long ones take long, and no short one waits
        for them.
        """
        threads = self._tokenizing if num_bytes <= LONG else self._tokenizing_long
        return await asyncio.get_running_loop().run_in_executor(threads, read)

    def submit(self, generation: Generation) -> None:
        """Queue a generation, whose samples were admitted; what becomes of it comes to it."""
        generation.cancel = lambda: self._inbox.put(lambda llm: self._abort(llm, generation))
        self._inbox.put(lambda llm: self._add(llm, generation))

    async def ask(self, question: Callable[[LLM], Answer]) -> Answer:
        """What the engine answers between two steps, or while it idles.

        Raises:
            ApiError: the engine has failed.
            Exception: what `question` raises.
        """
        self.check_alive()
        answer = asyncio.get_running_loop().create_future()

        def command(llm: LLM) -> None:
            try:
                self._call(_settle, answer, question(llm), None)
            except Exception as error:
                self._call(_settle, answer, None, error)

        self._inbox.put(command)
        try:
            return await answer
        except RuntimeError:
            self.check_alive()
            raise

    async def look(self) -> Look:
        """What runs, as of one moment."""
        return await self.ask(lambda llm: Look(time.perf_counter(), llm.stats, llm.snapshot(), self._prompts()))

    async def held_entries(self, name: str, index: int) -> tuple[str | None, HeldEntries | None]:
        """The status of a sample, by the engine's request id, None where it is none; and what its heads hold."""
        return await self.ask(lambda llm: _held_entries(llm, name, index))

    def abort_all(self) -> None:
        self._inbox.put(self._abort_all)

    # On the thread

    def _prompts(self) -> dict[str, Tokens]:
        """Of the unfinished requests, by the engine's request id."""
        generations = {id(generation): generation for generation, _ in self._requests.values()}
        return {
            name: tokens
            for generation in generations.values()
            for name, tokens in zip(generation.names, generation.prompts, strict=True)
        }

    def _run(self) -> None:
        try:
            self.llm = self._make()
        except BaseException as error:
            self._start_error = error
            return
        finally:
            self._ready.set()
        try:
            self._serve(self.llm)
        except BaseException as error:
            logger.exception("the engine has failed")
            self._fail(first_line(error))
        finally:
            with suppress(Exception):
                self.llm.shutdown()

    def _serve(self, llm: LLM) -> None:
        """Until there is None in the inbox."""
        while True:
            for command in self._commands(wait=not llm.has_unfinished_requests()):
                if command is None:
                    self._abort_all(llm)
                    self._deliver(llm.take_events(), llm.step())
                    return
                command(llm)
            outputs = llm.step() if llm.has_unfinished_requests() else []
            self.view = View(llm.stats, self._num_taken)
            self._deliver(llm.take_events(), outputs)

    def _commands(self, wait: bool) -> Iterator[Command | None]:
        """Those that are there; `wait` for the first."""
        with suppress(Empty):
            while True:
                yield self._inbox.get(block=wait)
                wait = False

    def _add(self, llm: LLM, generation: Generation) -> None:
        """All prompts of a generation, or none."""
        self._num_taken += generation.num_samples
        if self.failure is not None:
            self._tell([(generation, RuntimeError(self.failure))])
        if self.failure is not None or generation.is_gone:
            return
        added: list[str] = []
        try:
            for name, tokens in zip(generation.names, generation.prompts, strict=True):
                prompt = {"prompt_token_ids": tokens.token_ids}
                added.append(llm.add_request(prompt, generation.params, name, stream=generation.stream))
        except ValueError as error:
            for name in added:
                llm.abort(name)
            self._tell([(generation, error)])
            return
        except BaseException as error:
            self._tell([(generation, RuntimeError(first_line(error)))])
            raise
        self._requests |= dict.fromkeys(added, (generation, generation.params.n))
        self._tell([(generation, ACCEPTED)])

    def _abort(self, llm: LLM, generation: Generation) -> None:
        for name in generation.names if self.failure is None else ():
            llm.abort(name)

    def _abort_all(self, llm: LLM) -> None:
        for name in list(self._requests):
            llm.abort(name)

    def _deliver(self, events: list[StreamEvent], outputs: list[RequestOutput]) -> None:
        items: list[tuple[Generation, Item]] = []
        for event in events:
            if (found := self._requests.get(event.request_id)) is None:  # of a generation that was refused
                continue
            generation, num_left = found
            items.append((generation, event))
            if event.finish_reason is not None:
                self._requests[event.request_id] = generation, num_left - 1
                if num_left == 1:
                    del self._requests[event.request_id]
        for output in outputs:
            if found := self._requests.pop(output.request_id, None):
                items.append((found[0], output))
        if items:
            self._tell(items)

    def _fail(self, reason: str) -> None:
        """Tell all, and whoever still comes, until there is None in the inbox."""
        self.failure = reason
        generations = {id(generation): generation for generation, _ in self._requests.values()}
        self._requests.clear()
        self._tell([(generation, RuntimeError(reason)) for generation in generations.values()])
        self._call(self.has_failed)
        while (command := self._inbox.get()) is not None:
            command(self.llm)

    def _tell(self, items: list[tuple[Generation, Item]]) -> None:
        self._call(self._receive, items)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(function, *arguments)

    # In the event loop

    def _receive(self, items: list[tuple[Generation, Item]]) -> None:
        for generation, item in items:
            for observe in self.observers:
                observe(generation, item)
            generation.put(item)


def _held_entries(llm: LLM, name: str, index: int) -> tuple[str | None, HeldEntries | None]:
    states = (s for s in llm.snapshot().requests if (s.request_id, s.sample_index) == (name, index))
    state = next(states, None)
    return (None, None) if state is None else (state.status, llm.held_entries(name, index))


def _settle(answer: asyncio.Future, result: object, error: Exception | None) -> None:
    if answer.done():  # whoever asked is gone
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)
