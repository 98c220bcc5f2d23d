"""What models are asked to calibrate them: no question of any workload is among it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from experiments.errors import UsageError
from experiments.paths import REASONER
from experiments.reasoner.curriculum import training_problem

Conversation = list[dict[str, str]]

TASKS = (
    "Explain {topic} to a curious beginner, step by step.",
    "Write a short essay on {topic}, with a thesis, arguments and a conclusion.",
    "Compare two opposite views of {topic} and say which one you find stronger.",
    "Think aloud about {topic}: what is known, what is doubtful, and how could one find out?",
    "Write a Python program that simulates something about {topic}, and explain every function.",
    "Invent a story of three scenes in which {topic} plays a part.",
    "Make up an exercise about {topic} that needs several steps of calculation, then solve it slowly.",
    "Write a dialogue between a teacher and a student about {topic}.",
    "List ten common mistakes about {topic} and correct each one.",
    "Plan a project on {topic}: goals, weeks, risks and costs.",
    "Summarise the history of {topic} in ten dated lines, then discuss the most important one.",
    "Translate a paragraph about {topic} into two other languages and comment on the hard words.",
)
TOPICS = (
    *("tides", "bread baking", "prime numbers", "the printing press", "bridges", "vaccines", "chess openings"),
    *("volcanoes", "compound interest", "bicycles", "sleep", "sorting algorithms", "glaciers", "elections"),
    *("the violin", "recycling", "black holes", "beekeeping", "public libraries", "satellite orbits", "fermentation"),
    *("error-correcting codes", "railways", "coral reefs", "probability", "maps", "soil", "the alphabet"),
    *("electric motors", "traffic jams", "photosynthesis", "insurance", "language change", "earthquakes", "databases"),
    *("swimming", "lenses", "trade routes", "the immune system", "recursion", "weather forecasts", "urban trees"),
)


def reasoner(seed: int) -> Iterator[Conversation]:
    """Problems of the shipped reasoner's training split, of full size; workloads draw from the other."""
    for number in itertools.count():
        problem = training_problem(Random(f"calibration/{seed}/{number}"), 0.99)
        turns = [text for turn in problem.history for text in turn]
        yield _conversation(*turns, problem.question)


def instructions(seed: int) -> Iterator[Conversation]:
    """Open tasks without a gold answer, one for each pair of a task and a topic, over and over in one drawn order."""
    pairs = list(itertools.product(TASKS, TOPICS))
    Random(seed).shuffle(pairs)
    for task, topic in itertools.cycle(pairs):
        yield _conversation(task.format(topic=topic))


CORPORA: dict[str, Callable[[int], Iterator[Conversation]]] = {"instructions": instructions, "reasoner": reasoner}


def corpus(name: str, seed: int) -> Iterator[Conversation]:
    """The conversations of a corpus, without end: one of `CORPORA`, or the lines of a text file, one prompt a line.

    Raises:
        UsageError: there is no such corpus, or the file can't be read or holds no prompt.
    """
    if name in CORPORA:
        return CORPORA[name](seed)
    try:
        lines = [line for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"corpus {name!r}: neither {' nor '.join(CORPORA)}, nor a file of prompts ({error})"
        ) from error
    if not lines:
        raise UsageError(f"corpus {name!r}: the file holds no prompt")
    return itertools.cycle([_conversation(line) for line in lines])


def corpus_for(model: str) -> str:
    """The shipped reasoner, and what trains as it does, knows its own problems alone."""
    folder = Path(model).expanduser()
    return "reasoner" if folder.resolve() == REASONER or (folder / "training.json").is_file() else "instructions"


def _conversation(*turns: str) -> Conversation:
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), turns)]
