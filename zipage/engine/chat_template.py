"""Which variables a chat template reads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache


def template_reads(template: str | Mapping[str, str], variable: str) -> bool:
    """Whether the variable's name stands in the code of a template, or of one of several by name; it can't be read
    otherwise. True of a template that is no Jinja: it is refused when it is rendered.
    """
    texts = [template] if isinstance(template, str) else template.values()
    return any(names is None or variable in names for names in map(_names, texts))


@lru_cache(maxsize=16)
def _names(template: str) -> frozenset[str] | None:
    """Names in a template's code that stand behind no dot; None: it is no Jinja."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = [(kind, text) for _, kind, text in Environment().lex(template) if kind != "whitespace"]
    except TemplateSyntaxError:
        return None
    before = [("", ""), *tokens]
    pairs = zip(before, tokens, strict=False)
    return frozenset(text for last, (kind, text) in pairs if kind == "name" and last != ("operator", "."))
