"""Zipage: LLM inference with Compressed PagedAttention."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import kernels
from zipage import threads  # noqa: F401  (first: it must come before torch)
from zipage.checks import closest
from zipage.config import EngineConfig
from zipage.eviction.budget import is_enlarged
from zipage.eviction.registry import find as find_policy
from zipage.outputs import CompletionOutput, Logprob, RequestOutput, StreamEvent
from zipage.sampling_params import SamplingParams
from zipage.stats import EngineStats, EventStats, HeldEntries, RequestMetrics, RequestState, Snapshot, StepStats

if TYPE_CHECKING:
    from kernels.bench import measure_ceilings, measure_kernels
    from zipage.engine.chat_template import template_reads
    from zipage.llm import LLM
    from zipage.models.loading.share import share_model
    from zipage.simulation.llm import SimulatedLLM, StepTokens
    from zipage.simulation.times import CompressionTime, CompressionWork, StepWork
    from zipage.worker.calibrate import calibrate, load_to_calibrate
    from zipage.worker.request_memory import RequestMemory
    from zipage.worker.train_scorer import train_scorer

_KERNELS = str(Path(__file__).parents[1] / "kernels")
if _KERNELS not in kernels.__path__:  # Hugging Face's package of that name came first: see `kernels/__init__.py`
    kernels.__path__.append(_KERNELS)

__all__ = [
    "LLM",
    "CompletionOutput",
    "CompressionTime",
    "CompressionWork",
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
    "SimulatedLLM",
    "Snapshot",
    "StepStats",
    "StepTokens",
    "StepWork",
    "StreamEvent",
    "calibrate",
    "closest",
    "find_policy",
    "is_enlarged",
    "load_to_calibrate",
    "measure_ceilings",
    "measure_kernels",
    "share_model",
    "template_reads",
    "train_scorer",
]


_LAZY = {
    "LLM": "zipage.llm",
    "RequestMemory": "zipage.worker.request_memory",
    "SimulatedLLM": "zipage.simulation.llm",
    "CompressionTime": "zipage.simulation.times",
    "CompressionWork": "zipage.simulation.times",
    "StepTokens": "zipage.simulation.llm",
    "StepWork": "zipage.simulation.times",
    "calibrate": "zipage.worker.calibrate",
    "load_to_calibrate": "zipage.worker.calibrate",
    "measure_ceilings": "kernels.bench",
    "measure_kernels": "kernels.bench",
    "share_model": "zipage.models.loading.share",
    "template_reads": "zipage.engine.chat_template",
    "train_scorer": "zipage.worker.train_scorer",
}
"""Where the names are that need torch: the scheduler and the harness's configuration import this package where it is
slow to load or absent."""


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
