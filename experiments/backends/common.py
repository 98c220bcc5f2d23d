"""What the adapters of other engines share."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from zipage import CompletionOutput, EngineConfig, EngineStats, RequestMetrics, SamplingParams, StepStats


@dataclass(frozen=True)
class OwnMemory:
    """The memory plan of an engine that plans for itself.

    Attributes:
        planned_by: the engine.
        its_own: options that it has too and chooses itself, separated by commas.
    """

    planned_by: str
    its_own: str = ""

    def __str__(self) -> str:
        return f"left to {self.planned_by}" + f", which chooses its own {self.its_own}" * bool(self.its_own)


def require_full_kv(name: str, config: EngineConfig) -> None:
    """Raise ValueError for options that only Zipage can honour."""
    if config.policy != "full":
        raise ValueError(f"policy={config.policy}: backend={name} keeps full KV; take policy=full, or backend=zipage")


def chosen(config: EngineConfig) -> dict[str, Any]:
    """The options that differ from Zipage's defaults."""
    return {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != _default(f)}


def _default(option: Field) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def refuse_others(name: str, config: EngineConfig, honoured: Collection[str]) -> None:
    """Raise ValueError for an option that was chosen and means nothing to the engine."""
    for option, value in chosen(config).items():
        if option not in honoured:
            raise ValueError(f"{option}={value!r}: backend={name} has no such option; leave it out")


def require_plain(name: str, params: SamplingParams) -> None:
    """Raise ValueError for options of a request that only Zipage can honour."""
    if params.policy not in (None, "full") or params.budget_tokens is not None:
        raise ValueError(f"sampling.policy, sampling.budget_tokens: backend={name} keeps full KV; leave them out")
    if params.follow_ups:
        raise ValueError(f"workload.turns: backend={name} can't go on with the next turn; take backend=zipage")


def together(answers: Sequence[CompletionOutput]) -> RequestMetrics:
    """One record for all samples of a prompt: its first token, its last end, the mean pace."""
    samples = [answer.metrics for answer in answers]
    firsts, paces, ends = (
        [v for s in samples if (v := getattr(s, name)) is not None] for name in ("ttft", "tpot", "e2e")
    )
    return RequestMetrics(
        arrival=samples[0].arrival,
        ttft=min(firsts, default=None),
        tpot=sum(paces) / len(paces) if paces else None,
        e2e=max(ends, default=None),
        queued=samples[0].queued,
        prompt_tokens=samples[0].prompt_tokens,
        output_tokens=sum(sample.output_tokens for sample in samples),
    )


def step_stats(stats: EngineStats, *, decode: int, prefill: int, prefill_tokens: int, waiting: int, seconds: float):
    """A `StepStats` of an engine that tells its batch alone; what it does not tell is 0. Counts the step in `stats`."""
    stats.steps += 1
    stats.device_time += seconds
    stats.num_running, stats.num_waiting = decode + prefill, waiting
    known = {
        "step": stats.steps - 1,
        "time": time.perf_counter(),
        "num_decode": decode,
        "num_prefill": prefill,
        "prefill_tokens": prefill_tokens,
        "num_running": decode + prefill,
        "num_waiting": waiting,
        "host_time": 0.0,
        "device_time": seconds,
        "step_time": seconds,
    }
    return StepStats(**{name: known.get(name, 0) for name in StepStats.__slots__})
