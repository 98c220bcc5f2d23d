"""What a replica and the process that made it tell each other, as plain data."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from zipage.config import EngineConfig
from zipage.engine.interface import TokenDelta
from zipage.spread import Inherited
from zipage.stats import EngineStats, EventStats, StepStats

# To a replica: first `Start`, which it answers with a `CoreSpec`, then any of the others, among them `PromptOrder`.


class Start(NamedTuple):
    """Build a core.

    Attributes:
        config: of the one replica.
    """

    config: EngineConfig
    inherited: Inherited


class Abort(NamedTuple):
    """Withdraw a prompt; the last deltas come in a `Report`, then a `Reply` of None."""

    request_id: str


class Stop(NamedTuple):
    """End a sample. The `Reply` is its metrics, or None where it had ended before."""

    request_id: str
    index: int


class Look(NamedTuple):
    """The `Reply` is a `Snapshot`."""


class ReadEntries(NamedTuple):
    """The `Reply` is what each head holds of a sample: `HeldEntries`, or None."""

    request_id: str
    index: int


class Logits(NamedTuple):
    """The `Reply` is the logits, on the host."""

    hidden: Tensor


# From a replica, beside `zipage.processes.Log` and, as the last of one that failed, `zipage.processes.Failure`


class Report(NamedTuple):
    """What was done since the last report, and the counters and gauges after it."""

    deltas: list[TokenDelta]
    steps: list[StepStats]
    events: list[EventStats]
    stats: EngineStats


class Reply(NamedTuple):
    """The answer to a question, or the ValueError that it deserved."""

    value: Any
    error: ValueError | None = None
