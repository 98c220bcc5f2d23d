"""What a request's options do to its logits before its next token is drawn, as vLLM defines them."""

from __future__ import annotations

import numpy as np

from zipage.scheduling.request import Request


def banned_tokens(request: Request) -> set[int]:
    """Tokens that may not come next: they would end the request before `min_tokens`, or complete a bad word.

    As in vLLM, the beginning of a bad word must stand in the output; what the prompt ends with does not count.
    """
    params = request.params
    banned = set(request.stop_ids) if request.num_output_tokens < params.min_tokens else set()
    for *begin, last in request.bad_words:
        tail = request.token_ids[max(request.num_prompt_tokens, request.num_tokens - len(begin)) :]
        if not begin or tail.tolist() == begin:
            banned.add(last)
    return banned


def output_penalties(request: Request) -> dict[int, float]:
    """What presence and frequency penalty add to the logits of the output's tokens."""
    params = request.params
    if not (params.presence_penalty or params.frequency_penalty):
        return {}
    tokens, counts = np.unique(request.token_ids[request.num_prompt_tokens :], return_counts=True)
    changes = -params.presence_penalty - params.frequency_penalty * counts
    return dict(zip(tokens.tolist(), changes.tolist(), strict=True))
