"""The engine: prompts in, text out."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from os import PathLike
from typing import Any

import torch
from tqdm import tqdm

from zipage.checks import checked
from zipage.config import EngineConfig
from zipage.engine.debug import DebugChecks
from zipage.engine.detokenizer import Detokenizer, decode
from zipage.engine.input_processor import Intake, Prompt, as_prompts
from zipage.engine.interrupts import deferred_interrupts
from zipage.engine.telemetry import Telemetry
from zipage.models.loader import obtain_model, resolve_device
from zipage.models.tokenizer import end_of_sequence_ids, load_tokenizer
from zipage.outputs import CompletionOutput, RequestOutput, StreamEvent
from zipage.sampling_params import SamplingParams
from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.plan import StepPlan
from zipage.scheduling.request import Request
from zipage.scheduling.scheduler import Scheduler
from zipage.stats import EngineStats, RequestMetrics, combine_metrics, request_metrics
from zipage.threads import warn_of_spinning
from zipage.worker.compression_runner import CompressionResult, CompressionRunner
from zipage.worker.kv_cache import KVCache, plan_memory
from zipage.worker.model_runner import Launch, ModelRunner, StepResult

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _PromptState:
    """A prompt on its way: its samples, and what turns their tokens into text."""

    prompt: str | None
    samples: list[Request]
    detokenizers: list[Detokenizer] | None = None
    events: deque[StreamEvent] | None = None
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = len(self.samples)


@dataclass(slots=True)
class _UnderWay:
    """A step that was launched at `begin` (host clock) and not booked yet."""

    plan: StepPlan
    launch: Launch
    begin: float


class LLM:
    """A model with a paged KV cache that serves many requests at once.

    Args:
        model: local folder, hub id or GGUF file.
        **options: the fields of `EngineConfig`.

    Raises:
        ValueError: an option is unknown or out of range, the model is of an unknown architecture, its weights are
            incomplete, or the memory holds no KV block.
        FileNotFoundError: the model folder lacks a file; the message names it.

    Attributes:
        config: the options as given.
        memory_plan: what is reserved.
        max_model_len: longest prompt plus output, in tokens.
        step_listeners: each is called with the `StepStats` of every step, when it is over.
        event_listeners: each is called with an `EventStats` for every compression, pause, resumption and preemption,
            when its step is over. A listener that raises is logged and called no more; with `debug` it raises.
    """

    def __init__(self, model: str | PathLike[str], **options: Any) -> None:
        self.config = EngineConfig.from_kwargs(model=model, **options)
        self._device = resolve_device(self.config.device)
        with self._on_device():
            self._start(self.config)

    def _on_device(self) -> AbstractContextManager:
        """Makes the engine's GPU the current one, to which streams, events and graphs belong."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _start(self, config: EngineConfig) -> None:
        loaded = obtain_model(
            config.model, load_format=config.load_format, dtype=config.dtype, device=config.device, seed=config.seed
        )
        spec = loaded.spec
        self._tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config.model)
        self.max_model_len = _resolve_max_model_len(config, spec.max_position)
        weight_bytes = sum(p.numel() * p.itemsize for p in loaded.decoder.parameters())
        dtype, device = loaded.decoder.dtype, loaded.decoder.device
        if device.type == "cpu":
            warn_of_spinning()
        policy = config.make_policy()
        # A prompt as long as can be: with it, protection takes as much as it ever does.
        rule = None if policy is None else config.rule(policy, config.budget_tokens, self.max_model_len)

        self._runner = ModelRunner(
            loaded.decoder,
            spec,
            device,
            max_num_seqs=config.max_num_seqs,
            max_model_len=self.max_model_len,
            enforce_eager=config.enforce_eager,
        )
        activation_bytes, free_bytes = 0, None
        if device.type == "cuda":
            activation_bytes = self._runner.measure_peak(
                config.max_num_batched_tokens,
                config.block_size,
                dtype,
                rule=rule,
                asynchronous=config.async_compression,
                layer_stride=config.layer_stride,
            )
            free, total = torch.cuda.mem_get_info(device)
            free_bytes = int(free - (1 - config.gpu_memory_utilization) * total - activation_bytes)
        self.memory_plan = plan = plan_memory(
            config, spec, dtype, weight_bytes, activation_bytes, free_bytes,
            policy=policy, max_blocks=rule and rule.max_blocks, max_model_len=self.max_model_len,
        )  # fmt: skip
        logger.info("memory plan: %s", plan)
        cache = KVCache(
            spec,
            plan.num_blocks,
            config.block_size,
            dtype,
            device,
            positions=policy is not None,
            scores=policy is not None and policy.state,
            num_query_slots=plan.num_query_slots,
            window=0 if policy is None else policy.num_queries,
        )
        self._runner.attach(cache)
        self._compressor = CompressionRunner(
            cache,
            spec,
            asynchronous=config.async_compression,
            layer_stride=config.layer_stride,
            trace=config.trace_positions,
            debug=config.debug,
        )
        pool = BlockPool(plan.num_blocks, config.block_size, config.enable_prefix_caching)
        self._scheduler = Scheduler(
            pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_chunked_prefill=config.enable_chunked_prefill,
            num_query_slots=plan.num_query_slots,
            trigger=config.trigger,
            scheduling=config.scheduling,
        )
        self._intake = Intake(
            config,
            plan,
            cache,
            max_model_len=self.max_model_len,
            policy=policy,
            tokenizer=self._tokenizer,
            vocab_size=spec.vocab_size,
            eos_token_ids=end_of_sequence_ids(spec, self._tokenizer),
        )
        self._telemetry = Telemetry(self._scheduler, strict=config.debug)
        self.step_listeners = self._telemetry.step_listeners
        self.event_listeners = self._telemetry.event_listeners
        self._debug = DebugChecks(self._scheduler, cache) if config.debug else None
        self._overlaps = device.type == "cuda" if config.async_scheduling is None else config.async_scheduling
        self._under_way: _UnderWay | None = None
        self._failure: str | None = None
        """Why no step can follow the last one."""
        self._is_shut_down = False
        self._in_step = False
        self._left: deque[str] = deque()
        """Streams that were dropped in the middle of a step."""
        self._step_ended = 0.0
        self._prompts: dict[str, _PromptState] = {}
        self._watched: set[str] = set()
        """Of the prompts, those whose text or events are made token by token."""
        self._done: dict[str, RequestOutput] = {}
        self._numbers = count()

    # Requests

    def get_tokenizer(self):
        """The `transformers` tokenizer, or None with `skip_tokenizer_init`."""
        return self._tokenizer

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Queue one prompt; `step()` will return its output.

        Args:
            prompt: text, or token ids.
            params: sampling options.
            request_id: a name that no unfinished request has; None makes one up, "auto-N".

        Returns:
            The request's id.

        Raises:
            ValueError: the prompt or an option can't be served; nothing was queued.
            RuntimeError: the engine was shut down or has failed.
        """
        return self._add(next(self._numbers), prompt, params, request_id)

    def _add(
        self,
        number: int,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None = None,
        stream: bool = False,
    ) -> str:
        self._check_alive()
        params = checked("params", params, SamplingParams | None) or SamplingParams()
        request_id = checked("request_id", request_id, str | None)
        if request_id is None:
            request_id = self._free_id(number)
        elif self._is_in_use(request_id):
            raise ValueError(f"request_id={request_id!r}: already in use")
        samples = self._intake.samples(prompt, params, request_id, number)
        detokenizers = None
        if self._tokenizer is not None and (params.stop or stream):
            detokenizers = [Detokenizer(self._tokenizer, params.stop, params.skip_special_tokens) for _ in samples]
        text = prompt if isinstance(prompt, str) else None
        self._prompts[request_id] = _PromptState(text, samples, detokenizers, deque() if stream else None)
        if detokenizers is not None or stream:
            self._watched.add(request_id)
        for sample in samples:
            self._scheduler.add(sample)
        rule, counters = samples[0].rule, self._telemetry.counters
        counters.prompt_tokens += samples[0].num_prompt_tokens
        counters.prompts_truncated += rule is not None and rule.prompt_truncated
        return request_id

    def _is_in_use(self, request_id: str) -> bool:
        return request_id in self._prompts or request_id in self._done

    def _free_id(self, number: int) -> str:
        """Of the request `number`; apart from what callers call theirs."""
        request_id = f"auto-{number}"
        while self._is_in_use(request_id):
            request_id += "+"
        return request_id

    def abort(self, request_id: str) -> bool:
        """Withdraw a prompt with all its samples; its output, as far as it came, is marked "abort".

        Returns:
            Whether the request was still unfinished.
        """
        state = self._prompts.get(request_id)
        if state is None:
            return False
        live = [request for request in state.samples if request.finish_reason is None]
        with self._whole():
            self._scheduler.finish(live, "abort", time.perf_counter())
            self._telemetry.counters.requests_aborted += 1
            self._settle(live)
            self._drain()
        return True

    def has_unfinished_requests(self) -> bool:
        """Whether `step()` has work to do or outputs to hand over."""
        return bool(self._prompts or self._done)

    def shutdown(self) -> None:
        """Abort what is unfinished and stop the thread that compresses.

        `step` still hands over the outputs that it has not yet, those of aborted requests among them; a stream ends
        with the finish reason "abort". Beyond that the engine serves nothing: whatever asks it to raises RuntimeError.
        """
        try:
            for request_id in list(self._prompts):
                self.abort(request_id)
        finally:
            self._is_shut_down = True
            self._compressor.close()

    # Running

    def step(self) -> list[RequestOutput]:
        """Run one step. Returns the outputs that became complete and were not handed over yet.

        Raises:
            RuntimeError: the engine was shut down or has failed.
        """
        if not (self._is_shut_down and self._done):
            self._step()
        done, self._done = list(self._done.values()), {}
        return done

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer a batch of prompts.

        A prompt that can't be served comes back with `error` set and finish reason "error"; the others go on.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: options for all, or one for each prompt.
            use_tqdm: show a progress bar.

        Returns:
            One output a prompt, in order.

        Raises:
            ValueError: `prompts` or `params` are none, or there are not as many `params` as prompts.
            RuntimeError: the engine was shut down or has failed.
        """
        self._check_alive()
        prompts = as_prompts(prompts)
        if isinstance(params, Sequence) and not isinstance(params, str):
            params = [checked(f"params[{i}]", p, SamplingParams) for i, p in enumerate(params)]
        else:
            params = [checked("params", params, SamplingParams | None) or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling params for {len(prompts)} prompts: give one, or one for each")
        outputs: list[RequestOutput | str] = []
        mine: list[str] = []
        with tqdm(total=len(prompts), desc="requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
            try:
                for prompt, p in zip(prompts, params, strict=True):
                    number = next(self._numbers)
                    try:
                        mine.append(self._add(number, prompt, p))
                        outputs.append(mine[-1])
                    except ValueError as error:
                        outputs.append(self._refuse(number, prompt, str(error)))
                bar.update(len(outputs) - len(mine))
                begin, tokens = time.perf_counter(), self._telemetry.counters.output_tokens
                pending = set(mine)
                while pending:
                    self._step()
                    finished = pending & self._done.keys()
                    pending -= finished
                    rate = (self._telemetry.counters.output_tokens - tokens) / (time.perf_counter() - begin)
                    bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
                    bar.update(len(finished))
            except BaseException:
                for request_id in mine:
                    self.abort(request_id)
                    self._done.pop(request_id, None)
                raise
        return [self._done.pop(output) if isinstance(output, str) else output for output in outputs]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """Answer one prompt token by token, beside whatever else is queued.

        The request is queued at the call. Leaving the loop early, or dropping the iterator, aborts it.

        Raises:
            ValueError: the prompt or an option can't be served (at the call, not at the first event).
            RuntimeError: the engine was shut down or has failed.
        """
        request_id = self._add(next(self._numbers), prompt, params, stream=True)
        events = self._events(self._prompts[request_id], request_id)
        next(events)
        return events

    def _events(self, state: _PromptState, request_id: str) -> Iterator[StreamEvent]:
        """First None: a generator that is dropped before it has begun would not come to its `finally`."""
        events = state.events
        try:
            yield None
            while state.unfinished:
                self._step()
                while events:
                    yield events.popleft()
            yield from events
        finally:
            # The garbage collector, which may be what ends this, may come in the middle of a step.
            self._left.append(request_id)
            if not self._in_step:
                self._abort_left()

    def _abort_left(self) -> None:
        while self._left:
            self.abort(self._left.popleft())

    def _check_alive(self) -> None:
        if self._is_shut_down:
            raise RuntimeError("this engine was shut down and serves nothing more: make a new LLM")
        if self._failure is not None:
            raise RuntimeError(f"this engine has failed and serves nothing more ({self._failure}): make a new LLM")

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around what leaves scheduler, caches and device at odds with each other if it ends half-way.

        Ctrl-C waits for its end. Any exception in it is the end of the engine: a step that was taken up again in the
        middle would compute wrong tokens.
        """
        self._check_alive()
        with deferred_interrupts():
            self._in_step = True
            try:
                with self._on_device():
                    yield
            except BaseException as error:
                self._failure = f"{type(error).__name__}: {error}".partition("\n")[0]
                self._under_way = None
                self._prompts.clear()
                self._watched.clear()
                raise
            finally:
                self._in_step = False
        self._abort_left()
        self._telemetry.deliver()

    def _step(self) -> None:
        with self._whole():
            self._advance()

    def _advance(self) -> None:
        if self._under_way and not self._may_overlap(self._under_way.plan):
            self._end_step()
        if not self._scheduler.has_unfinished:
            return
        begin = time.perf_counter()
        plan = self._plan(begin)
        if not plan.is_empty:
            self._runner.move(plan)
            self._telemetry.record_moves(plan)
            if self._debug:
                self._debug.before(plan)
            launch = self._runner.launch(plan)
            self._scheduler.advance(plan)
            self._compress()
            if self._under_way:
                self._end_step()
            self._under_way = _UnderWay(plan, launch, begin)
        if self._under_way and not self._overlaps:
            self._end_step()
        self._drain()

    def _may_overlap(self, plan: StepPlan) -> bool:
        """Whether the next step may be launched before the host knows this one's tokens."""
        return all(request.params.repetition_penalty == 1.0 for request in plan.sampled)

    def _plan(self, now: float) -> StepPlan:
        """Complete compressions that are done, then plan a step; waits for the step and the compressions under way
        where nothing else can run. Empty only where nothing is left to do.
        """
        scheduler = self._scheduler
        self._complete(self._compressor.poll())
        while True:
            plan = scheduler.schedule(now)
            if not plan.is_empty or not scheduler.has_unfinished:
                return plan
            if self._under_way:
                self._end_step()
                continue
            self._compress()
            ended = self._compressor.poll(wait=True)
            self._complete(ended)
            if not ended:
                raise RuntimeError(f"nothing can run: {scheduler.running} run, {len(scheduler.waiting)} wait")

    def _end_step(self) -> None:
        """Wait for the step under way and book its tokens."""
        step, self._under_way = self._under_way, None
        result = step.launch.wait()
        now = time.perf_counter()
        num_tokens = self._book(step.plan, result, now)
        if self._debug:
            self._debug.after()
        # With the next step launched already, this one's time is what has passed since the one before it ended.
        begin = max(step.begin, self._step_ended)
        self._telemetry.record_step(step.plan, num_tokens, begin, result.device_time)
        self._step_ended = time.perf_counter()

    def _compress(self) -> None:
        """Begin the compressions that are due. Synchronous ones are in place for whatever is launched after them."""
        orders = self._scheduler.order_compressions()
        if orders:
            self._compressor.submit(orders)
            if not self.config.async_compression:
                self._complete(self._compressor.poll(wait=True))

    def _drain(self) -> None:
        """Without a prompt to serve there may be no further step: end what is under way, so that its blocks go back."""
        if not self._prompts:
            if self._under_way:
                self._end_step()
            self._complete(self._compressor.poll(wait=True))
            self._compressor.ranks.poll(wait=True)

    def _complete(self, results: Sequence[CompressionResult]) -> None:
        for result in results:
            if result.error is not None:
                self._settle(self._scheduler.fail_compression(result.order, result.error, time.perf_counter()))
                continue
            num_entries = result.order.request.cache_len
            self._scheduler.complete(result.order, result.kept_pages)
            self._telemetry.record_compression(result, num_entries)

    def _book(self, plan: StepPlan, result: StepResult, now: float) -> int:
        """Returns how many tokens came of the step: those of requests that had ended before it are dropped."""
        tokens = result.token_ids
        sampled = [r for r, token in zip(plan.sampled, tokens, strict=True) if r.finish_reason is None and token >= 0]
        if result.logprobs is not None:
            for request, logprob, token in zip(plan.sampled, result.logprobs, tokens, strict=True):
                if request.logprobs is not None and request.finish_reason is None and token >= 0:
                    request.logprobs.append(logprob)
        finished = self._scheduler.update(plan, tokens, now)
        watched = [request for request in sampled if request.request_id in self._watched] if self._watched else []
        stopped = []
        for request in watched:
            state = self._prompts[request.request_id]
            if state.detokenizers is None or request.finish_reason == "stop":  # by its last token, which is no text
                continue
            stop = state.detokenizers[request.index].add(request.last_token)
            if stop is not None:
                request.stop_reason = stop
                if request.finish_reason is None:
                    stopped.append(request)
                request.finish_reason = "stop"
        if stopped:
            self._scheduler.finish(stopped, "stop", now)
        self._settle(finished + stopped, watched)
        return len(sampled)

    def _settle(self, finished: list[Request], sampled: Sequence[Request] = ()) -> None:
        """Send the events of `sampled`, and complete the prompts whose last samples are in `finished`."""
        for request in sampled:
            if request.finish_reason is None and self._prompts[request.request_id].events is not None:
                self._send(request, request.last_token)
        with_token = {id(request) for request in sampled}
        for request in finished:
            state = self._prompts[request.request_id]
            if state.detokenizers is not None:
                state.detokenizers[request.index].finish()
            if state.events is not None:
                self._send(request, request.last_token if id(request) in with_token else None)
            state.unfinished -= 1
            if state.unfinished == 0:
                del self._prompts[request.request_id]
                self._watched.discard(request.request_id)
                output = self._output(state)
                if state.events is None:
                    self._done[request.request_id] = output
                self._count(state)

    def _send(self, request: Request, token_id: int | None) -> None:
        state = self._prompts[request.request_id]
        finished = request.finish_reason is not None
        text = "" if state.detokenizers is None else state.detokenizers[request.index].take(finished)
        logprob = request.logprobs[-1] if request.logprobs and token_id is not None else None
        reason, error = request.finish_reason, request.error
        state.events.append(StreamEvent(request.request_id, request.index, token_id, text, logprob, reason, error))

    def _count(self, state: _PromptState) -> None:
        counters, reasons = self._telemetry.counters, [sample.finish_reason for sample in state.samples]
        counters.requests_failed += "error" in reasons
        counters.requests_finished += "error" not in reasons and "abort" not in reasons

    # Results

    def _output(self, state: _PromptState) -> RequestOutput:
        outputs = []
        for sample in state.samples:
            token_ids = sample.output_token_ids
            if state.detokenizers is not None:
                text = state.detokenizers[sample.index].text
            elif self._tokenizer is not None:
                spelled = token_ids[:-1] if isinstance(sample.stop_reason, int) else token_ids
                text = decode(self._tokenizer, spelled, sample.params.skip_special_tokens)
            else:
                text = ""
            outputs.append(
                CompletionOutput(
                    sample.index,
                    text,
                    token_ids,
                    sample.finish_reason,
                    sample.stop_reason,
                    sample.logprobs,
                    request_metrics(sample),
                    sample.error,
                )
            )
        first = state.samples[0]
        prompt_ids = first.token_ids[: first.num_prompt_tokens].tolist()
        self._telemetry.counters.cached_tokens += sum(sample.cached_tokens for sample in state.samples)
        metrics = combine_metrics([output.metrics for output in outputs])
        error = next((sample.error for sample in state.samples if sample.error is not None), None)
        return RequestOutput(first.request_id, state.prompt, prompt_ids, outputs, metrics, error)

    def _refuse(self, number: int, prompt: Prompt, error: str) -> RequestOutput:
        self._telemetry.counters.requests_failed += 1
        metrics = RequestMetrics(arrival=time.perf_counter())
        outputs = [CompletionOutput(0, "", [], "error", metrics=metrics)]
        text = prompt if isinstance(prompt, str) else None
        return RequestOutput(self._free_id(number), text, [], outputs, metrics, error)

    @property
    def stats(self) -> EngineStats:
        """Counters since the start, and gauges as they are now."""
        return replace(self._telemetry.stats(), compressions_misranked=self._compressor.ranks.num_failed)


def _resolve_max_model_len(config: EngineConfig, max_position: int) -> int:
    length = config.max_model_len or max_position
    if length > max_position:
        raise ValueError(f"max_model_len={length}: the model's positions end at {max_position}")
    if not config.enable_chunked_prefill and length > config.max_num_batched_tokens:
        raise ValueError(
            f"enable_chunked_prefill=False: max_num_batched_tokens={config.max_num_batched_tokens} must hold "
            f"max_model_len={length}; raise the one or lower the other"
        )
    return length
