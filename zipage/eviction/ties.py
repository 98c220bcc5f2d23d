"""Numbers that differ by rounding alone, made equal."""

from __future__ import annotations

from torch import Tensor

from zipage.eviction.event import EPSILON

STEPS = 2**12
"""Of one doubling."""


def tied(values: Tensor) -> Tensor:
    """The logarithm of `values` (>= 0) in steps of 2^-12 doublings: same order, ties where they differ by less.

    In a model's first layer, equal tokens have equal values and, up to their rotation, equal keys; what a matrix
    product leaves of that depends on the batch. Tied, the younger stays, whatever the batch.
    """
    return tied_logs(values.clamp_min(EPSILON).log2())


def tied_logs(values: Tensor) -> Tensor:
    """The same of what are logarithms already."""
    return (values * STEPS).round()
