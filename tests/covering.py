"""Fewer cases than a grid has, where no fault takes one value of every axis at once."""

from collections.abc import Sequence
from itertools import product
from typing import Any


def half(*axes: Sequence[Any]) -> list[tuple]:
    """Every other combination: those whose places in the axes add up to an even number.

    An axis left out, the others have all their combinations, if each axis has two values or more.
    """
    places = product(*(range(len(axis)) for axis in axes))
    return [tuple(axis[i] for axis, i in zip(axes, place, strict=True)) for place in places if sum(place) % 2 == 0]
