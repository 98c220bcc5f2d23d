"""Half of a grid of cases, where the interpreter makes each one dear."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

Axis = tuple[str | tuple[str, ...], Sequence[Any]]
"""Names and values, as `pytest.mark.parametrize` takes them."""


def half(*axes: Axis) -> pytest.MarkDecorator:
    """Every other cell of three axes or more, so that any two values of different axes still meet in some cell."""
    assert len(axes) > 2
    assert all(len(values) > 1 for _, values in axes)
    names = [name for given, _ in axes for name in ([given] if isinstance(given, str) else given)]
    params = [[_param(given, value) for value in values] for given, values in axes]
    cells = [
        pytest.param(
            *(value for _, part in cell for value in part.values),
            id="-".join(part.id or "-".join(map(str, part.values)) for _, part in cell),
        )
        for cell in product(*map(enumerate, params))
        if sum(place for place, _ in cell) % 2 == 0
    ]
    return pytest.mark.parametrize(names, cells)


def _param(names: str | tuple[str, ...], value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "values"):  # it is a `pytest.param`
        return value
    return pytest.param(value) if isinstance(names, str) else pytest.param(*value)
