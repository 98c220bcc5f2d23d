"""Backends: the engines that can answer a run, behind one protocol.

The protocol is the part of `zipage.LLM` that the harness uses, so `LLM` needs no adapter. Another engine joins by an
adapter of this shape and a line in `BACKENDS`; a test hands `experiments.run.main` a table of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from experiments.errors import UsageError
from zipage import EngineStats, EventStats, RequestOutput, SamplingParams, StepStats


class Backend(Protocol):
    """What the harness asks of an engine.

    Attributes:
        step_listeners: each is called with the `StepStats` of every step.
        event_listeners: each is called with the `EventStats` of every compression, pause, resumption and preemption.
        stats: counters since the start.
        memory_plan: a dataclass that says what is reserved.
    """

    step_listeners: list[Callable[[StepStats], None]]
    event_listeners: list[Callable[[EventStats], None]]
    memory_plan: Any

    @property
    def stats(self) -> EngineStats: ...

    def get_tokenizer(self) -> Any: ...

    def add_request(self, prompt: Sequence[int], params: SamplingParams, request_id: str) -> str:
        """Queue a prompt of token ids. Raises ValueError for one that can't be served."""

    def step(self) -> list[RequestOutput]:
        """Run one step and return the requests that it finished."""

    def has_unfinished_requests(self) -> bool: ...


BackendFactory = Callable[..., Backend]
"""Called with the options of `EngineConfig` as keywords. Raises ValueError or FileNotFoundError for a wrong one."""


def _zipage(**options: Any) -> Backend:
    from zipage import LLM

    return LLM(**options)


def _transformers(**options: Any) -> Backend:
    from experiments.backends.transformers import TransformersBackend

    return TransformersBackend(**options)


def _vllm(**options: Any) -> Backend:
    from experiments.backends.vllm import VllmBackend

    return VllmBackend(**options)


def _vllm_matched(**options: Any) -> Backend:
    from experiments.backends.vllm import VllmBackend

    return VllmBackend(matched=True, **options)


BACKENDS: dict[str, BackendFactory] = {
    "zipage": _zipage,
    "transformers": _transformers,
    "vllm": _vllm,
    "vllm_matched": _vllm_matched,
}


def get_backend(name: str, backends: Mapping[str, BackendFactory]) -> BackendFactory:
    """Raises UsageError for an unknown name."""
    if name not in backends:
        raise UsageError(f"backend={name}: must be one of {', '.join(backends)}")
    return backends[name]
