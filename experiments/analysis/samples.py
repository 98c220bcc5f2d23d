"""What a comparison needs of each run's samples, read from as few columns as possible."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.analysis.loops import loop_rate
from experiments.records import REQUESTS, table_path


@dataclass(frozen=True)
class Samples:
    """The grades of a run.

    Attributes:
        problems: ids of those with a graded sample, ascending, [problems].
        sums, sizes: of the grades of each problem, and their number, [problems].
        in_time: sum of the grades of the answers that kept the limits on their times.
        kept, requests: prompts all of whose samples were answered within the limits, graded or not, and all prompts.
        loop_rate: share of the answered samples that end in a loop; None where it was not asked for or the record
            has no tokens.
    """

    problems: tuple[str, ...]
    sums: np.ndarray
    sizes: np.ndarray
    in_time: float
    kept: int
    requests: int
    loop_rate: float | None

    @property
    def means(self) -> np.ndarray:
        return self.sums / self.sizes


def read_samples(
    folder: Path,
    *,
    ttft: float | None = None,
    tpot: float | None = None,
    e2e: float | None = None,
    loops: bool = False,
) -> Samples:
    """Read the grades of a run.

    Args:
        ttft, tpot, e2e: limits in seconds for `in_time` and `kept`; None sets none. A single token has no TPOT and
            keeps any.
        loops: read the tokens too, for `loop_rate`.

    Raises:
        OSError, ValueError: the record can't be read, or is not as it was written.
    """
    file = pq.ParquetFile(table_path(folder, REQUESTS))
    loops = loops and "output_token_ids" in file.schema_arrow.names  # an archived copy has no tokens
    names = ["prompt_id", "grade", "error", "ttft", "tpot", "e2e", *(["output_token_ids"] if loops else [])]
    rows = file.read(columns=names, use_threads=False)
    encoded = rows["prompt_id"].combine_chunks().dictionary_encode()
    problems, places = _ascending(tuple(encoded.dictionary.to_pylist()))
    codes = places[encoded.indices.to_numpy()]
    grades, first, pace, end = (rows[name].to_numpy() for name in ("grade", "ttft", "tpot", "e2e"))
    graded = ~np.isnan(grades)
    in_time = np.ones(len(grades), bool) if ttft is None else first <= ttft
    in_time = in_time if tpot is None else in_time & ~(pace > tpot)
    in_time = in_time if e2e is None else in_time & (end <= e2e)
    late = np.unique(codes[~(in_time & rows["error"].is_null().to_numpy())])
    requests = len(problems)
    sums = np.bincount(codes[graded], grades[graded], len(problems))
    sizes = np.bincount(codes[graded], minlength=len(problems))
    if not sizes.all():
        problems = tuple(problem for problem, size in zip(problems, sizes, strict=True) if size)
        sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    right = float(grades[graded & in_time].sum())
    return Samples(problems, sums, sizes, right, requests - len(late), requests, _loop_rate(rows) if loops else None)


@lru_cache(maxsize=64)
def _ascending(problems: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
    """The ids in order, one object for all runs of the same data, and where each one went."""
    order = sorted(range(len(problems)), key=problems.__getitem__)
    places = np.empty(len(problems), np.int64)
    places[order] = np.arange(len(problems))
    return tuple(problems[i] for i in order), places


def _loop_rate(table: pa.Table) -> float | None:
    lists = table.filter(table["error"].is_null())["output_token_ids"].combine_chunks()
    tokens, bounds = lists.values.to_numpy(), lists.offsets.to_numpy()
    return loop_rate(tokens[begin:end] for begin, end in pairwise(bounds))
