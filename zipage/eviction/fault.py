"""What went wrong in a policy, in one line that names its file."""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from zipage.checks import shown

NOT_OWN = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))

FAULTS = (Exception, SystemExit)
"""What code of a policy's may raise at the cost of what it was called for, and no more."""


def described(error: BaseException, place: str | None = None) -> str:
    """Type and text of an error in one line, and the place."""
    text = _named(error, " ".join(_said(error).split()))
    return text if place is None else f"{text} ({place})"


def first_line(error: BaseException) -> str:
    """Type of an error and the first line of its text."""
    return _named(error, _said(error).partition("\n")[0])


def _named(error: BaseException, text: str) -> str:
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def _said(error: BaseException) -> str:
    """The text of an error; empty where it cannot say it."""
    try:
        return str(error)
    except FAULTS:
        return ""


def place_in(error: BaseException, files: Collection[str]) -> str | None:
    """The innermost line of an error's traceback in one of the files, as `relative` says it; None: there is none."""
    return _innermost(error, lambda file: file in files)


def files_of(policy: type) -> list[str]:
    """The files of a policy's class and of those that it derives from, up to the base of all policies."""
    modules = [cls.__module__ for cls in policy.__mro__ if cls.__module__ not in ("zipage.eviction.policy", "abc")]
    return [file for module in modules if (file := getattr(sys.modules.get(module), "__file__", None))]


def relative(file: str, line: int) -> str:
    """A line of a file; the path is relative to the working folder where the file lies in it."""
    path = os.path.relpath(file)
    return f"{file if path.startswith(os.pardir) else path}, line {line}"


@contextmanager
def named(policy: str, failed: str) -> Iterator[None]:
    """Around code of a policy's: whatever it raises becomes a ValueError that names the policy and the line.

    A ValueError of this package, which says it all, stays.

    Args:
        failed: what it could not be, such as "loaded".
    """
    try:
        yield
    except FAULTS as error:
        if isinstance(error, ValueError) and not _is_own(traceback.extract_tb(error.__traceback__)[-1].filename):
            raise
        # A SyntaxError tells its place itself.
        place = None if isinstance(error, SyntaxError) else _innermost(error, _is_own)
        raise ValueError(f"policy {shown(policy)} cannot be {failed}: {described(error, place)}") from error


def _innermost(error: BaseException, wanted: Callable[[str], bool]) -> str | None:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if wanted(frame.filename)]
    return relative(frames[-1].filename, frames[-1].lineno or 0) if frames else None


def _is_own(file: str) -> bool:
    """Whether a file is neither Python's nor installed nor of this package."""
    here = os.path.dirname(os.path.dirname(__file__))
    return not file.startswith(("<", here, *NOT_OWN))
