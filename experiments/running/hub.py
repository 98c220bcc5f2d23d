"""The hub's client, with what it logs of each retry left out: the last error says it all, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from experiments.running.quiet import errors_alone


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the client logs errors alone."""
    import huggingface_hub  # noqa: F401 - sets the level itself when it is first imported

    with errors_alone("huggingface_hub"):
        yield
