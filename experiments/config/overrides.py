"""Overrides that mean what was written.

Hydra reads `1.10` as a number, and a field of text would keep the number's own text, "1.1". So what is meant for such a
field is put in quotes before Hydra sees it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from antlr4.error.Errors import LexerNoViableAltException, RecognitionException
from hydra.core.override_parser.overrides_parser import create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser

CHOOSING = ("choice", "sort", "shuffle", "tag", "str")
"""Hydra's functions whose arguments are values."""

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
"""After a backslash in double quotes, as in YAML."""


def as_written(override: str, is_text: Callable[[str], bool]) -> str:
    r"""The override such that fields of text get the text that was written.

    Numbers and booleans meant for them are quoted, and in double quotes `\n`, `\t`, `\r` and `\\` are what they are in
    YAML; single quotes take all as it stands. `null` stays null. Anything else comes back unchanged.

    Args:
        is_text: whether the option of that dotted name is text, or a list of texts.
    """
    tree = _parsed(override, "override", OverrideLexer.DEFAULT_MODE)
    if tree is None or tree.value() is None:
        return override
    visitor = HydraOverrideVisitor(create_functions())
    for primitive, option in reversed([*_primitives(tree.value(), tree.key().getText())]):
        if not is_text(option):
            continue
        read, begin, end = visitor.visitPrimitive(primitive), primitive.start.start, primitive.stop.stop + 1
        if isinstance(read, int | float):
            override = override[:begin] + _in_quotes(override[begin:end].strip()) + override[end:]
        elif isinstance(read, QuotedString) and read.quote == Quote.double and "\\" in read.text:
            text = re.sub(r"\\([ntr\\])", lambda escape: ESCAPES[escape[1]], read.text)
            override = override[:begin] + _in_quotes(text) + override[end:]
    return override


def quoted(text: str) -> str:
    """The text as the value of an override: in quotes where Hydra would read anything else."""
    tree = _parsed(text, "primitive", OverrideLexer.VALUE_MODE)
    bare = tree is not None and HydraOverrideVisitor(create_functions()).visitPrimitive(tree) == text
    return text if bare else _in_quotes(text)


def looks_like_a_scalar(text: str) -> bool:
    """Whether Hydra reads the text as a number, a boolean or null."""
    tree = _parsed(text, "primitive", OverrideLexer.VALUE_MODE)
    read = "" if tree is None else HydraOverrideVisitor(create_functions()).visitPrimitive(tree)
    return read is None or isinstance(read, int | float)


def _in_quotes(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def _parsed(text: str, rule: str, mode: int) -> OverrideParser.OverrideContext | None:
    """The tree of Hydra's grammar for the whole text; None where it has none, or the text is nothing but space."""
    if not text.strip():
        return None
    lexer = OverrideLexer(InputStream(text))
    lexer.mode(mode)
    parser = OverrideParser(CommonTokenStream(lexer))
    for each in (lexer, parser):
        each.removeErrorListeners()
        each.addErrorListener(HydraErrorListener())
    try:
        tree = getattr(parser, rule)()
    except (HydraException, LexerNoViableAltException, RecognitionException):
        return None
    return tree if parser.getCurrentToken().type == -1 else None


def _primitives(tree: OverrideParser.ValueContext, option: str) -> Iterator[tuple[OverrideParser, str]]:
    """The single values in a tree, in order, and the option that each is meant for."""
    if isinstance(tree, OverrideParser.PrimitiveContext):
        yield tree, option
        return
    if isinstance(tree, OverrideParser.FunctionContext) and tree.ID().getText() not in CHOOSING:
        return
    if isinstance(tree, OverrideParser.DictKeyValuePairContext):
        option = f"{option}.{tree.dictKey().getText()}"
    for child in tree.getChildren():
        if hasattr(child, "getChildren"):
            yield from _primitives(child, option)
