"""What a request's options do to its logits before its next token is drawn, as vLLM defines them."""

from __future__ import annotations

from array import array

import numpy as np

from zipage.scheduling.plan import RowStart


def banned_tokens(start: RowStart, num_output: int, output: array) -> set[int]:
    """Tokens that may not come next: they would end the request before `min_tokens`, or complete a bad word.

    As in vLLM, the beginning of a bad word must stand in the output; what the prompt ends with does not count.

    Args:
        num_output: tokens drawn so far.
        output: those tokens, where there are bad words.
    """
    banned = set(start.stop_ids) if num_output < start.sampling_params.min_tokens else set()
    for *begin, last in start.bad_words:
        if not begin or output[-len(begin) :].tolist() == begin:
            banned.add(last)
    return banned


def output_penalties(start: RowStart, output: array) -> dict[int, float]:
    """What presence and frequency penalty add to the logits of the output's tokens."""
    params = start.sampling_params
    if not (params.presence_penalty or params.frequency_penalty):
        return {}
    tokens, counts = np.unique(output, return_counts=True)
    changes = -params.presence_penalty - params.frequency_penalty * counts
    return dict(zip(tokens.tolist(), changes.tolist(), strict=True))
