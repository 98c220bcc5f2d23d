"""Procedural reasoning tasks of the package reasoning-gym (Apache-2.0), an optional extra."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.errors import UsageError
from experiments.workloads.problem import Problem


def generate(seed: int, task: str = "gsm_symbolic", count: int = 64) -> Iterator[Problem]:
    """Items of one task. Choose tasks with one right answer: they are graded against it by `workload.grader`.

    Args:
        seed: of the items.
        task: name of a reasoning-gym dataset.
        count: items.

    Raises:
        UsageError: the package is absent, or the task is unknown.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise UsageError(
            "workload.generator=reasoning_gym: the package is absent: pip install -e '.[reasoning-gym]'"
        ) from error
    try:
        items = reasoning_gym.create_dataset(task, size=count, seed=seed)
    except ValueError as error:
        raise UsageError(f"workload.options.task={task}: {error}") from error
    for number, item in enumerate(items):
        yield Problem(id=f"{number:05d}", question=item["question"], gold=str(item["answer"]), kind=task)
