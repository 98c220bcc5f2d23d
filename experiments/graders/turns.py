"""The answers of a conversation, each graded by its final number: those to questions, and those that recall."""

from __future__ import annotations

import json
from typing import Any

from experiments.graders.number import final_number, grade_number, written
from experiments.graders.thought import after_thought


def grade_turns(answer: str, gold: str) -> tuple[dict[str, list[float]], str]:
    """Grade each answer to a question as `number` does, and each recall by what it recalls.

    Args:
        answer: a JSON list of the answers, one a turn. Those that are missing at its end score 0.
        gold: a JSON list, one item a turn: the gold of a question, {"answer_of": N} for the number that the answer to
            question N ended in, right or wrong (none scores 0), or {"number_of": N, "gold": "16"} for a number of it.

    Returns:
        The grades of the questions, "places", and of the recalls, "recalls"; and the numbers that were read, a JSON
        list with an item for each turn.

    Raises:
        ValueError: the answers are not such a list, or more than the turns.
    """
    golds = json.loads(gold)
    answers = [after_thought(text) for text in _texts(answer, len(golds))]
    grades: dict[str, list[float]] = {"places": [], "recalls": []}
    read = []
    for text, one in zip(answers, golds, strict=True):
        if isinstance(one, dict):
            score, extracted = _grade_recall(text, one, answers)
        else:
            score, extracted = grade_number(text, one)
        grades["recalls" if isinstance(one, dict) else "places"].append(score)
        read.append(extracted)
    return grades, json.dumps(read)


def _texts(answer: str, count: int) -> list[str]:
    """The answers, with an empty text for each that is missing."""
    texts = json.loads(answer) if answer else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("the output is not a JSON list of texts, one for each turn of a conversation")
    if len(texts) > count:
        raise ValueError(f"the output has {len(texts)} answers, the conversation {count} turns")
    return texts + [""] * (count - len(texts))


def _grade_recall(text: str, gold: dict[str, Any], answers: list[str]) -> tuple[float, str | None]:
    if "number_of" in gold:
        return grade_number(text, gold["gold"])
    own, found = final_number(answers[gold["answer_of"] - 1]), final_number(text)
    return float(own is not None and found == own), None if found is None else written(found)
