"""Outputs that end in a loop: the thought that repeats itself until the cap cuts it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

MIN_TOKENS, MAX_PERIOD, MIN_REPEATS = 64, 512, 4
_PROBE = 8
"""Last tokens that a period must repeat before its whole run is compared."""


def is_loop(
    token_ids: Sequence[int] | np.ndarray,
    min_tokens: int = MIN_TOKENS,
    max_period: int = MAX_PERIOD,
    min_repeats: int = MIN_REPEATS,
) -> bool:
    """Whether an output ends in degenerate repetition.

    It does if its last max(`min_tokens`, `min_repeats` x p) tokens repeat with a period of p tokens, for some p up to
    `max_period`, wherever in the cycle the output was cut. Only exact repetition counts, as in vLLM's
    `repetition_detection`: a loop with a counter in it, one that the model left again, and one of longer cycles are
    none. With these defaults a token must come 64 times and a paragraph of 500 tokens four times: rulers, rows of a
    table and a sentence said thrice stay below. An answer that was asked to repeat itself looks the same as a loop.

    Only the last `max_period` x `min_repeats` tokens are read.

    Raises:
        ValueError: a number is too small to mean repetition.
    """
    for name, value, least in (
        ("min_tokens", min_tokens, 2 * _PROBE),
        ("max_period", max_period, 1),
        ("min_repeats", min_repeats, 2),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    tail = np.asarray(token_ids[-max(min_tokens, max_period * min_repeats) :])
    if tail.size < min_tokens:
        return False
    last, longest = tail.size - 1, min(max_period, tail.size // min_repeats)
    periods = 1 + np.flatnonzero(tail[last - longest : last][::-1] == tail[last])
    for i in range(last - 1, last - _PROBE, -1):
        if not periods.size:
            return False
        periods = periods[tail[i - periods] == tail[i]]
    for period in periods:
        repeated = max(min_tokens, min_repeats * period) - period
        if (tail[-repeated:] == tail[-repeated - period : -period]).all():
            return True
    return False


def loop_rate(outputs: Iterable[Sequence[int] | np.ndarray]) -> float | None:
    """The share of outputs, given as token ids, that end in a loop; None where there is no output."""
    loops = [is_loop(token_ids) for token_ids in outputs]
    return sum(loops) / len(loops) if loops else None
