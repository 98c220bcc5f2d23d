"""A few of all combinations, in which any two values meet all the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement, product
from typing import Any


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value a factor such that any two values of two factors meet in one of them at least.

    A drop-in for `itertools.product`: most faults take one value, or two that meet (Kuhn et al., IEEE TSE 2004). Greedy
    and deterministic: each next combination brings the most pairs together that have not met.
    """
    rows = list(product(*(range(len(values)) for values in factors)))
    places = list(combinations_with_replacement(range(len(factors)), 2))
    pairs = {row: {(i, row[i], j, row[j]) for i, j in places} for row in rows}
    unmet = set().union(*pairs.values())
    chosen = []
    while unmet:
        best = max(rows, key=lambda row: len(pairs[row] & unmet))
        chosen.append(best)
        unmet -= pairs[best]
    return [tuple(values[i] for values, i in zip(factors, row, strict=True)) for row in chosen]
