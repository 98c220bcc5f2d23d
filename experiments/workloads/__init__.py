"""Workloads: the questions of a run with their golds."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any

from experiments.config.schema import WorkloadConfig
from experiments.errors import UsageError
from experiments.workloads import (
    chained_arithmetic,
    fragility,
    lengths,
    program_trace,
    reasoning_gym,
    trace,
    word_problems,
)
from experiments.workloads.chains import chain
from experiments.workloads.conversations import converse
from experiments.workloads.exams import exam
from experiments.workloads.gold import gold_answer, unfit, worked_solution
from experiments.workloads.problem import Problem
from experiments.workloads.sources import read_file, read_hub

FIELDS = re.compile(r"\{(\w+)\}")

__all__ = ["GENERATORS", "Problem", "load_problems"]

GENERATORS: dict[str, Callable[..., Iterable[Problem]]] = {
    "word_problems": word_problems.generate,
    "reasoning_gym": reasoning_gym.generate,
    "lengths": lengths.generate,
    "chained_arithmetic": chained_arithmetic.generate,
    "program_trace": program_trace.generate,
    "fragility": fragility.generate,
}

READERS: dict[str, Callable[..., Iterable[Problem]]] = {"trace": trace.generate}
"""Generators that make their problems of the file at `workload.path`."""


def load_problems(config: WorkloadConfig, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of a workload (None: all).

    An item that can't be asked (a field is missing, null or no text or number, its tests can't be read, a text is not
    valid Unicode) is a problem with its `error`; the others are not affected.

    Raises:
        UsageError: the source can't be read, an option of the generator is wrong, or no item can be asked.
    """
    if config.turns is not None and config.chain is not None:
        raise UsageError(
            f"workload.turns={config.turns}: does not go with workload.chain={config.chain}: make one null"
        )
    if config.turns is None and config.recalls:
        raise UsageError(f"workload.recalls={config.recalls}: only a conversation recalls: give workload.turns, or 0")
    if config.turns is not None:
        single = load_problems(replace(config, turns=None, recalls=0))
        problems = converse(single, config.turns, config.recalls, config.seed, config.template)[:limit]
    elif config.chain is not None:
        problems = chain(load_problems(replace(config, chain=None)), config.chain, config.seed)[:limit]
    elif config.parts and config.path is None:
        problems = _mix(config)[:limit]
    elif config.generator in READERS or (config.generator is not None and config.path is None):
        problems = _generate(config, limit)
    else:
        rows = read_file(config.path) if config.path is not None else read_hub(config)
        problems = [_item(row, number, config) for number, row in enumerate(rows[:limit])]
    if not problems:
        raise UsageError(f"workload {config.name} holds no problem")
    if all(problem.error is not None for problem in problems):
        raise UsageError(problems[0].error)
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise UsageError(f"workload.id={config.id}: {problem.id!r} names two items; it must be unique")
        seen.add(problem.id)
    return problems


def _mix(config: WorkloadConfig) -> list[Problem]:
    """The problems of all parts in a random order; each names its part."""
    problems = []
    for name, options in config.parts.items():
        try:
            part = WorkloadConfig(**options)
        except TypeError as error:
            raise UsageError(f"workload.parts.{name}: {error}") from error
        if part.turns is not None:  # its grader and the options of its requests are those of the whole
            raise UsageError(f"workload.parts.{name}.turns={part.turns}: a part has no turns: set workload.turns")
        problems += [replace(problem, id=f"{name}/{problem.id}", kind=name) for problem in load_problems(part)]
    Random(config.seed).shuffle(problems)
    return problems


def _generate(config: WorkloadConfig, limit: int | None) -> list[Problem]:
    generators = GENERATORS | READERS
    if config.generator not in generators:
        raise UsageError(f"workload.generator={config.generator}: must be one of {', '.join(generators)}")
    generator = generators[config.generator]
    given = {"seed": config.seed} | ({"path": config.path} if config.generator in READERS else {})
    known = [name for name in inspect.signature(generator).parameters if name not in given]
    for name in config.options:
        if name not in known:
            raise UsageError(
                f"workload.options.{name}: unknown option of {config.generator}; known: {', '.join(known)}"
            )
    try:
        return list(islice(generator(**given, **config.options), limit))
    except (TypeError, ValueError) as error:
        raise UsageError(f"workload{'.' if config.generator in READERS else '.options: '}{error}") from error


def _item(row: Mapping[str, Any], number: int, config: WorkloadConfig) -> Problem:
    """The problem of an item; one with `error` where it can't be asked."""
    try:
        problem = _problem(row, number, config)
        for name, text in (("id", problem.id), ("question", problem.question), ("gold", problem.gold)):
            if text != _unicode(text):
                raise UsageError(f"the {name} of item {number} holds half a surrogate pair, which is not a character")
        return problem
    except UsageError as error:
        name = str(number) if config.id is None else row.get(config.id)
        is_name = unfit(name) is None and str(name) == _unicode(str(name))
        return Problem(str(name) if is_name else f"item {number}", question="", gold="", error=_unicode(str(error)))


def _unicode(text: str) -> str:
    """The text with a question mark for each character that can't be encoded."""
    return text.encode(errors="replace").decode()


def _problem(row: Mapping[str, Any], number: int, config: WorkloadConfig) -> Problem:
    question_fields = FIELDS.findall(config.question) or [config.question]
    for option, names in (("question", question_fields), ("id", [config.id] if config.id is not None else [])):
        for name in names:
            if name not in row:
                raise UsageError(f"workload.{option}={name}: item {number} has no such field; it has {', '.join(row)}")
            if reason := unfit(row[name]):
                raise UsageError(f"workload.{option}={name}: is {reason} in item {number}")
    if config.tests is not None:
        gold: str | None = exam(row, number, config)
    else:
        try:
            gold = gold_answer(row, config.answer, config.solution)
        except ValueError as error:
            raise UsageError(f"workload.answer={config.answer}: is {error} in item {number}") from error
    if gold is None and config.answer in row and config.grader == "none":
        gold = ""
    if gold is None and config.answer in row:
        raise UsageError(f"workload.answer={config.answer}: is null or empty in item {number}")
    if gold is None:
        raise UsageError(f"workload.answer={config.answer}: item {number} has no such field; it has {', '.join(row)}")
    if FIELDS.search(config.question):
        question = FIELDS.sub(lambda match: str(row[match[1]]), config.question)
    else:
        question = str(row[config.question])
    name = str(number if config.id is None else row[config.id])
    worked = None if config.tests is not None else worked_solution(row, config.answer, config.solution)
    if worked is not None and worked != _unicode(worked):  # the question can be asked without it
        worked = None
    return Problem(id=name, question=question, gold=gold, worked=worked)
