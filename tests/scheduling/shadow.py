"""What the entries of a request should be: values that tell what each was computed from, and who survives."""

from __future__ import annotations

import random

from zipage.scheduling.request import Request


def after(previous: int, token: int) -> int:
    """An entry computed from an unbroken text: it stands for the whole prefix that ends with it."""
    return hash((previous, token))


def after_eviction(position: int, token: int, attended: list[int]) -> int:
    """An entry computed after an eviction: it stands for its position and all the entries it attended to."""
    return hash((position, token, tuple(attended)))


class Shadow:
    """One request's entries as they should be: a plain list that knows of no blocks."""

    def __init__(self) -> None:
        self.entries: list[int] = []
        self.rounds = 0
        self.num_computed = 0
        self.num_tokens = 0
        self.slot = -1

    def forget(self) -> None:
        self.entries = []
        self.num_computed = 0
        self.slot = -1


def survivors(request: Request, n: int, rounds: int) -> list[int]:
    """Places that a fabricated policy keeps: a function of request, round and rule."""
    rule = request.rule
    page = rule.policy.page
    rng = random.Random(request.number * 1009 + rounds)
    first = -(-rule.protected // page)
    last = -(-rule.recent // page)
    if rule.drops_blocks:
        last = max(last, 1)
    pages = n // page
    middle = range(first, pages - last)
    chosen = sorted(rng.sample(middle, rule.keep // page - first - last))
    kept_pages = [*range(first), *chosen, *range(pages - last, pages)]
    return kept_pages if page == 1 else [p * page + i for p in kept_pages for i in range(page)]
