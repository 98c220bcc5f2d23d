"""What a kind of benchmark is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.backends import BackendFactory
from experiments.config.schema import Experiment

Keep = Callable[[list[dict]], None]
Measure = Callable[[Keep], tuple[list[dict], dict]]


@dataclass(frozen=True)
class Bench:
    """A kind of benchmark.

    Attributes:
        prepare: checks the options and gives what decides the result beside them, as plain data, and the function that
            measures: it returns the rows and what is true of all of them, and hands the rows over as they grow.
        options: beginnings of the options that mean something to it, beside those that every benchmark has.
    """

    prepare: Callable[[Experiment, Mapping[str, BackendFactory]], tuple[Any, Measure]]
    options: tuple[str, ...]
