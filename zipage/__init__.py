"""Zipage: LLM inference with Compressed PagedAttention."""

from pathlib import Path
from typing import TYPE_CHECKING

import kernels
from zipage import threads  # noqa: F401  (first: it must come before torch)
from zipage.checks import closest
from zipage.config import EngineConfig
from zipage.eviction.registry import find as find_policy
from zipage.outputs import CompletionOutput, Logprob, RequestOutput, StreamEvent
from zipage.sampling_params import SamplingParams
from zipage.stats import EngineStats, EventStats, HeldEntries, RequestMetrics, RequestState, Snapshot, StepStats

if TYPE_CHECKING:
    from kernels.bench import measure_ceilings, measure_kernels
    from zipage.llm import LLM
    from zipage.models.loading.share import share_model
    from zipage.worker.calibrate import calibrate
    from zipage.worker.request_memory import RequestMemory
    from zipage.worker.train_scorer import train_scorer

_KERNELS = str(Path(__file__).parents[1] / "kernels")
if _KERNELS not in kernels.__path__:  # Hugging Face's package of that name came first: see `kernels/__init__.py`
    kernels.__path__.append(_KERNELS)

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "EngineStats",
    "EventStats",
    "HeldEntries",
    "Logprob",
    "RequestMemory",
    "RequestMetrics",
    "RequestOutput",
    "RequestState",
    "SamplingParams",
    "Snapshot",
    "StepStats",
    "StreamEvent",
    "calibrate",
    "closest",
    "find_policy",
    "measure_ceilings",
    "measure_kernels",
    "share_model",
    "train_scorer",
]


def __getattr__(name: str):
    # The scheduler and the harness's configuration import this package where torch is slow to load or absent.
    if name == "LLM":
        from zipage.llm import LLM

        return LLM
    if name in ("measure_ceilings", "measure_kernels"):
        from kernels import bench

        return getattr(bench, name)
    if name == "share_model":
        from zipage.models.loading.share import share_model

        return share_model
    if name == "calibrate":
        from zipage.worker.calibrate import calibrate

        return calibrate
    if name == "train_scorer":
        from zipage.worker.train_scorer import train_scorer

        return train_scorer
    if name == "RequestMemory":
        from zipage.worker.request_memory import RequestMemory

        return RequestMemory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
