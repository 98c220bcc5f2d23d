"""NaN ranks: found on the device, reported once the host can read the count without waiting."""

from __future__ import annotations

import logging
from collections import deque

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class RankWatch:
    """Counts the compressions whose policy ranked an entry NaN: which entries those keep is left to chance.

    `look` may be called by another thread than `poll`.

    Args:
        strict: `look` says at once which they are, which waits for the device, and counts none.

    Attributes:
        failed: numbers of the orders counted so far.
    """

    def __init__(self, strict: bool) -> None:
        self.failed: list[int] = []
        self._strict = strict
        self._told: set[str] = set()
        self._pending: deque[tuple[str, list[int], Tensor, torch.cuda.Event | None]] = deque()

    @property
    def num_failed(self) -> int:
        return len(self.failed)

    def look(self, policy: str, numbers: list[int], failed: Tensor) -> list[str | None]:
        """Take note of compressions under `policy`: bool [R], on any device, whether a rank was NaN.

        Args:
            numbers: of their R orders.

        Returns:
            Of each compression None, or one line that says what is wrong with it. Always None unless strict.
        """
        if self._strict:
            return [_text(policy) if is_failed else None for is_failed in failed.tolist()]
        self._note(policy, numbers, failed)
        return [None] * len(failed)

    def _note(self, policy: str, numbers: list[int], failed: Tensor) -> None:
        if not failed.is_cuda:
            self._pending.append((policy, numbers, failed, None))
            return
        on_host = torch.empty(failed.shape, dtype=torch.bool, pin_memory=True).copy_(failed, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending.append((policy, numbers, on_host, copied))

    def poll(self, wait: bool = False) -> None:
        """Count what is known, and warn of each policy once. `wait` for what is under way too."""
        while self._pending:
            policy, numbers, flags, copied = self._pending[0]
            if copied is not None:
                if wait:
                    copied.synchronize()
                elif not copied.query():
                    return
            self._pending.popleft()
            failed = [number for number, flag in zip(numbers, flags.tolist(), strict=True) if flag]
            self.failed += failed
            if failed and policy not in self._told:
                self._told.add(policy)
                logger.warning("%s", _text(policy))


def _text(policy: str) -> str:
    return (
        f"policy {policy!r} ranked entries NaN, so what it keeps of them is left to chance: `rank` must be finite for "
        "every entry that is not in `event.forced`"
    )
