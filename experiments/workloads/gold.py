"""The gold answer of an item, in the ways data sets write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.graders.boxed import last_boxed


def gold_answer(row: Mapping[str, Any], answer: str, solution: str | None = None) -> str | None:
    """The last \\boxed{} of the field `solution` where there is one, else the field `answer`.

    Of an answer written as "work #### 18" the part after the last marks counts. A list is several golds, one a line;
    null ones among them are left out.

    Returns:
        The gold, or None where the item has neither or both are null.
    """
    worked = row.get(solution) if solution is not None else None
    boxed = None if worked is None else last_boxed(str(worked))
    if boxed is not None:
        return boxed
    found = row.get(answer)
    if isinstance(found, list):
        return "\n".join(" ".join(str(gold).split()) for gold in found if gold is not None) or None
    if found is None:
        return None
    return str(found).rpartition("####")[2].strip()
