"""Which chat template puts messages, and which variables it reads."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


def chosen_template(chat_template: str | None, tokenizer: Any) -> str | None:
    """The template that `apply_chat_template` takes for messages without tools; None: there is none.

    Args:
        chat_template: as its argument: Jinja, or the name of one of the tokenizer's.
        tokenizer: of `transformers`; None: there is none, or it has no template.
    """
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        return own.get(chat_template or "default", chat_template)
    return chat_template or own


def template_reads(template: str, variable: str) -> bool:
    """Whether a template reads a variable that is not of its own making: no loop's, no macro's, no keyword's name.

    True of a template that can't be compiled: it is refused when it is rendered.
    """
    names = _read_names(template)
    return names is None or variable in names


@lru_cache(maxsize=16)
def _read_names(template: str) -> frozenset[str] | None:
    """Names that a template looks up where none of its own has been set; None: it can't be compiled."""
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import Extension
    from jinja2.meta import TrackingCodeGenerator
    from jinja2.nodes import Impossible, Node, Scope
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which transformers adds to Jinja: the text inside is the assistant's."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    class Lookups(TrackingCodeGenerator):
        """Computes no constants: a template is a program, and `7 ** 7 ** 77` one that never ends."""

        def _output_child_to_const(self, *_: Any) -> str:
            raise Impossible

    lookups = Lookups(ImmutableSandboxedEnvironment(extensions=[Generation, "jinja2.ext.loopcontrols"]))
    lookups.optimizer = None
    try:
        lookups.visit(lookups.environment.parse(template))
    except (TemplateSyntaxError, RecursionError):
        return None
    return frozenset(lookups.undeclared_identifiers)
