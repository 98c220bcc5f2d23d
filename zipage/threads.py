"""How the threads of an operation wait for each other on a CPU.

OpenMP's threads spin for milliseconds before they sleep, which is harmless on cores of their own and ruinous on cores
that others use too: the spinning thread takes the time of the one that it waits for. OpenMP reads how they should wait
from the environment, once, when torch is loaded. So `zipage` is imported before torch wherever that is in our hands.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import cache

logger = logging.getLogger(__name__)

CHOSEN_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user says how threads wait."""

_spins = "torch" in sys.modules and not any(name in os.environ for name in CHOSEN_BY)
"""Whether it is too late to say it in this process."""

if not any(name in os.environ for name in CHOSEN_BY):
    os.environ["OMP_WAIT_POLICY"] = "passive"  # of this process, if torch is still to come, and of its children


@cache
def warn_of_spinning() -> None:
    """Say once that threads spin, where they do: to be called before work on a CPU."""
    import torch

    if _spins and torch.get_num_threads() > 1:
        logger.warning(
            "torch was imported before zipage, so its %d CPU threads spin while they wait, and beside other programs "
            "the engine may become many times slower: import zipage first, or set OMP_WAIT_POLICY=passive",
            torch.get_num_threads(),
        )
