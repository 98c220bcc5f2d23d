"""Thoughts: how much of them, as the chat template reads it, and apart from the answer: `<think>...</think>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from zipage.engine.chat_template import chosen_template, template_reads
from zipage.llm import LLM
from zipage.serve.errors import ApiError

BEGIN, END = "<think>", "</think>"
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
LEVEL, SWITCH = "reasoning_effort", "enable_thinking"
"""Variables of templates: an `Effort`; whether to think."""


def template_of(llm: LLM, chat_template: str | None) -> str | None:
    """The server's, or else the tokenizer's; None: there is none."""
    return chosen_template(chat_template, llm.get_tokenizer())


def with_effort(variables: Mapping[str, Any], effort: Effort, template: str | None) -> dict[str, Any]:
    """The variables of a template, and those that `effort` gives it of `LEVEL` and `SWITCH`, as it reads them.

    Raises:
        ApiError: the template can't tell this effort from others, or `variables` say another.
    """
    meant = {LEVEL: effort, SWITCH: effort != "none"}
    found = {name: value for name, value in meant.items() if template and template_reads(template, name)}
    if template and LEVEL not in found and (SWITCH not in found or effort != "none"):
        knows = f"knows no levels, but reads {SWITCH}: give 'none' or" if found else f"reads no {LEVEL}:"
        raise ApiError(400, f"{LEVEL}={effort!r}: the chat template {knows} leave it out", LEVEL)
    for name, value in found.items():
        if name in variables and variables[name] != value:
            raise ApiError(400, f"{LEVEL}={effort!r}: chat_template_kwargs has another {name}: give one of them", LEVEL)
    return {**variables, **found}


def marks_reasoning(template: str | None) -> bool:
    """Whether a chat template knows of marked thoughts."""
    return template is not None and (BEGIN in template or END in template)


class Splitter:
    """Splits the text of a sample, as it comes, into reasoning and content.

    A sample thinks from the start where its prompt ends with `<think>`, else where its text begins with it. Line breaks
    behind a mark belong to neither. What may be the beginning of a mark is held back.

    Args:
        prompt: as the template put it.
    """

    def __init__(self, prompt: str) -> None:
        self._thinks = prompt.rstrip().endswith(BEGIN)
        self._may_begin = not self._thinks
        self._strips = self._thinks
        self._held = ""

    def add(self, text: str, is_last: bool = False) -> tuple[str, str]:
        """More text; returns what became certain of reasoning and of content."""
        text, self._held = self._held + text, ""
        if self._may_begin:
            start = text.lstrip()
            if not is_last and BEGIN.startswith(start[: len(BEGIN)]) and len(start) < len(BEGIN):
                self._held = text
                return "", ""
            self._may_begin = False
            if start.startswith(BEGIN):
                self._thinks, self._strips, text = True, True, start.removeprefix(BEGIN)
        if not self._thinks:
            return "", self._stripped(text)
        thought, mark, rest = text.partition(END)
        if not mark:
            thought, self._held = (text, "") if is_last else _before_mark(text)
            return self._stripped(thought), ""
        thought = self._stripped(thought)
        self._thinks, self._strips = False, True
        return thought, self._stripped(rest)

    def _stripped(self, text: str) -> str:
        if self._strips:
            text = text.lstrip("\n")
            self._strips = not text
        return text


def _before_mark(text: str) -> tuple[str, str]:
    """`text` without an end that may begin `</think>`, and that end."""
    for length in range(min(len(END) - 1, len(text)), 0, -1):
        if END.startswith(text[-length:]):
            return text[:-length], text[-length:]
    return text, ""
