"""Questions as turns of one conversation, and turns at its end that ask for something earlier again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from random import Random

from experiments.errors import UsageError
from experiments.graders.number import first_number, written
from experiments.workloads.chains import grouped
from experiments.workloads.problem import Problem

QUOTED = 6
"""Words of a question that name it beside its number, at most."""
ANSWER = "What was your final answer to question {place}? Reply with the number only."
NUMBER = 'Which number came first in question {place}, which began with "{begin}"? Reply with the number only.'

_SPOKEN = re.compile(
    r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    r"|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|dozen|half"
    r"|twice|double|triple)\b",
    re.IGNORECASE,
)


def converse(problems: Sequence[Problem], turns: int, recalls: int, seed: int, template: str) -> list[Problem]:
    """Group the problems into conversations of `turns` questions, as `chain` groups them, and `recalls` more turns.

    A recall asks in turn for the model's own final answer to a question, and for the first number of a question. Which
    questions are recalled is drawn: one of each of as many stretches of the conversation, in random order, so that
    recalls reach back from near to far. Where no question of a stretch has a number to ask for, its answer is.

    Args:
        seed: draws which questions go together, and which are recalled.
        template: of a question; a recall stands as it is.

    Returns:
        Problems whose questions are numbered "Question 1: ..." and whose gold is a JSON list, as the grader `turns`
        reads it: the gold of each question, then {"answer_of": 3}, or {"number_of": 3, "gold": "16"}, of each recall.

    Raises:
        UsageError: `turns` is less than 2, `recalls` not from 0 to `turns`, or there are too few problems.
    """
    if not 0 <= recalls <= max(turns, 0):
        raise UsageError(f"workload.recalls={recalls}: must be from 0 to workload.turns={turns}")
    return [_joined(parts, recalls, seed, template) for parts in grouped(problems, turns, seed, "turns")]


def _joined(parts: Sequence[Problem], recalls: int, seed: int, template: str) -> Problem:
    name = "+".join(part.id for part in parts)
    first, *later = (f"Question {place}: {part.question}" for place, part in enumerate(parts, 1))
    drawn = list(_recalls([part.question for part in parts], recalls, Random(f"{seed}/{name}")))
    asked = [template.replace("{question}", question) for question in later]
    return Problem(
        id=name,
        question=first,
        gold=json.dumps([*(part.gold for part in parts), *(gold for _, gold in drawn)]),
        follow_ups=(*asked, *(text for text, _ in drawn)),
    )


def _recalls(questions: Sequence[str], count: int, random: Random) -> Iterator[tuple[str, dict[str, int | str]]]:
    """The text and the gold of each recall."""
    length = len(questions)
    stretches = [range(i * length // count, (i + 1) * length // count) for i in range(count)]
    random.shuffle(stretches)
    for number, stretch in enumerate(stretches):
        places = random.sample(stretch, len(stretch))
        named = [(place, found) for place in places if (found := first_number_of(questions[place]))]
        if number % 2 and named:
            place, (begin, value) = named[0]
            yield NUMBER.format(place=place + 1, begin=begin), {"number_of": place + 1, "gold": value}
        else:
            yield ANSWER.format(place=places[0] + 1), {"answer_of": places[0] + 1}


def first_number_of(question: str) -> tuple[str, str] | None:
    """How a question begins, and its first number, if that is in digits; None where it can't be asked for.

    The beginning ends before the number, so that it does not give it away. A question that begins with its number, that
    has one in words before it, or whose first numeral has no value (a ratio, a time), has none to ask for.
    """
    words = question.split()
    place = next((place for place, word in enumerate(words) if re.search(r"\d", word)), 0)
    value = first_number(question)
    if not place or value is None or _SPOKEN.search(" ".join(words[:place])):
        return None
    return " ".join(words[: min(place, QUOTED)]), written(value)
