"""Prompts with the model's own answers to them, as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import ceil

from tqdm import tqdm

from experiments.calibration.corpora import Conversation
from experiments.errors import UsageError
from zipage import LLM, RequestOutput, SamplingParams, StepStats

AT_ONCE = 64
"""The most prompts of a batch."""


def answered(
    llm: LLM, conversations: Iterator[Conversation], num_tokens: int, *, max_tokens: int, seed: int
) -> list[tuple[list[int], int]]:
    """Prompt and answer of as many conversations as make up `num_tokens` tokens; the last one is cut there.

    Without a chat template, prompts go bare. Answers are drawn at temperature 0.6 and top-p 0.95. A batch asks
    for no more than is missing: the first by the longest answer, the others by the mean length so far.

    Args:
        max_tokens: longest answer.
        seed: of the draws.

    Returns:
        Token ids of each, and how many of them are the prompt.

    Raises:
        UsageError: the model answers none of a batch of prompts.
    """
    has_template = getattr(llm.get_tokenizer(), "chat_template", None) is not None
    texts: list[tuple[list[int], int]] = []
    missing = num_tokens
    with tqdm(total=num_tokens, desc="answers", unit=" tokens", dynamic_ncols=True) as bar:

        def count(step: StepStats) -> None:
            bar.update(min(step.num_decode + step.prefill_tokens, num_tokens - bar.n))

        llm.step_listeners.append(count)
        while missing > 0:
            length = (num_tokens - missing) / len(texts) if texts else max_tokens
            batch = list(islice(conversations, min(AT_ONCE, ceil(missing / length))))
            first, longest = seed + len(texts), min(max_tokens, missing)
            params = [
                SamplingParams(temperature=0.6, top_p=0.95, max_tokens=longest, seed=first + i)
                for i in range(len(batch))
            ]
            outputs = _ask(llm, batch, params, has_template)
            whole = [output for output in outputs if output.error is None]
            if not whole:
                raise UsageError(f"the model answers none of {len(batch)} prompts; the first: {outputs[0].error}")
            for output in whole:
                tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids][:missing]
                missing -= len(tokens)
                texts += [(tokens, min(len(output.prompt_token_ids), len(tokens)))] if tokens else []
            bar.update(num_tokens - missing - bar.n)
        llm.step_listeners.remove(count)
    return texts


def _ask(llm: LLM, batch: list[Conversation], params: list[SamplingParams], chat: bool) -> list[RequestOutput]:
    if chat:
        return llm.chat(batch, params, use_tqdm=False)
    return llm.generate(["\n".join(turn["content"] for turn in turns) for turns in batch], params, use_tqdm=False)
