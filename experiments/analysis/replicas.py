"""Steps of several replicas, which overlap in time, as steps of one engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def at_once(replicas: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The sum over all replicas of what each told last, at each step.

    Args:
        replicas: [steps], of each step, in order of time.
        values: [steps], what was counted at the end of the step in its replica; 0 before its first.
    """
    replicas, values = np.asarray(replicas), np.asarray(values)
    changes = np.zeros_like(values)
    for replica in np.unique(replicas):
        own = np.flatnonzero(replicas == replica)
        changes[own] = np.diff(values[own], prepend=values.dtype.type(0))
    return changes.cumsum()
