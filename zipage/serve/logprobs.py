"""Log-probabilities in the two formats of OpenAI."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from zipage.outputs import Logprob

OfToken = dict[int, Logprob]
LEAST = -9999.0
"""JSON has no infinity; OpenAI, too, says this of a token without probability."""


def of_completion(tokens: Sequence[OfToken], num_top: int, offset: int = 0) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/completions: the chosen token's, and with it the `num_top` most likely ones.

    Args:
        tokens: as `CompletionOutput.logprobs`.
        offset: characters of the sample before the first of them.
    """
    chosen = [next(iter(of.values())) for of in tokens]
    scores = [{_text(one): _value(one) for one in of.values()} for of in tokens]
    texts = [_text(logprob) for logprob in chosen]
    return {
        "tokens": texts,
        "token_logprobs": [_value(logprob) for logprob in chosen],
        "top_logprobs": scores if num_top else None,
        "text_offset": [*accumulate(map(len, texts[:-1]), initial=offset)] if texts else [],
    }


def of_chat(tokens: Sequence[OfToken], num_top: int) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/chat/completions."""
    content = []
    for of in tokens:
        top = sorted((one for one in of.values() if one.rank <= num_top), key=lambda one: one.rank)
        content.append(_entry(next(iter(of.values()))) | {"top_logprobs": [_entry(one) for one in top]})
    return {"content": content, "refusal": None}


def _entry(logprob: Logprob) -> dict[str, Any]:
    text = _text(logprob)
    return {"token": text, "logprob": _value(logprob), "bytes": list(text.encode("utf-8", "replace"))}


def _value(logprob: Logprob) -> float:
    return max(logprob.logprob, LEAST)


def _text(logprob: Logprob) -> str:
    return logprob.decoded_token or ""
