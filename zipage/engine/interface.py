"""What `LLM` drives: samples in, deltas out, in this process or in others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from torch import Tensor

from zipage.engine.interrupts import deferred_interrupts
from zipage.engine.telemetry import Listeners
from zipage.eviction.fault import first_line
from zipage.outputs import FinishReason, Logprob
from zipage.scheduling.request import Request
from zipage.stats import EngineStats, HeldEntries, RequestMetrics, Snapshot


class TokenDelta(NamedTuple):
    """What one step did for one sample.

    A request that is followed token by token gets one for each token, any other a single one at its end.

    Attributes:
        request_id, index: whose.
        token_ids: new since the last delta of this sample.
        logprobs: of those tokens; None where none were asked for.
        finish_reason: set on the sample's last delta, as are the fields after it.
        stop_reason: the token that ended the sample, if one did.
        error: one line, where the finish reason is "error".
        metrics: of the whole sample.
        hidden_states: [T, width], of the whole sample, where asked for.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    metrics: RequestMetrics | None = None
    hidden_states: Tensor | None = None


class Core(ABC):
    """An engine without text, and whether it still serves.

    Args:
        counters: of what `LLM` and the output processor count: prompts and requests. `stats` includes them.
        listeners: get the records of steps and events.

    Attributes:
        is_shut_down: it serves nothing more.
        in_step: `whole` is under way.
    """

    def __init__(self, counters: EngineStats, listeners: Listeners) -> None:
        self.counters = counters
        self.listeners = listeners
        self.is_shut_down = False
        self.in_step = False
        self._failure: str | None = None
        """Why no step can follow the last one."""

    @abstractmethod
    def add(self, samples: Sequence[Request]) -> None:
        """Queue the samples of one prompt."""

    @abstractmethod
    def step(self) -> Iterable[TokenDelta]:
        """Get on with what is unfinished. What it returns must be read to its end before anything but `stop` is called:
        a sample that `stop` ends in between has no further delta in it.
        """

    @abstractmethod
    def abort(self, request_id: str) -> Iterable[TokenDelta]:
        """Withdraw a prompt with all its samples. Returns the last deltas of those that were unfinished, perhaps after
        others; read them as those of `step`.
        """

    @abstractmethod
    def stop(self, request_id: str, index: int) -> RequestMetrics:
        """End a sample in whose text a stop string was seen, or which has none, after the last delta of it that was
        read.
        """

    @abstractmethod
    def stats(self) -> EngineStats:
        """All counters, and gauges as they are now."""

    @property
    @abstractmethod
    def output_tokens(self) -> int:
        """As in `stats`."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [N, vocab] of hidden states [N, width]. Raises ValueError where they are not of the model's width."""

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """The unfinished samples as they are now."""

    @abstractmethod
    def held_entries(self, request_id: str, index: int) -> HeldEntries | None:
        """What each head holds of a sample; None where it has no entries on the device that stand still."""

    @abstractmethod
    def _close(self) -> None:
        """Stop the threads and processes that work for it."""

    @abstractmethod
    def _give_up(self) -> None:
        """It has failed: drop what no step can follow."""

    def _on_device(self) -> AbstractContextManager:
        """Around all work on a device."""
        return nullcontext()

    # Wholeness

    deferred_interrupts = staticmethod(deferred_interrupts)

    def check_alive(self) -> None:
        """Raises RuntimeError if the engine was shut down or has failed."""
        if self.is_shut_down:
            raise RuntimeError("this engine was shut down and serves nothing more: make a new LLM")
        if self._failure is not None:
            raise RuntimeError(f"this engine has failed and serves nothing more ({self._failure}): make a new LLM")

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Around what leaves scheduler, caches and device inconsistent if it ends half-way.

        Ctrl-C waits for its end. Any exception in it is the end of the engine: a step that was taken up again in the
        middle would compute wrong tokens.

        Raises:
            RuntimeError: the engine was shut down or has failed.
        """
        self.check_alive()
        with self.deferred_interrupts():
            self.in_step = True
            try:
                with self._on_device():
                    yield
            except BaseException as error:
                self._failure = first_line(error)
                self._give_up()
                raise
            finally:
                self.in_step = False

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def shut_down(self) -> None:
        """Stop what works for it and serve nothing more. What is unfinished should be aborted before."""
        self.is_shut_down = True
        self._close()
