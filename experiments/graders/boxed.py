"""Final answers as LaTeX marks them."""

from __future__ import annotations


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} or \\fbox{...} of a text holds, braces matched; None where there is none."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position].strip()
    return None
