"""A sweep's plan in words: once what all arms share, then what sets each apart, in short names."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from experiments.config.options import short_names

WIDTH = 100
ALONE = ("policy", "policy.name")
"""Options that are named by their value alone."""
HEADS = ("model", "workload")
"""Arms of the same choices here have a heading of their own, with what they share."""

Options = dict[str, str]


def plan_lines(
    arms: Sequence[Sequence[str]], states: Sequence[str], width: int = WIDTH, numbers: Sequence[int] | None = None
) -> list[str]:
    """The plan, in lines of at most `width` columns.

    Args:
        arms: overrides of each arm.
        states: what stands before each, such as "done"; "" where it is still to be run.
        numbers: of the arms; None: from 1 on.
    """
    numbers = numbers or range(1, len(arms) + 1)
    plan, digits = _Plan(arms), max(3, len(str(max(numbers))))
    lines = _wrapped("  all arms: ", plan.said(plan.common), width)
    for group in plan.groups:
        if group.heading:
            own = plan.said(_without(group.shared, [*plan.common, *HEADS]))
            lines += _wrapped(f"  {group.heading}", "" if own == "-" else f": {own}", width)
        if group.evicting:
            lines += _wrapped("  those that evict: ", plan.said(group.evicting), width)
        for n in group.arms:
            lines += _wrapped(f"  {numbers[n]:{digits}} {states[n]:7} ", plan.said(plan.rest[n]), width)
    return lines


def arm_names(arms: Sequence[Sequence[str]]) -> list[str]:
    """What sets each arm apart from the others, as the plan has it, with its heading."""
    plan = _Plan(arms)
    names = {n: f"{group.heading} {plan.said(plan.rest[n])}".strip() for group in plan.groups for n in group.arms}
    return [names[n] for n in range(len(arms))]


@dataclass(frozen=True)
class _Group:
    """Arms of the same model and workload: their places, what they share, and what those that evict share besides."""

    heading: str
    arms: list[int]
    shared: Options
    evicting: Options


class _Plan:
    """
    Attributes:
        common: what all arms share.
        groups: in the order of the arms.
        rest: what each arm has for itself.
    """

    def __init__(self, arms: Sequence[Sequence[str]]) -> None:
        options = [_options(arm) for arm in arms]
        self.names = short_names(name for arm in options for name in arm)
        self.common, self.groups, self.rest = _shared(options), [], list(options)
        members: dict[tuple[str, ...], list[int]] = {}
        for n, arm in enumerate(options):
            members.setdefault(tuple(arm.get(head, "") for head in HEADS if head not in self.common), []).append(n)
        for key, numbers in members.items():
            shared = _shared([options[n] for n in numbers]) if len(members) > 1 else self.common
            evicts = [n for n in numbers if not _full(options[n])]
            evicting = {}
            if 1 < len(evicts) < len(numbers):
                evicting = _without(_shared([options[n] for n in evicts]), [*shared, *ALONE])
            heading = (", ".join(filter(None, key)) or "others") if len(members) > 1 else ""
            self.groups.append(_Group(heading, numbers, shared, evicting))
            for n in numbers:
                said = [*shared, *(evicting if n in evicts else ()), *(HEADS if heading else ())]
                self.rest[n] = _without(options[n], said)

    def said(self, options: Options) -> str:
        alone = [value for name, value in options.items() if name in ALONE]
        return " ".join([*alone, *(f"{self.names[n]}={v}" for n, v in options.items() if n not in ALONE)]) or "-"


def _options(arm: Sequence[str]) -> Options:
    pairs = (override.lstrip("+").partition("=") for override in arm)
    return {name: printable(value.strip("\"'")) for name, _, value in pairs}


def printable(text: str) -> str:
    r"""The text with control characters as Python writes them, such as `\n`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _shared(arms: Sequence[Options]) -> Options:
    return {name: value for name, value in arms[0].items() if all(arm.get(name) == value for arm in arms)}


def _without(options: Mapping[str, str], names: Iterable[str]) -> Options:
    names = set(names)
    return {name: value for name, value in options.items() if name not in names}


def _full(arm: Options) -> bool:
    return arm.get("policy.name", arm.get("policy", "full")) == "full"


def _wrapped(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(head + text, width, subsequent_indent=" " * 6, break_on_hyphens=False, drop_whitespace=True)
