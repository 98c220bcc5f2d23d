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
        in_time: sum of the grades of the answers that kept the limits on TTFT and TPOT.
        loop_rate: share of the answered samples that end in a loop; None where it was not asked for or the record
            has no tokens.
    """

    problems: tuple[str, ...]
    sums: np.ndarray
    sizes: np.ndarray
    in_time: float
    loop_rate: float | None

    @property
    def means(self) -> np.ndarray:
        return self.sums / self.sizes


def read_samples(folder: Path, *, ttft: float | None = None, tpot: float | None = None, loops: bool = False) -> Samples:
    """Read the grades of a run.

    Args:
        ttft, tpot: limits in seconds for `in_time`; None sets none. A single token has no TPOT and keeps any.
        loops: read the tokens too, for `loop_rate`.

    Raises:
        OSError, ValueError: the record can't be read, or is not as it was written.
    """
    file = pq.ParquetFile(table_path(folder, REQUESTS))
    loops = loops and "output_token_ids" in file.schema_arrow.names  # an archived copy has no tokens
    names = ["prompt_id", "grade", "ttft", "tpot", *(["error", "output_token_ids"] if loops else [])]
    rows = file.read(columns=names, use_threads=False)
    encoded = rows["prompt_id"].combine_chunks().dictionary_encode()
    problems, places = _ascending(tuple(encoded.dictionary.to_pylist()))
    codes = places[encoded.indices.to_numpy()]
    grades, first, pace = (rows[name].to_numpy() for name in ("grade", "ttft", "tpot"))
    graded = ~np.isnan(grades)
    kept = graded if ttft is None else graded & (first <= ttft)
    kept = kept if tpot is None else kept & ~(pace > tpot)
    sums = np.bincount(codes[graded], grades[graded], len(problems))
    sizes = np.bincount(codes[graded], minlength=len(problems))
    if not sizes.all():
        problems = tuple(problem for problem, size in zip(problems, sizes, strict=True) if size)
        sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    return Samples(problems, sums, sizes, float(grades[kept].sum()), _loop_rate(rows) if loops else None)


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
