"""What engines in several processes have in common: what they refuse, and what each process takes over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from zipage.eviction import registry
from zipage.models.loading.share import is_sharing
from zipage.processes import Log, send_logs

PACKAGE = "zipage"
"""The logger whose records come from other processes too."""


class Inherited(NamedTuple):
    """What a process that computes for this one takes over from it.

    Attributes:
        policies: where the registered policies are found, by name.
        num_threads: of torch on the CPU.
        log_level: of the records to send back.
    """

    policies: dict[str, str]
    num_threads: int
    log_level: int

    @classmethod
    def by(cls, size: int) -> Inherited:
        """For each of `size` processes, which share this one's threads."""
        level = logging.getLogger(PACKAGE).getEffectiveLevel()
        return cls(registry.locations(), max(1, torch.get_num_threads() // size), level)

    def take_over(self, send: Callable[[Log], None]) -> None:
        """In such a process; `send` gets the records of its log."""
        send_logs(PACKAGE, self.log_level, send)
        torch.set_num_threads(self.num_threads)
        registry.POLICIES |= self.policies


def check_spread(kind: str, option: str, size: int, policy: str) -> None:
    """Raise a ValueError where processes that load the model themselves cannot do as this one would.

    Args:
        kind: what they are called.
        option: that asks for them, with its value `size`.
        policy: that they are to find.
    """
    if is_sharing():
        raise ValueError(
            f"{option}={size}: {kind} load the model in processes of their own, which share_model does not reach: "
            "leave it out"
        )
    if registry.location(registry.find(policy)) is None:
        raise ValueError(
            f"policy={policy!r}: it is defined in the program itself, which the processes of {option}={size} do not "
            "run: put it into a module, and give 'module:Class'"
        )


def count_gpus(device: str, needed: int, option: str, asked: str) -> int:
    """GPUs that processes may take; 0: they compute on the CPU. This does not begin to use them.

    Args:
        device: "auto", "cpu" or "cuda".
        needed: GPUs of all of them.
        option: that asks for the processes.
        asked: by which values, as an error shall begin.

    Raises:
        ValueError: there are too few.
    """
    count = 0 if device == "cpu" else torch.cuda.device_count()
    if not count and device != "cuda":
        return 0
    if count < needed:
        raise ValueError(
            f"{asked} needs {needed} GPUs, but {count} are visible: lower {option}, or make more visible by "
            "CUDA_VISIBLE_DEVICES"
        )
    return count
