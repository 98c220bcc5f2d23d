"""The hub's client, with what it logs of each retry left out: the last error says it all, in one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the client logs errors alone."""
    import huggingface_hub  # noqa: F401 - sets the level itself when it is first imported

    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
