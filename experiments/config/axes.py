"""What overrides set, value by value: the axes of a sweep."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from hydra.errors import OverrideParseException

from experiments.config.explain import explain
from experiments.config.known import is_text
from experiments.config.overrides import as_written
from experiments.errors import UsageError

MOST_ARMS = 2_000
"""Of a sweep; each is composed and checked before the first runs."""


def parse_overrides(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Overrides by the option that each sets: "seed=0,1" gives {"seed": ["seed=0", "seed=1"]}.

    Raises:
        UsageError: an argument is not an override.
    """
    try:
        written = [as_written(argument, is_text) for argument in arguments]
        parsed = OverridesParser.create().parse_overrides(written)
    except OverrideParseException as error:
        raise UsageError(explain(error)) from error
    return {override.key_or_group: _alternatives(override) for override in parsed}


def count_arms(arguments: Sequence[str]) -> int:
    """How many runs Hydra's own sweep (`-m`) makes of overrides, where a glob counts as one.

    Raises:
        UsageError: an argument is not an override.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(arguments))
    except OverrideParseException as error:
        raise UsageError(explain(error)) from error
    return math.prod(map(_count, parsed))


def _count(override: Override) -> int:
    """Values of an axis, without a list of them; endless ones are more than any limit."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return len(value.list)
    if not isinstance(value, RangeSweep):
        return 1
    start, stop, step = float(value.start), float(value.stop), float(value.step)
    count = (stop - start) / step if step else math.inf
    return max(0, math.ceil(count)) if math.isfinite(count) else sys.maxsize


def _alternatives(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not isinstance(override.value(), ChoiceSweep | RangeSweep):
        raise UsageError(f"{override.input_line}: an axis must be a list such as a,b,c or a range(START,STOP)")
    count = _count(override)
    if not 1 <= count <= MOST_ARMS:
        raise UsageError(f"{override.input_line}: {count:,} values; must be at least 1 and at most {MOST_ARMS:,}")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
