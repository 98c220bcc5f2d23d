"""Which replica of a fleet gets a request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from experiments.errors import UsageError
from experiments.serving.prompts import Asked


class Loaded(Protocol):
    """A replica as a router sees it."""

    left: int
    """Tokens that it still has to compute for what it was given: of prompts, and of outputs as they were asked for."""


Router = Callable[[Asked, Sequence[Loaded]], int]
"""A request and the replicas -> the number of one."""


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, request: Asked, replicas: Sequence[Loaded]) -> int:
        chosen = self._next % len(replicas)
        self._next += 1
        return chosen


class LeastTokens:
    """The one with the fewest tokens left; the first of several."""

    def __call__(self, request: Asked, replicas: Sequence[Loaded]) -> int:
        return min(range(len(replicas)), key=lambda number: replicas[number].left)


class PrefixAware:
    """The one that was given most of the prompt's first blocks, unless it is far busier than the least busy.

    Args:
        most: times the tokens of the least busy one that it may have left, beside those of `slack` requests like this.
        blocks: ids that are remembered of each replica, the latest.
    """

    def __init__(self, most: float = 1.5, slack: int = 4, blocks: int = 4096) -> None:
        self._most, self._slack, self._blocks = most, slack, blocks
        self._seen: dict[int, OrderedDict[int, None]] = {}

    def __call__(self, request: Asked, replicas: Sequence[Loaded]) -> int:
        least = LeastTokens()(request, replicas)
        matched = [self._matched(request, number) for number in range(len(replicas))]
        chosen = max(range(len(replicas)), key=lambda number: (matched[number], -replicas[number].left))
        allowed = self._most * replicas[least].left + self._slack * (request.prompt_tokens + request.output_tokens)
        if not matched[chosen] or replicas[chosen].left > allowed:
            chosen = least
        seen = self._seen.setdefault(chosen, OrderedDict())
        for block in request.blocks:
            seen[block] = None
            seen.move_to_end(block)
        while len(seen) > self._blocks:
            seen.popitem(last=False)
        return chosen

    def _matched(self, request: Asked, number: int) -> int:
        seen, count = self._seen.get(number, {}), 0
        for block in request.blocks:
            if block not in seen:
                break
            count += 1
        return count


ROUTERS: dict[str, Callable[[], Router]] = {
    "round_robin": RoundRobin,
    "least_tokens": LeastTokens,
    "prefix_aware": PrefixAware,
}


def find_router(name: str) -> Router:
    """A fresh one. Raises UsageError for an unknown name."""
    if name not in ROUTERS:
        raise UsageError(f"--router {name}: must be one of {', '.join(ROUTERS)}")
    return ROUTERS[name]()
