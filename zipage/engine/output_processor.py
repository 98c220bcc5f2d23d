"""From tokens to what the caller gets: text, stop strings, streams, outputs."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zipage.engine.detokenizer import Detokenizer, decode
from zipage.engine.interface import TokenDelta
from zipage.eviction.fault import first_line
from zipage.models.loading.tokenizer import is_tokenizer_error
from zipage.outputs import CompletionOutput, Logprob, RequestOutput, StreamEvent
from zipage.sampling_params import SamplingParams
from zipage.stats import EngineStats, RequestMetrics, combine_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sample:
    """One sample of a prompt, as far as its tokens have come."""

    output: CompletionOutput
    detokenizer: Detokenizer | None


@dataclass(slots=True)
class PendingPrompt:
    """A prompt with unfinished samples, `unfinished` of them; `events` takes those of its tokens, if it is streamed."""

    request_id: str
    text: str | None
    token_ids: list[int]
    params: SamplingParams
    samples: list[_Sample]
    events: deque[StreamEvent] | None
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = len(self.samples)


class OutputProcessor:
    """Turns deltas into outputs and stream events.

    Args:
        tokenizer: None where there is no text.
        counters: of the engine; prompts that end are counted there.
        clock: of the core.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | None,
        counters: EngineStats,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._tokenizer = tokenizer
        self._clock = clock
        self._counters = counters
        self._prompts: dict[str, PendingPrompt] = {}
        self._done: dict[str, RequestOutput] = {}

    # Requests

    def follows(self, params: SamplingParams, stream: bool) -> bool:
        """Whether a request's tokens are wanted one by one, not only at its end."""
        return stream or (self._has_text(params) and bool(params.stop))

    def _has_text(self, params: SamplingParams) -> bool:
        return self._tokenizer is not None and params.detokenize

    def add(
        self,
        request_id: str,
        text: str | None,
        token_ids: Sequence[int],
        params: SamplingParams,
        events: deque[StreamEvent] | None = None,
    ) -> PendingPrompt:
        """Expect deltas of a prompt's `params.n` samples.

        Args:
            events: of its tokens, one by one, for a prompt that is streamed; such a prompt has no output.
        """
        samples = []
        stream = events is not None
        for index in range(params.n):
            detokenizer = None
            if self._has_text(params) and self.follows(params, stream):
                detokenizer = Detokenizer(
                    self._tokenizer,
                    params.stop,
                    params.skip_special_tokens,
                    params.include_stop_str_in_output,
                    params.min_tokens,
                )
            output = CompletionOutput(index, "", [], logprobs=None if params.logprobs is None else [])
            samples.append(_Sample(output, detokenizer))
        prompt = PendingPrompt(request_id, text, list(token_ids), params, samples, events)
        self._prompts[request_id] = prompt
        return prompt

    def refuse(self, request_id: str, text: str | None, error: str) -> RequestOutput:
        """The output of a prompt that can't be served."""
        self._counters.requests_failed += 1
        metrics = RequestMetrics(arrival=self._clock())
        outputs = [CompletionOutput(0, "", [], "error", metrics=metrics)]
        return RequestOutput(request_id, text, [], outputs, metrics, error)

    def knows(self, request_id: str) -> bool:
        """Whether a request of that name is unfinished, or its output was not fetched yet."""
        return request_id in self._prompts or request_id in self._done

    def is_unfinished(self, request_id: str) -> bool:
        return request_id in self._prompts

    @property
    def unfinished(self) -> list[str]:
        return list(self._prompts)

    @property
    def done(self) -> dict[str, RequestOutput]:
        """Complete outputs that were not fetched yet, by request id."""
        return self._done

    def take_done(self) -> list[RequestOutput]:
        done = list(self._done.values())
        self._done.clear()
        return done

    def forget_unfinished(self) -> None:
        """The engine has failed: nothing more comes."""
        self._prompts.clear()

    # Deltas

    def process(self, deltas: Iterable[TokenDelta], stop: Callable[[str, int], RequestMetrics]) -> None:
        """Take what a step did.

        Args:
            stop: ends a sample in whose text a stop string appeared, or whose tokens the tokenizer can't spell, by
                request id and index; gives its metrics.
        """
        for delta in deltas:
            prompt = self._prompts[delta.request_id]
            sample = prompt.samples[delta.index]
            output = sample.output
            if output.finish_reason is None:
                self._take(output, delta)
                try:
                    self._read(prompt.params, sample, delta)
                except BaseException as error:
                    if not is_tokenizer_error(error):
                        raise
                    logger.exception("the tokens of %r cannot be spelled", delta.request_id)
                    output.error = f"its tokens cannot be spelled: {first_line(error)}"
                    output.finish_reason = "error"
                    output.text = "" if sample.detokenizer is None else sample.detokenizer.text
                if output.finish_reason is not None and delta.finish_reason is None:
                    output.metrics = stop(delta.request_id, delta.index)
                self._report(prompt, sample, delta)

    @staticmethod
    def _take(output: CompletionOutput, delta: TokenDelta) -> None:
        output.token_ids += delta.token_ids
        if delta.logprobs is not None:
            output.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            output.finish_reason = delta.finish_reason
            output.stop_reason = delta.stop_reason
            output.error = delta.error
            output.metrics = delta.metrics
            output.hidden_states = delta.hidden_states

    def _read(self, params: SamplingParams, sample: _Sample, delta: TokenDelta) -> None:
        """What a delta's tokens spell; the sample ends where that is a stop string."""
        output = sample.output
        if delta.logprobs is not None and self._has_text(params):
            self._spell(delta.logprobs)
        found = self._find_stop(params, sample, delta)
        if found is not None:
            output.stop_reason = found
            output.finish_reason = "stop"
        if output.finish_reason is not None:
            output.text = self._text(params, sample)

    def _spell(self, logprobs: list[dict[int, Logprob]]) -> None:
        for of_token in logprobs:
            for token_id, logprob in of_token.items():
                logprob.decoded_token = decode(self._tokenizer, [token_id], skip_special_tokens=False)

    @staticmethod
    def _find_stop(params: SamplingParams, sample: _Sample, delta: TokenDelta) -> str | None:
        """The stop string that the delta's tokens completed. A token that ends a sample is text where asked for."""
        if sample.detokenizer is None or (delta.finish_reason == "stop" and not params.include_stop_str_in_output):
            return None
        found = None
        for token_id in delta.token_ids:
            found = sample.detokenizer.add(token_id)
        return found

    def _report(self, prompt: PendingPrompt, sample: _Sample, delta: TokenDelta) -> None:
        """Send the sample's event; complete the prompt with its last sample."""
        output, detokenizer = sample.output, sample.detokenizer
        is_finished = output.finish_reason is not None
        if prompt.events is not None:
            text = "" if detokenizer is None else detokenizer.take(is_finished)
            token_id = delta.token_ids[-1] if delta.token_ids else None
            logprobs = delta.logprobs[-1] if delta.logprobs else None
            logprob = None if logprobs is None else logprobs[token_id].logprob
            reason, error = output.finish_reason, output.error
            last = (output.stop_reason, output.metrics) if is_finished else ()
            prompt.events.append(
                StreamEvent(prompt.request_id, output.index, token_id, text, logprob, reason, error, logprobs, *last)
            )
        if is_finished:
            prompt.unfinished -= 1
            if prompt.unfinished == 0:
                self._complete(prompt)

    def _text(self, params: SamplingParams, sample: _Sample) -> str:
        output = sample.output
        if sample.detokenizer is not None:
            return sample.detokenizer.finish()
        if not self._has_text(params):
            return ""
        ends_unspelled = isinstance(output.stop_reason, int) and not params.include_stop_str_in_output
        spelled = output.token_ids[:-1] if ends_unspelled else output.token_ids
        return decode(self._tokenizer, spelled, params.skip_special_tokens)

    def _complete(self, prompt: PendingPrompt) -> None:
        del self._prompts[prompt.request_id]
        outputs = [sample.output for sample in prompt.samples]
        metrics = combine_metrics([output.metrics for output in outputs])
        error = next((output.error for output in outputs if output.error is not None), None)
        if prompt.events is None:
            self._done[prompt.request_id] = RequestOutput(
                prompt.request_id, prompt.text, prompt.token_ids, outputs, metrics, error
            )
        counters, reasons = self._counters, [output.finish_reason for output in outputs]
        counters.cached_tokens += metrics.cached_tokens
        counters.requests_failed += "error" in reasons
        counters.requests_finished += "error" not in reasons and "abort" not in reasons
