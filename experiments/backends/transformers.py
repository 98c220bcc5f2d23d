"""`backend=transformers`: `generate` on a fixed batch, which lasts until its last answer ends. The naive baseline."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.backends.common import (
    OwnMemory,
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

UNSUPPORTED = (
    *("logprobs", "stop", "include_stop_str_in_output", "bad_words", "logit_bias", "min_tokens"),
    *("presence_penalty", "frequency_penalty"),
)
PLAIN = SamplingParams()
HONOURED = ("model", "load_format", "dtype", "device", "seed", "max_model_len", "max_num_seqs")


@dataclass(slots=True)
class _Request:
    id: str
    prompt: list[int]
    params: SamplingParams
    arrival: float = field(default_factory=time.perf_counter)

    @property
    def alike(self) -> SamplingParams:
        """What requests of one batch have in common."""
        return replace(self.params, seed=None)


class TransformersBackend:
    """Up to `engine.max_num_seqs` requests of equal options make a batch, padded on the left, and each `step()` answers
    one batch to its end. `n` samples are rows of their own.

    Of the options of `EngineConfig` it reads `model`, `dtype`, `device`, `max_model_len` and `max_num_seqs`; the others
    speak of a paged cache, which it does not have, and are refused where they are set. Seeds: with a temperature, a
    batch is seeded by all its requests' seeds, so a run repeats itself, but an answer depends on its batch. An answer's
    end is the batch's (`e2e`), since nothing is handed out before; `ttft` and `tpot` say when its own tokens were
    computed.

    Raises:
        ValueError: an option can't be honoured; the model is a GGUF file or has random weights.
    """

    def __init__(self, **options: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._config = config = EngineConfig.from_kwargs(**options)
        require_full_kv("transformers", config)
        if config.load_format != "auto" or Path(config.model).suffix == ".gguf":
            raise ValueError(f"model={config.model}: backend=transformers reads folders with weights alone")
        refuse_others("transformers", config, HONOURED)
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = config.dtype
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype, trust_remote_code=False)
        self._model = model.to(device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
        longest = self._model.config.max_position_embeddings
        self._longest = longest if config.max_model_len is None else min(longest, config.max_model_len)
        ends = self._model.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._waiting: deque[_Request] = deque()
        self.step_listeners: list[Callable[[StepStats], None]] = []
        self.event_listeners: list[Callable[[EventStats], None]] = []
        self.memory_plan = OwnMemory("transformers")
        self.stats = EngineStats()

    def get_tokenizer(self) -> Any:
        return self._tokenizer

    def add_request(self, prompt: list[int], params: SamplingParams, request_id: str) -> str:
        """Queue a prompt of token ids. Raises ValueError for one that can't be served."""
        require_plain("transformers", params)
        for name in UNSUPPORTED:
            if getattr(params, name) != getattr(PLAIN, name):
                raise ValueError(f"sampling.{name}={getattr(params, name)}: backend=transformers has none")
        if len(prompt) >= self._longest:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the model reads {self._longest} with its answer")
        self._waiting.append(_Request(request_id, list(prompt), params))
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self._waiting)

    def step(self) -> list[RequestOutput]:
        """Answer one batch."""
        batch = self._next_batch()
        if not batch:
            return []
        rows = [request for request in batch for _ in range(request.params.n)]
        begin = time.perf_counter()
        tokens, times = self._generate(rows)
        end = time.perf_counter()
        outputs, taken = [], 0
        for request in batch:
            count = request.params.n
            answers = [self._answer(request, i, tokens[taken + i], begin, times, end) for i in range(count)]
            taken += count
            outputs.append(RequestOutput(request.id, None, request.prompt, answers, together(answers)))
            self.stats.requests_finished += 1
            self.stats.prompt_tokens += len(request.prompt)
            self.stats.output_tokens += sum(len(answer.token_ids) for answer in answers)
        self.stats.num_running = 0
        return outputs

    def _next_batch(self) -> list[_Request]:
        """The first requests that wait, as far as their options are equal and their samples fit."""
        batch: list[_Request] = []
        rows = 0
        while self._waiting and (not batch or self._waiting[0].alike == batch[0].alike):
            rows += self._waiting[0].params.n
            if batch and rows > self._config.max_num_seqs:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _generate(self, rows: list[_Request]) -> tuple[list[list[int]], list[float]]:
        """The new tokens of each row, untrimmed, and the host clock after each token of the batch."""
        import torch
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

        params, width = rows[0].params, max(len(row.prompt) for row in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[i, width - len(row.prompt) :] = 1
        times: list[float] = []
        last = time.perf_counter()

        def tell(now: float, first: bool) -> None:
            sizes = {"decode": 0, "prefill": len(rows)} if first else {"decode": len(rows), "prefill": 0}
            prefill_tokens = sum(len(row.prompt) for row in rows) if first else 0
            waiting = sum(request.params.n for request in self._waiting)
            step = step_stats(self.stats, **sizes, prefill_tokens=prefill_tokens, waiting=waiting, seconds=now - last)
            for listener in self.step_listeners:
                listener(step)

        class Clock(StoppingCriteria):
            def __call__(self, input_ids, scores, **options):
                nonlocal last
                if input_ids.is_cuda:
                    torch.cuda.synchronize()
                now = time.perf_counter()
                tell(now, first=not times)
                times.append(now)
                last = now
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        stops = self._stops(params)
        sampled = params.temperature > 0
        chosen = {"temperature": params.temperature, "top_p": params.top_p, "min_p": params.min_p or None}
        generation = GenerationConfig(
            max_new_tokens=min(params.max_tokens, self._longest - width),
            eos_token_id=sorted(stops) or None,
            pad_token_id=0,
            do_sample=sampled,
            repetition_penalty=params.repetition_penalty,
            **(chosen | {"top_k": params.top_k} if sampled else {}),
        )
        seeds = hashlib.sha256(repr([(row.id, row.params.seed) for row in rows]).encode()).digest()
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(int.from_bytes(seeds[:6]))
            made = self._model.generate(
                ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                generation_config=generation,
                stopping_criteria=StoppingCriteriaList([Clock()]),
            )
        return made[:, width:].tolist(), times

    def _stops(self, params: SamplingParams) -> set[int]:
        return set(params.stop_token_ids) | (set() if params.ignore_eos else self._ends)

    def _answer(
        self, request: _Request, index: int, tokens: list[int], begin: float, times: list[float], end: float
    ) -> CompletionOutput:
        stops = self._stops(request.params)
        stop = next((i for i, token in enumerate(tokens) if token in stops), None)
        kept = tokens if stop is None else tokens[: stop + 1]
        text = self._tokenizer.decode(
            kept if stop is None else kept[:-1], skip_special_tokens=request.params.skip_special_tokens
        )
        metrics = RequestMetrics(
            arrival=request.arrival,
            ttft=times[0] - request.arrival,
            tpot=(times[len(kept) - 1] - times[0]) / (len(kept) - 1) if len(kept) > 1 else None,
            e2e=end - request.arrival,
            queued=begin - request.arrival,
            prompt_tokens=len(request.prompt),
            output_tokens=len(kept),
        )
        return CompletionOutput(index, text, kept, "length" if stop is None else "stop", metrics=metrics)
