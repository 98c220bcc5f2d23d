"""Traces of real traffic: when each request arrived, how long it was, and which prefix it shared with others.

The columns say which format a file has. A `.csv` or `.jsonl` file may be compressed (.gz, .bz2, .xz).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

BLOCK = 512
"""Tokens that a hash id of Mooncake's traces stands for."""
HASHES = "hash_ids"
MOST_TOKENS = 10**8
"""No prompt and no output is that long: a larger number is a slip."""
MOST_SHOWN = 60
"""Characters of a wrong value."""
_OPEN: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request of a trace.

    Attributes:
        arrival: seconds after the start; None where the trace has no times.
        prompt_tokens, output_tokens: at least 1; None where the trace has no lengths.
        hash_ids: of the prompt's blocks of `BLOCK` tokens, in order, the last one perhaps in part. Blocks of one id
            hold the same tokens; tokens behind the last block are the request's own.
    """

    arrival: float | None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    hash_ids: tuple[int, ...] = ()

    def cut(self, longest: int | None) -> TracedRequest:
        """With a prompt and an output of at most so many tokens."""
        if longest is None or max(self.prompt_tokens, self.output_tokens) <= longest:
            return self
        prompt, output = min(self.prompt_tokens, longest), min(self.output_tokens, longest)
        return replace(self, prompt_tokens=prompt, output_tokens=output, hash_ids=self.hash_ids[: -(-prompt // BLOCK)])


@dataclass(frozen=True)
class Trace:
    """What a file holds.

    Attributes:
        requests: in order of arrival; in the file's where it has no times.
        failed: requests that were left out since they have no prompt or no output, as public traces log failed ones.
        more: columns beside the arrival, in the file's order.
    """

    requests: tuple[TracedRequest, ...]
    failed: int
    more: tuple[str, ...]


@dataclass(frozen=True)
class Format:
    """Which columns hold what.

    Attributes:
        arrival, prompt, output: columns; None where there are none.
        seconds: turns an arrival into seconds.
        public: times count from the first request, and requests without tokens are those that failed.
    """

    arrival: str | None
    prompt: str | None = None
    output: str | None = None
    seconds: Callable[[Any], float] = float
    public: bool = False

    @property
    def columns(self) -> list[str]:
        return [name for name in (self.arrival, self.prompt, self.output) if name is not None]


def _of_date(text: str) -> float:
    time = datetime.fromisoformat(text)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _of_milliseconds(value: Any) -> float:
    return float(value) / 1000


FORMATS = {
    "Azure": Format("TIMESTAMP", "ContextTokens", "GeneratedTokens", _of_date, public=True),
    "Mooncake": Format("timestamp", "input_length", "output_length", _of_milliseconds, public=True),
    "BurstGPT": Format("Timestamp", "Request tokens", "Response tokens", public=True),
    "arrivals with lengths": Format("arrival", "prompt_tokens", "output_tokens"),
    "arrivals alone": Format("arrival"),
    "lengths alone": Format(None, "prompt_tokens", "output_tokens"),
}
"""Name -> format; the first whose columns a file has is its own."""


def read_trace(name: str) -> Trace:
    """Read a file of any of `FORMATS`; one of JSON lines may also have a bare number a line, an arrival in seconds.

    Raises:
        ValueError: the file can't be read, fits no format, or holds a bad row, whose line is named.
    """
    try:
        path = Path(name).expanduser()
        stat = path.stat()
        return _read(path.absolute(), stat.st_mtime_ns, stat.st_size)
    except (OSError, EOFError, RuntimeError, lzma.LZMAError) as error:  # RuntimeError: ~ of whom nobody knows
        raise ValueError(f"can't be read ({getattr(error, 'strerror', None) or error})") from error


def read_lengths(
    path: str, count: int | None = None, longest: int | None = None, *, field: str = "path", options: str = ""
) -> list[TracedRequest]:
    """The requests of a trace that has lengths.

    Args:
        count: only the first `count`; None: all.
        longest: bound of a prompt and of an output, in tokens; what is longer is cut. None: none.
        field: by which users name the file.
        options: what stands before "count" and "longest" where they name them.

    Raises:
        ValueError: as `read_trace`; or an option is out of range, the trace has no lengths, or is shorter than `count`.
            The message begins with the field or the option.
    """
    for option, value in (("count", count), ("longest", longest)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{options}{option}={value!r}: must be a whole number of at least 1, or null")
    try:
        requests = read_trace(path).requests
    except ValueError as error:
        raise ValueError(f"{field}={path}: {error}") from error
    if requests and requests[0].prompt_tokens is None:
        raise ValueError(
            f"{field}={path}: holds arrivals alone, no lengths: name a workload whose questions arrive then, such as "
            "workload=lengths"
        )
    if count is not None and len(requests) < count:
        raise ValueError(f"{options}count={count}: the trace has {len(requests)} requests; ask for no more")
    return [request.cut(longest) for request in requests[:count]]


@lru_cache(maxsize=8)
def _read(path: Path, changed: int, size: int) -> Trace:
    """`changed` and `size` are of the file as it is: one that was edited is read again."""
    rows = _rows(path)
    try:
        number, first = next(rows)
    except StopIteration:
        raise ValueError("holds no request") from None
    form = _recognise(list(first))
    more = tuple(name for name in first if name != form.arrival)
    found = [_request(first, number, form), *(_request(row, number, form) for number, row in rows)]
    kept = [request for request in found if request is not None]
    if form.arrival is not None:
        kept.sort(key=lambda request: request.arrival)
    if form.public and kept:
        begin = kept[0].arrival
        kept = [TracedRequest(r.arrival - begin, r.prompt_tokens, r.output_tokens, r.hash_ids) for r in kept]
    return Trace(tuple(kept), len(found) - len(kept), more)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with the number of its line."""
    kinds = path.suffixes[-2:] if path.suffix in _OPEN else path.suffixes[-1:]
    if not kinds or kinds[0] not in (".csv", ".jsonl"):
        raise ValueError(f"must end in .jsonl or .csv, and in one of {', '.join(_OPEN)} where it is compressed")
    with _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        try:
            if kinds[0] == ".csv":
                table = csv.DictReader(file, strict=True)
                if table.fieldnames is not None:
                    _recognise(list(table.fieldnames))
                for row in table:
                    if any(more := row.pop(None, ())):
                        cells, columns = len(row) + len(more), len(table.fieldnames)
                        raise ValueError(f"line {table.line_num}: has {cells} cells for {columns} columns")
                    yield table.line_num, row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(line, number)
        except UnicodeDecodeError as error:
            raise ValueError(f"is not text in UTF-8 ({error.reason} at byte {error.start})") from error
        except csv.Error as error:
            raise ValueError(f"line {table.line_num}: is not CSV ({error})") from error


def _object(line: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: is not JSON ({error})") from error
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"arrival": value}
    if not isinstance(value, dict):
        raise ValueError(f"line {number}: must be a number, the arrival in seconds, or an object of a request")
    return value


def _recognise(columns: list[str]) -> Format:
    if twice := next((name for name in columns if name and columns.count(name) > 1), None):
        raise ValueError(f"has two columns {twice}: rename one")
    for form in FORMATS.values():
        if set(form.columns) <= set(columns):
            return form
    known = "; ".join(f"{', '.join(form.columns)} ({name})" for name, form in FORMATS.items())
    raise ValueError(f"has the columns {', '.join(columns) or 'of no name'}, which fit no known trace: {known}")


def _request(row: dict[str, Any], line: int, form: Format) -> TracedRequest | None:
    """None: it failed."""
    for column in form.columns:
        if row.get(column) is None:
            raise ValueError(f"line {line}: has no {column}")
    arrival = None if form.arrival is None else _arrival(row[form.arrival], line, form)
    if form.prompt is None or form.output is None:
        return TracedRequest(arrival)
    least = 0 if form.public else 1
    prompt, output = (_tokens(row[column], least, line, column) for column in (form.prompt, form.output))
    if not prompt or not output:
        return None
    return TracedRequest(arrival, prompt, output, _hash_ids(row.get(HASHES), prompt, line, form.prompt))


def _arrival(value: Any, line: int, form: Format) -> float:
    seconds = _number(value, form.seconds)
    if not 0 <= seconds < math.inf:
        unit = {_of_date: "a date and time", _of_milliseconds: "milliseconds"}.get(form.seconds, "seconds")
        raise ValueError(f"line {line}: {form.arrival}={_shown(value)}: must be {unit}, 0 or more")
    return seconds


def _tokens(value: Any, least: int, line: int, column: str) -> int:
    number = _number(value, float)
    if not (least <= number <= MOST_TOKENS and number.is_integer()):
        raise ValueError(
            f"line {line}: {column}={_shown(value)}: must be a whole number of at least {least} tokens, and of at most "
            f"{MOST_TOKENS:,}"
        )
    return int(number)


def _number(value: Any, read: Callable[[Any], float]) -> float:
    """NaN where it is none."""
    try:
        return math.nan if isinstance(value, bool) else read(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _hash_ids(value: Any, prompt: int, line: int, column: str) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise ValueError(f"line {line}: {HASHES}={_shown(value)}: must be a list of whole numbers")
    if len(value) > (blocks := -(-prompt // BLOCK)):
        raise ValueError(
            f"line {line}: {len(value)} {HASHES} for {column}={prompt}: it has {blocks} blocks of {BLOCK} tokens"
        )
    return tuple(value)
