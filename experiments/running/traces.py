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
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

BLOCK = 512
"""Tokens that a hash id of Mooncake's traces stands for."""
HASHES = "hash_ids"
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
    path = Path(name).expanduser()
    try:
        stat = path.stat()
        return _read(path.absolute(), stat.st_mtime_ns, stat.st_size)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"can't be read ({getattr(error, 'strerror', None) or error})") from error


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
                    row.pop(None, None)
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
    except ValueError as error:
        raise ValueError(f"line {number}: is not JSON ({error})") from error
    if isinstance(value, int | float):
        return {"arrival": value}
    if not isinstance(value, dict):
        raise ValueError(f"line {number}: must be a number, the arrival in seconds, or an object of a request")
    return value


def _recognise(columns: list[str]) -> Format:
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
    try:
        seconds = form.seconds(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        unit = {_of_date: "a date and time", _of_milliseconds: "milliseconds"}.get(form.seconds, "seconds")
        raise ValueError(f"line {line}: {form.arrival}={value!r}: must be {unit}, 0 or more")
    return seconds


def _tokens(value: Any, least: int, line: int, column: str) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (number >= least and number.is_integer()):
        raise ValueError(f"line {line}: {column}={value!r}: must be a whole number of at least {least} tokens")
    return int(number)


def _hash_ids(value: Any, prompt: int, line: int, column: str) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise ValueError(f"line {line}: {HASHES}={value!r}: must be a list of whole numbers")
    if len(value) > (blocks := -(-prompt // BLOCK)):
        raise ValueError(
            f"line {line}: {len(value)} {HASHES} for {column}={prompt}: it has {blocks} blocks of {BLOCK} tokens"
        )
    return tuple(value)
