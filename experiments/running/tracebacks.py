"""Tracebacks that an engine logs while it serves: in a file of the run's, not on the terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def kept_in(path: Path) -> Iterator[None]:
    """Write the tracebacks of logged errors to `path`, which is there only if there were any.

    Their lines are shown as before, except those that a request's error repeats (`in_output`).
    """

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{logging.Formatter('%(message)s').format(record)}\n")
            record.exc_info = record.exc_text = None
        return not getattr(record, "in_output", False)

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(keep)
