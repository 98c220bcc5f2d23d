"""The requests of a load: of lengths that are drawn, or of a trace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.errors import UsageError
from experiments.paths import ROOT
from experiments.running.traces import read_lengths
from experiments.serving.prompts import Asked
from experiments.workloads.lengths import generate


def requests_of(
    path: Path, lengths: Mapping[str, Any], given: str | None, seed: int, *, timed: bool
) -> tuple[list[Asked], bool]:
    """The requests of a load, and whether they are of `scenario.path`. Those of lengths are due at once.

    Args:
        path: of the load's file.
        lengths: {trace: FILE, count: N, longest: N}: the requests of a trace, its first `count`, what is longer cut;
            without FILE that of `scenario.path`. Or options of the workload `lengths`.
        given: `scenario.path`.
        seed: of drawn lengths.
        timed: they arrive when the trace says.

    Raises:
        UsageError: an option is unknown or out of range, or the trace can't be read, is too short or has no times.
    """
    if "trace" not in lengths:
        try:
            found = generate(seed, **lengths)
            return [Asked(0.0, problem.prompt_tokens, problem.output_tokens) for problem in found], False
        except (TypeError, ValueError) as error:
            raise UsageError(f"{path}: lengths: {error}") from error
    unknown = sorted(set(lengths) - {"trace", "count", "longest"})
    if unknown:
        raise UsageError(f"{path}: lengths: unknown option {unknown[0]}; known: trace, count, longest")
    name = given or lengths["trace"]
    if name is None:
        raise UsageError(f"{path}: takes a trace: scenario.path=FILE")
    where = name if Path(name).expanduser().is_file() or given else str(ROOT / name)
    field = "scenario.path" if given else "lengths.trace"
    try:
        traced = read_lengths(where, lengths.get("count"), lengths.get("longest"), field=field, options="lengths.")
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    if not traced:
        raise UsageError(f"{path}: {field}={name}: holds no request that was answered")
    if timed and traced[0].arrival is None:
        raise UsageError(f"{path}: {field}={name}: holds lengths alone, no arrivals: take a trace with times")
    requests = [Asked(one.arrival or 0.0, one.prompt_tokens, one.output_tokens, one.hash_ids) for one in traced]
    return requests, given is not None


def refuse_unused(trace: str | None, used: bool) -> None:
    """Raise a UsageError for a `scenario.path` that no load took."""
    if trace is not None and not used:
        raise UsageError(f"scenario.path={trace}: none of the loads takes a trace; leave it out")
