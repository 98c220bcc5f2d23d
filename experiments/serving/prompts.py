"""Bodies of requests: prompts of token ids drawn by a seed, with the prefixes that a trace shares."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.running.traces import BLOCK


class Asked(NamedTuple):
    """A request as a task lists it.

    Attributes:
        due: seconds after the start.
        prompt_tokens, output_tokens: lengths.
        blocks: ids of the blocks of `BLOCK` tokens with which its prompt begins; equal ids are equal tokens.
    """

    due: float
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int] = ()


def bodies(requests: Sequence[Asked], *, seed: str, vocab_size: int, common: Mapping[str, Any]) -> Iterator[bytes]:
    """JSON of each.

    Args:
        seed: no two give the same prompts, so that nothing of one measurement is in a cache for the next.
        vocab_size: ids are below it.
        common: fields that all have.
    """
    blocks: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        prompt: list[int] = []
        for block in request.blocks:
            if block not in blocks:
                blocks[block] = _ids(f"{seed} block {block}", BLOCK, vocab_size)
            prompt += blocks[block]
        prompt = prompt[: request.prompt_tokens]
        prompt += _ids(f"{seed} request {number}", request.prompt_tokens - len(prompt), vocab_size)
        yield json.dumps({**common, "prompt": prompt, "max_tokens": request.output_tokens}).encode()


def _ids(seed: str, count: int, vocab_size: int) -> list[int]:
    return np.random.default_rng(list(seed.encode())).integers(vocab_size, size=count).tolist()
