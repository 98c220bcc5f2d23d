"""Prompts with the model's own answers to them, as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from experiments.calibration.corpora import Conversation
from experiments.errors import UsageError
from zipage import LLM, RequestOutput, SamplingParams

AT_ONCE = 64


def answered(
    llm: LLM, conversations: Iterator[Conversation], num_tokens: int, *, max_tokens: int, seed: int
) -> list[tuple[list[int], int]]:
    """Prompt and answer of as many conversations as make up `num_tokens` tokens; the last one is cut there.

    Without a chat template, prompts go bare. Answers are drawn at temperature 0.6 and top-p 0.95.

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
    while missing > 0:
        batch = list(islice(conversations, AT_ONCE))
        first = seed + len(texts)
        params = [
            SamplingParams(temperature=0.6, top_p=0.95, max_tokens=max_tokens, seed=first + i)
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
        print(f"{num_tokens - missing:,} of {num_tokens:,} tokens", flush=True)
    return texts


def _ask(llm: LLM, batch: list[Conversation], params: list[SamplingParams], chat: bool) -> list[RequestOutput]:
    if chat:
        return llm.chat(batch, params, use_tqdm=False)
    return llm.generate(["\n".join(turn["content"] for turn in turns) for turns in batch], params, use_tqdm=False)
