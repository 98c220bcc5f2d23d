"""Arrival times from a file."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

from experiments.errors import UsageError

COLUMN = "arrival"


def unread_columns(name: str) -> list[str]:
    """Columns of a trace, in order, that are not read: all except the arrival. None where the file can't be read."""
    path = Path(name).expanduser()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                found = csv.DictReader(file).fieldnames or []
            else:
                items = [json.loads(line) for line in file if line.strip()]
                found = dict.fromkeys(key for item in items if isinstance(item, dict) for key in item)
    except (OSError, ValueError):
        return []
    return [column for column in found if column != COLUMN]


def read_trace(name: str, count: int) -> list[float]:
    """The first `count` arrivals of a file in order of time, in seconds after the start.

    Args:
        name: a .jsonl file with a number a line or an object with "arrival", or a .csv file with a column "arrival".
        count: requests.

    Raises:
        UsageError: the file can't be read, holds something else, or holds too few times.
    """
    path = Path(name).expanduser()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                items = [json.loads(line) for line in file if line.strip()]
                values = [item[COLUMN] if isinstance(item, dict) else item for item in items]
            elif path.suffix == ".csv":
                values = [row[COLUMN] for row in csv.DictReader(file)]
            else:
                raise UsageError(f"scenario.path={name}: must end in .jsonl or .csv")
        times = sorted(map(float, values))
    except KeyError as error:
        raise UsageError(f"scenario.path={name}: an item has no {error}: the arrival in seconds") from error
    except OSError as error:
        raise UsageError(f"scenario.path={name}: can't be read ({error.strerror or error})") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"scenario.path={name}: must hold numbers, seconds ({error})") from error
    if any(not 0 <= time < math.inf for time in times):
        raise UsageError(f"scenario.path={name}: must hold times of 0 or more seconds")
    if len(times) < count:
        raise UsageError(
            f"scenario.path={name}: holds {len(times)} times for {count} requests: give limit={len(times)}"
        )
    return times[:count]
