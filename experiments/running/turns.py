"""A conversation that is one request: what it asks of the engine, and its answers in what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from experiments.config.schema import SamplingOptions
from experiments.running.prompts import Prompt


def turn_options(sampling: SamplingOptions, prompt: Prompt) -> dict[str, Any]:
    """Options of `SamplingParams` for a conversation: `sampling.max_tokens` is the limit of each answer.

    The whole conversation has no limit but the model's context.
    """
    return {
        "follow_ups": prompt.follow_ups,
        "max_turn_tokens": sampling.max_tokens,
        "max_tokens": None,
        "stop_token_ids": (prompt.end_token, *(sampling.stop_token_ids or ())),
    }


@dataclass(frozen=True)
class Answer:
    """One answer of a conversation.

    Attributes:
        text: without the end token, unless `sampling.include_stop_str_in_output`.
        begin, end: where its tokens lie in the request's output, the end token included.
    """

    text: str
    begin: int
    end: int


AnswerReader = Callable[[Prompt, Sequence[int]], list[Answer]]
"""From the tokens of a sample to its answers."""


def answer_reader(tokenizer: Any, sampling: SamplingOptions) -> AnswerReader:
    """Reads a conversation's answers, one for each turn that the model began to answer.

    Args:
        tokenizer: of `transformers`.
    """
    keeps_end, skip = sampling.include_stop_str_in_output, sampling.skip_special_tokens

    def read(prompt: Prompt, token_ids: Sequence[int]) -> list[Answer]:
        ends = {prompt.end_token, *(sampling.stop_token_ids or ()), *tokenizer.all_special_ids}
        answers = []
        for begin, end in answer_spans(token_ids, prompt.follow_ups, ends):
            last = end - (token_ids[end - 1] in ends and not keeps_end)
            spelled = list(token_ids[begin:last])
            text = tokenizer.decode(spelled, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            answers.append(Answer(text, begin, end))
        return answers

    return read


def answer_spans(
    token_ids: Sequence[int], follow_ups: Sequence[Sequence[int]], ends: Collection[int]
) -> list[tuple[int, int]]:
    """Where each answer begins and ends in an output that the engine's rule of follow-ups made.

    An answer ends with the first end token that the next follow-up stands behind: whether that was drawn, or put there
    since the answer was cut short, makes no difference. The output may end anywhere, also within a follow-up.

    Args:
        ends: tokens that may end an answer; more than the engine's own do no harm.
    """
    spans, begin = [], 0
    for follow_up in follow_ups:
        candidates = (place + 1 for place in range(begin, len(token_ids)) if token_ids[place] in ends)
        end = next((end for end in candidates if _stands(token_ids, end, follow_up)), None)
        if end is None:
            break
        spans.append((begin, end))
        begin = end + len(follow_up)
    if begin < len(token_ids):
        spans.append((begin, len(token_ids)))
    return spans


def _stands(token_ids: Sequence[int], begin: int, follow_up: Sequence[int]) -> bool:
    """Whether the follow-up stands at `begin`, or as much of it as the output has left."""
    found = token_ids[begin : begin + len(follow_up)]
    return list(found) == list(follow_up[: len(found)])


def as_output(answers: Sequence[Answer]) -> str:
    """The answers as a record holds them: a JSON list, which the grader `turns` reads."""
    return json.dumps([answer.text for answer in answers], ensure_ascii=False)


def recall_distances(gold: str, answers: Sequence[Answer]) -> list[int | None]:
    """Tokens from the end of what each recall asks for to the beginning of the turn that asks.

    An answer ends with its last token; a question where its answer begins. None where the recall was not answered.

    Args:
        gold: as the grader `turns` reads it.
    """
    golds = json.loads(gold)
    asked = [None, *(before.end for before, _ in pairwise(answers))]  # where the turn of each answer begins
    asked += [None] * (len(golds) - len(asked))
    distances: list[int | None] = []
    for one, begin in zip(golds, asked, strict=True):
        if not isinstance(one, dict):
            continue
        if begin is None:
            distances.append(None)
        elif "answer_of" in one:
            distances.append(begin - answers[one["answer_of"] - 1].end)
        else:
            distances.append(begin - answers[one["number_of"] - 1].begin)
    return distances
