"""The gold answer of an item, in the ways data sets write it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from experiments.graders.boxed import last_boxed

NULL = "null"
NOTES = re.compile(r"<<[^<>]*>>")
ONLY_BOX = re.compile(r"\$*\\boxed\{[^{}]*\}\$*")


def gold_answer(row: Mapping[str, Any], answer: str, solution: str | None = None) -> str | None:
    """The last \\boxed{} of the field `solution` where there is one, else the field `answer`.

    Of an answer written as "work #### 18" the part after the last marks counts. A list is several golds, one a line;
    null ones among them are left out.

    Returns:
        The gold, or None where the item has neither or both are null.

    Raises:
        ValueError: the answer can't stand as text; says what it is.
    """
    worked = row.get(solution) if solution is not None else None
    boxed = None if worked is None else last_boxed(str(worked))
    if boxed is not None:
        return boxed
    found = row.get(answer)
    golds = [gold for gold in (found if isinstance(found, list) else [found]) if unfit(gold) != NULL]
    for gold in golds:
        if reason := unfit(gold):
            raise ValueError(reason)
    if isinstance(found, list):
        return "\n".join(" ".join(str(gold).split()) for gold in golds) or None
    if not golds:
        return None
    return str(found).rpartition("####")[2].strip()


def worked_solution(row: Mapping[str, Any], answer: str, solution: str | None = None) -> str | None:
    """The field `solution`, else what stands before the marks in an answer written as "work #### 18", without the notes
    that GSM8K makes for a calculator ("<<48/2=24>>"). None where the item has neither, or only the answer in a box.
    """
    worked = row.get(solution) if solution is not None else None
    if isinstance(worked, str) and worked.strip() and not ONLY_BOX.fullmatch(worked.strip()):
        return worked.strip()
    text, marks, _ = str(row.get(answer)).rpartition("####")
    return NOTES.sub("", text).strip() or None if marks else None


def unfit(value: Any) -> str | None:
    """Why a value can't stand as text: a list, a mapping or bytes would stand there as Python writes them."""
    if value is None or value != value:  # NaN, which data frames put for what is not there
        return NULL
    kinds = {list: "a list", Mapping: "a mapping", bytes: "bytes"}
    return next((f"{what}, not a text or number," for kind, what in kinds.items() if isinstance(value, kind)), None)
