"""`backend=vllm` and `backend=vllm_matched`: vLLM, where it is installed, as the production baseline.

`vllm` is vLLM as one would serve with it: CUDA graphs, prefix caching, asynchronous scheduling, its own block size. Of
ours it has the limits of a batch, the pool's memory (`kv_cache_memory_bytes` or `gpu_memory_utilization`), and those of
`SHARED` that were set to other values than our defaults. `vllm_matched` has all of `SHARED` as Zipage has them in the
same run, and its number of blocks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.backends.common import (
    OwnMemory,
    chosen,
    refuse_others,
    require_full_kv,
    require_plain,
    step_stats,
    together,
)
from zipage import (
    CompletionOutput,
    EngineConfig,
    EngineStats,
    EventStats,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    StepStats,
)

PASSED_ON = (
    *("n", "temperature", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens", "ignore_eos"),
    *("skip_special_tokens", "presence_penalty", "frequency_penalty", "min_tokens", "include_stop_str_in_output"),
)
"""Options of a request whose names and meanings are vLLM's."""

LIMITS = (
    *("model", "load_format", "skip_tokenizer_init", "dtype", "seed", "tensor_parallel_size", "max_model_len"),
    *("kv_cache_memory_bytes", "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens"),
)
"""Options of `EngineConfig` that vLLM always gets: what it runs, and within which bounds."""

SHARED = ("block_size", "enable_prefix_caching", "enable_chunked_prefill", "async_scheduling", "enforce_eager")
"""Options of `EngineConfig` that say how it runs, by the names that vLLM has for them."""

ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_HOST_IP": "127.0.0.1"}
"""Set where they are not: nothing is sent anywhere, and the sampler is vLLM's own whatever else is installed."""


@dataclass(slots=True)
class _Sample:
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    first: float | None = None
    last: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class _Running:
    prompt: list[int]
    params: SamplingParams
    arrival: float
    samples: list[_Sample]


class VllmBackend:
    """vLLM's engine, one of its steps for each of ours.

    Args:
        matched: as the module says.
        options: of `EngineConfig`.

    Raises:
        ValueError: vLLM is not installed, or an option can't be honoured.
    """

    def __init__(self, matched: bool = False, **options: Any) -> None:
        name, config = backend_name(matched), EngineConfig.from_kwargs(**options)
        keywords = checked_options(config, matched)
        offline = {"HF_HUB_OFFLINE": "1"} if Path(config.model).exists() else {}
        for variable, value in (ENVIRONMENT | offline).items():
            os.environ.setdefault(variable, value)
        try:
            import vllm
        except ImportError as error:
            raise ValueError(f"backend={name}: vLLM is not installed here (pip install vllm): {error}") from error
        self._name, self._vllm = name, vllm
        self._llm = vllm.LLM(**keywords)
        self._engine = self._llm.llm_engine
        self._running: dict[str, _Running] = {}
        self.step_listeners: list[Callable[[StepStats], None]] = []
        self.event_listeners: list[Callable[[EventStats], None]] = []
        left = ", ".join(option for option in SHARED if option not in keywords)
        self.memory_plan = OwnMemory(f"vLLM {vllm.__version__}", left)
        self.stats = EngineStats()

    def get_tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    def add_request(self, prompt: list[int], params: SamplingParams, request_id: str) -> str:
        """Queue a prompt of token ids. Raises ValueError for one that can't be served."""
        require_plain(self._name, params)
        if params.logprobs is not None:
            raise ValueError(f"sampling.logprobs={params.logprobs}: backend={self._name} has none")
        from vllm.sampling_params import RequestOutputKind

        theirs = self._vllm.SamplingParams(
            **{name: getattr(params, name) for name in PASSED_ON},
            top_k=params.top_k,
            stop=list(params.stop) or None,
            stop_token_ids=list(params.stop_token_ids) or None,
            bad_words=list(params.bad_words) or None,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, theirs)
        samples = [_Sample() for _ in range(params.n)]
        self._running[request_id] = _Running(list(prompt), params, time.perf_counter(), samples)
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self._running)

    def step(self) -> list[RequestOutput]:
        begin = time.perf_counter()
        updates = self._engine.step()
        now = time.perf_counter()
        prefill = decode = prefill_tokens = 0
        finished = []
        for update in updates:
            running = self._running[update.request_id]
            for output in update.outputs:
                sample = running.samples[output.index]
                if sample.first is None and output.token_ids:
                    prefill, prefill_tokens = prefill + 1, prefill_tokens + len(running.prompt)
                    sample.first = now
                elif output.token_ids:
                    decode += 1
                sample.token_ids += output.token_ids
                sample.text += output.text
                sample.last = now
                sample.finish_reason, sample.stop_reason = output.finish_reason, output.stop_reason
            if update.finished:
                finished.append(self._finish(update.request_id, now))
        started = sum(any(sample.first for sample in running.samples) for running in self._running.values())
        step = step_stats(
            self.stats,
            decode=decode,
            prefill=prefill,
            prefill_tokens=prefill_tokens,
            waiting=len(self._running) - started,
            seconds=now - begin,
        )
        for listener in self.step_listeners:
            listener(step)
        return finished

    def _finish(self, request_id: str, now: float) -> RequestOutput:
        running = self._running.pop(request_id)
        answers = []
        for index, sample in enumerate(running.samples):
            count = len(sample.token_ids)
            metrics = RequestMetrics(
                arrival=running.arrival,
                ttft=None if sample.first is None else sample.first - running.arrival,
                tpot=(sample.last - sample.first) / (count - 1) if count > 1 else None,
                e2e=(sample.last or now) - running.arrival,
                prompt_tokens=len(running.prompt),
                output_tokens=count,
            )
            reason = sample.finish_reason if sample.finish_reason in ("stop", "length", "abort") else "error"
            answers.append(
                CompletionOutput(index, sample.text, sample.token_ids, reason, sample.stop_reason, metrics=metrics)
            )
        self.stats.requests_finished += 1
        self.stats.prompt_tokens += len(running.prompt)
        self.stats.output_tokens += sum(answer.metrics.output_tokens for answer in answers)
        return RequestOutput(request_id, None, running.prompt, answers, together(answers))


def backend_name(matched: bool) -> str:
    return "vllm_matched" if matched else "vllm"


def checked_options(config: EngineConfig, matched: bool) -> dict[str, Any]:
    """Keywords of `vllm.LLM` for options that vLLM can honour, which its server has as flags.

    Raises:
        ValueError: one of them it can't.
    """
    name = backend_name(matched)
    require_full_kv(name, config)
    if config.device == "cpu":
        raise ValueError(f"hardware.device=cpu: backend={name} needs a GPU")
    if config.device not in ("auto", "cuda", "cuda:0"):
        number = config.device.removeprefix("cuda:")
        raise ValueError(
            f"hardware.device={config.device}: backend={name} takes the first GPU that it sees: "
            f"set CUDA_VISIBLE_DEVICES={number} and hardware.device=cuda"
        )
    refuse_others(name, config, (*LIMITS, *SHARED, "device", "num_blocks"))
    return vllm_options(config, matched)


def vllm_options(config: EngineConfig, matched: bool) -> dict[str, Any]:
    """Keywords of `vllm.LLM`.

    Raises:
        ValueError: the pool is given in blocks of ours, which vLLM's own are not.
    """
    if not matched and config.num_blocks is not None:
        raise ValueError(
            f"num_blocks={config.num_blocks}: backend=vllm has blocks of its own size; give "
            "kv_cache_memory_bytes, or take backend=vllm_matched"
        )
    options = {option: getattr(config, option) for option in LIMITS}
    if not matched:
        return options | {option: value for option, value in chosen(config).items() if option in SHARED}
    options |= {option: getattr(config, option) for option in SHARED}
    options["async_scheduling"] = config.async_scheduling is not False  # left out, ours is on where vLLM runs
    return options | {"num_gpu_blocks_override": config.num_blocks}
