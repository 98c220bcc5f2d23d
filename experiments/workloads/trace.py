"""The requests of a trace of real traffic: its lengths and shared prefixes, in random words."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from random import Random

from experiments.running.traces import BLOCK, read_lengths
from experiments.workloads.lengths import WORDS
from experiments.workloads.problem import Problem


def generate(seed: int, path: str | None, count: int | None = None, longest: int | None = None) -> Iterator[Problem]:
    """Requests as long as those of a trace, in the order of their arrival, whose prompts share what those shared.

    The outputs are as long as in the trace with `sampling.ignore_eos=true`. Prompts share whole blocks of
    `experiments.running.traces.BLOCK` tokens, token by token, where the trace has `hash_ids`; else no two begin alike.

    Args:
        seed: of the words.
        path: file of the trace (see `experiments.running.traces`).
        count: only the first `count` requests; None: all.
        longest: bound of a prompt and of an output, in tokens; what is longer is cut.

    Raises:
        ValueError: an option is out of range, the trace can't be read, has no lengths, or is shorter than `count`.
    """
    if path is None:
        raise ValueError("path=None: must be given: the file of a trace (scenario=trace takes scenario.path)")
    requests = read_lengths(path, count, longest, options="options.")
    block = cache(lambda hash_id: _words(seed, f"block {hash_id}", BLOCK))
    for number, request in enumerate(requests):
        pieces, left = [], request.prompt_tokens
        for hash_id in request.hash_ids:
            pieces.append((block(hash_id), min(BLOCK, left)))
            left -= BLOCK
        if left > 0:
            pieces.append((_words(seed, f"request {number}", left), left))
        yield Problem(
            f"{number:05d}",
            question="",
            gold="",
            pieces=tuple(pieces),
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
        )


def _words(seed: int, name: str, count: int) -> str:
    """A text of more than `count` tokens, as a word is a token or more, that begins as no other does."""
    return " ".join([name, *Random(f"{seed}/{name}").choices(WORDS, k=count)])
