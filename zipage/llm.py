"""The engine for users: prompts in, text out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from os import PathLike
from typing import Any

from torch import Tensor
from tqdm import tqdm

from zipage.checks import Text, check_names, checked
from zipage.config import EngineConfig
from zipage.engine.input_processor import Message, Prompt, Tokens, as_conversations, as_prompts, read, text_of
from zipage.engine.output_processor import PendingPrompt
from zipage.engine.startup import Engine, start
from zipage.outputs import RequestOutput, StreamEvent
from zipage.sampling_params import SamplingParams
from zipage.stats import EngineStats, HeldEntries, Snapshot
from zipage.unsupported import CALL_OPTIONS, drop_unsupported


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
        memory_plan: what is reserved; with replicas, of the smallest.
        max_model_len: longest prompt plus output, in tokens.
        step_listeners: each is called with the `StepStats` of every step, when it is over.
        event_listeners: each is called with an `EventStats` for every compression, pause, resumption and preemption,
            when its step is over. A listener that raises is logged and called no more; with `debug` it raises. With
            replicas they hear of a step a tenth of a second after it, at most, in calls of this engine.
    """

    def __init__(self, model: str | PathLike[str], **options: Any) -> None:
        self.config = EngineConfig.from_kwargs(model=model, **options)
        self.config.warn_of_idle()
        self.config.warn_of_rounding()
        engine = self._start()
        self._core = engine.core
        self._inputs = engine.inputs
        self._outputs = engine.outputs
        self.memory_plan = engine.spec.memory_plan
        self.max_model_len = engine.spec.max_model_len
        self.step_listeners = self._core.listeners.steps
        self.event_listeners = self._core.listeners.events
        self._events: deque[StreamEvent] = deque()
        """Of requests that were added with `stream=True`."""
        self._left: deque[str] = deque()
        """Streams that were dropped in the middle of a step."""
        self._numbers = count()

    def _start(self) -> Engine:
        return start(self.config)

    # Requests

    def get_tokenizer(self):
        """The `transformers` tokenizer, or None with `skip_tokenizer_init`."""
        return self._inputs.tokenizer

    def tokenize(self, prompt: Prompt) -> Tokens:
        """Text and token ids of a prompt, as `generate` takes it. Any thread may call this, also beside a step.

        Raises:
            ValueError: it is no prompt, or can't be encoded.
        """
        return read(prompt, self._inputs.tokenize)

    def tokenize_chat(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Tokens:
        """Text and token ids of a conversation, as `chat` takes it. Any thread may call this, also beside a step.

        Raises:
            ValueError: there is no template, it refuses the messages, or the messages hold more than text.
        """
        tokenize = self._inputs.with_template(
            chat_template, add_generation_prompt, continue_final_message, chat_template_kwargs
        )
        return read(messages, tokenize)

    def prepare(self, params: SamplingParams) -> None:
        """Encode bad words, so that `add_request` need not. Any thread may call this, also beside a step.

        Raises:
            ValueError: one can't be encoded, or there is no tokenizer.
        """
        self._inputs.prepare(params)

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        params: SamplingParams | None = None,
        stream: bool = False,
        **unsupported: Any,
    ) -> str:
        """Queue one prompt; `step()` will return its output.

        Args:
            prompt: text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
            sampling_params: sampling options; `params` is another name for it.
            request_id: a name that no unfinished request has; None makes one up, "auto-N".
            stream: its tokens come one by one, from `take_events`, and no output from `step`.

        Returns:
            The request's id.

        Raises:
            ValueError: the prompt or an option can't be served; nothing was queued.
            RuntimeError: the engine was shut down or has failed.
        """
        _refuse("add_request", unsupported)
        params = _one_of_two(sampling_params, params)
        events = self._events if checked("stream", stream, bool) else None
        return self._add(next(self._numbers), prompt, self._inputs.tokenize, params, request_id, events).request_id

    def take_events(self) -> list[StreamEvent]:
        """The events of all requests that were added with `stream=True`, since the last call, in the order in which
        they came. As many steps may lie between two calls as the caller likes."""
        events = list(self._events)
        self._events.clear()
        return events

    def _add(
        self,
        number: int,
        prompt: Any,
        tokenize: Callable[[Any], Tokens],
        params: SamplingParams | None,
        request_id: str | None = None,
        events: deque[StreamEvent] | None = None,
    ) -> PendingPrompt:
        self._core.check_alive()
        params = checked("sampling_params", params, SamplingParams | None) or SamplingParams()
        if events is not None and params.return_hidden_states:
            raise ValueError("SamplingParams.return_hidden_states=True: a stream returns none: use generate")
        request_id = checked("request_id", request_id, Text | None)
        if request_id is None:
            request_id = self._free_id(number)
        elif self._outputs.knows(request_id):
            raise ValueError(f"request_id={request_id!r}: already in use")
        follow = self._outputs.follows(params, events is not None)
        text, token_ids = read(prompt, tokenize)
        samples = self._inputs.samples(token_ids, params, request_id, number, follow)
        first = samples[0]
        pending = self._outputs.add(request_id, text, first.token_ids, params, events)
        self._core.add(samples)
        counters = self._core.counters
        counters.prompt_tokens += first.num_prompt_tokens
        counters.prompts_truncated += first.rule is not None and first.rule.prompt_truncated
        return pending

    def _free_id(self, number: int) -> str:
        """Of the request `number`; apart from what callers call theirs."""
        request_id = f"auto-{number}"
        while self._outputs.knows(request_id):
            request_id += "+"
        return request_id

    def abort(self, request_id: str) -> bool:
        """Withdraw a prompt with all its samples; its output, as far as it came, is marked "abort".

        Returns:
            Whether the request was still unfinished; False for an unknown id.

        Raises:
            ValueError: the id is not text.
        """
        request_id = checked("request_id", request_id, str)
        if not self._outputs.is_unfinished(request_id):
            return False
        with self._whole():
            self._core.counters.requests_aborted += 1
            self._outputs.process(self._core.abort(request_id), self._core.stop)
        return True

    def has_unfinished_requests(self) -> bool:
        """Whether `step()` has work to do or outputs to hand over."""
        return bool(self._outputs.unfinished or self._outputs.done)

    def shutdown(self) -> None:
        """Abort what is unfinished and stop the thread that compresses.

        `step` still hands over the outputs that it has not yet, those of aborted requests among them; a stream ends
        with the finish reason "abort". Beyond that the engine serves nothing: whatever asks it to raises RuntimeError.
        """
        try:
            for request_id in self._outputs.unfinished:
                self.abort(request_id)
        finally:
            self._core.shut_down()

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """The logits that a token is drawn from, computed in float32.

        Args:
            hidden_states: [T, width], of `CompletionOutput.hidden_states`, on any device.

        Returns:
            float32 [T, vocab], on the engine's device; with replicas on the host.

        Raises:
            ValueError: they are not of the model's width.
        """
        return self._core.logits(checked("hidden_states", hidden_states, Tensor))

    # Running

    def step(self) -> list[RequestOutput]:
        """Run one step, or with replicas, which step by themselves, wait a little for what they tell. Returns the
        outputs that became complete and were not handed over yet.

        Raises:
            RuntimeError: the engine was shut down or has failed.
        """
        if not (self._core.is_shut_down and self._outputs.done):
            self._step()
        return self._outputs.take_done()

    def _step(self) -> None:
        with self._whole():
            self._outputs.process(self._core.step(), self._core.stop)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around what core and outputs must both have seen, or neither; see `Core.whole`."""
        try:
            with self._core.whole():
                yield
        except BaseException:
            if self._core.has_failed:
                self._outputs.forget_unfinished()
            raise
        self._abort_left()
        self._core.listeners.deliver()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **unsupported: Any,
    ) -> list[RequestOutput]:
        """Answer a batch of prompts.

        A prompt that can't be served comes back with `error` set and finish reason "error"; the others go on.

        Args:
            prompts: one prompt or a list of them: a text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
            sampling_params: options for all, or one for each prompt; `params` is another name for it.
            use_tqdm: show a progress bar.
            unsupported: arguments of vLLM's, which are refused by name.

        Returns:
            One output a prompt, in order.

        Raises:
            ValueError: `prompts` or the options are none, or there are not as many options as prompts.
            RuntimeError: the engine was shut down or has failed.
        """
        _refuse("generate", unsupported)
        self._core.check_alive()
        return self._answer(as_prompts(prompts), self._inputs.tokenize, _one_of_two(sampling_params, params), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **unsupported: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or a batch of them, as `generate` answers prompts.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`, or a list of such lists.
            sampling_params, use_tqdm, unsupported: as in `generate`.
            chat_template: Jinja, run in a sandbox; None takes the tokenizer's.
            add_generation_prompt: end with the beginning of the assistant's answer.
            continue_final_message: go on with the last message; needs `add_generation_prompt=False`.
            chat_template_kwargs: more keywords for the template, such as `{"enable_thinking": False}`.

        Returns:
            One output a conversation, in order.

        Raises:
            ValueError: `messages` are none, or as in `generate`. What the template refuses costs one conversation.
            RuntimeError: the engine was shut down or has failed.
        """
        _refuse("chat", unsupported)
        self._core.check_alive()
        tokenize = self._inputs.with_template(
            chat_template, add_generation_prompt, continue_final_message, chat_template_kwargs
        )
        return self._answer(as_conversations(messages), tokenize, sampling_params, use_tqdm)

    def _answer(
        self,
        prompts: Sequence[Any],
        tokenize: Callable[[Any], Tokens],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if isinstance(params, Sequence) and not isinstance(params, str):
            params = [checked(f"sampling_params[{i}]", p, SamplingParams) for i, p in enumerate(params)]
        else:
            params = [checked("sampling_params", params, SamplingParams | None) or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling params for {len(prompts)} prompts: give one, or one for each")
        outputs: list[RequestOutput | str] = []
        mine: list[str] = []
        done = self._outputs.done
        with tqdm(total=len(prompts), desc="requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
            try:
                for prompt, p in zip(prompts, params, strict=True):
                    number = next(self._numbers)
                    try:
                        mine.append(self._add(number, prompt, tokenize, p).request_id)
                        outputs.append(mine[-1])
                    except ValueError as error:
                        outputs.append(self._outputs.refuse(self._free_id(number), text_of(prompt), str(error)))
                bar.update(len(outputs) - len(mine))
                begin, tokens = time.perf_counter(), self._core.output_tokens
                pending = set(mine)
                while pending:
                    self._step()
                    finished = pending & done.keys()
                    pending -= finished
                    rate = (self._core.output_tokens - tokens) / (time.perf_counter() - begin)
                    bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
                    bar.update(len(finished))
            except BaseException:
                for request_id in mine:
                    self.abort(request_id)
                    done.pop(request_id, None)
                raise
        return [done.pop(output) if isinstance(output, str) else output for output in outputs]

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        params: SamplingParams | None = None,
    ) -> Iterator[StreamEvent]:
        """Answer one prompt token by token, beside whatever else is queued.

        The request is queued at the call. Leaving the loop early, or dropping the iterator, aborts it.

        Raises:
            ValueError: the prompt or an option can't be served (at the call, not at the first event).
            RuntimeError: the engine was shut down or has failed.
        """
        params = _one_of_two(sampling_params, params)
        prompt = self._add(next(self._numbers), prompt, self._inputs.tokenize, params, events=deque())
        events = self._events_of(prompt)
        next(events)
        return events

    def _events_of(self, prompt: PendingPrompt) -> Iterator[StreamEvent]:
        """First None: a generator that is dropped before it has begun would not come to its `finally`."""
        try:
            yield None
            while prompt.unfinished:
                self._step()
                while prompt.events:
                    yield prompt.events.popleft()
            yield from prompt.events
        finally:
            # The garbage collector, which may be what ends this, may come in the middle of a step.
            self._left.append(prompt.request_id)
            if not self._core.in_step:
                self._abort_left()

    def _abort_left(self) -> None:
        while self._left:
            self.abort(self._left.popleft())

    @property
    def stats(self) -> EngineStats:
        """Counters since the start, and gauges as they are now."""
        return self._core.stats()

    def snapshot(self) -> Snapshot:
        """The unfinished samples as they are now. Raises RuntimeError as `step`."""
        with self._core.whole():
            return self._core.snapshot()

    def held_entries(self, request_id: str, index: int = 0) -> HeldEntries | None:
        """The positions of a sample's text that each head holds now, for which it waits for the step under way. None
        where nothing stands still on the device: it has ended, waits, is paused, or is being compressed.

        Raises:
            RuntimeError: the engine was shut down or has failed.
        """
        with self._core.whole():
            return self._core.held_entries(request_id, index)


def _one_of_two(sampling_params: Any, params: Any) -> Any:
    if sampling_params is not None and params is not None:
        raise ValueError("sampling_params and params are two names for the same: give one of them")
    return params if sampling_params is None else sampling_params


def _refuse(where: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that are vLLM's alone and ask for something, and for unknown ones."""
    check_names(drop_unsupported(where, options, CALL_OPTIONS), ("sampling_params", "use_tqdm"), where)
