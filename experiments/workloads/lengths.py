"""Requests of given lengths and random words, for throughput and latency alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from random import Random

from experiments.running.traces import read_lengths
from experiments.workloads.problem import Problem

_WORDS = """
amber anchor apple autumn basket beacon birch bottle bridge butter candle canyon carpet castle cedar cherry circle cloud
coffee copper corner cotton crystal desert dragon eagle ember engine falcon feather fiddle forest fossil garden ginger
glacier granite hammer harbor hazel helmet honey island jacket jungle kettle ladder lantern lemon linen maple marble
meadow mirror morning mountain needle ocean olive orange orchard oyster paper pebble pepper pillow planet pocket quartz
rabbit ribbon river rocket saddle sailor shadow silver spider spring stone sugar summer temple thunder timber tunnel
valley velvet violet walnut whistle willow window winter yellow
"""
WORDS = _WORDS.split()


def generate(
    seed: int,
    count: int = 64,
    distribution: str = "fixed",
    prompt_tokens: int = 512,
    output_tokens: int = 512,
    sigma: float = 0.5,
    longest: int = 32_768,
    run: str | None = None,
    path: str | None = None,
) -> Iterator[Problem]:
    """Requests whose prompts have an exact number of tokens and that ask for an exact number of output tokens.

    The outputs are that long with `sampling.ignore_eos=true`. No two prompts begin alike, so nothing is shared.

    Args:
        seed: of the words and of drawn lengths.
        count: requests.
        distribution: "fixed": every length as given; "lognormal": the lengths given are the medians; "recorded": the
            lengths of the first samples in the record of `run`, in its order; "trace": those of requests drawn from
            the table `path`, none twice.
        prompt_tokens, output_tokens: tokens.
        sigma: standard deviation of the logarithm of a lognormal length.
        longest: bound of a lognormal or traced length, in tokens.
        run: folder of a finished run.
        path: file of a trace with lengths (see `experiments.running.traces`); workload=trace takes its requests as
            they come, with their shared prefixes.

    Raises:
        ValueError: an option is out of range, or the run or the trace can't be read or is shorter than `count`.
    """
    for name, value in (("count", count), ("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value}: must be a whole number of at least 1")
    if not 0 <= sigma < math.inf or longest < 1:
        raise ValueError(f"sigma={sigma}, longest={longest}: must be at least 0 and at least 1")
    random = Random(seed)
    if distribution == "fixed":
        lengths = [(prompt_tokens, output_tokens)] * count
    elif distribution == "lognormal":
        medians = (prompt_tokens, output_tokens)
        lengths = [tuple(_draw(random, median, sigma, longest) for median in medians) for _ in range(count)]
    elif distribution == "recorded":
        lengths = _recorded(run, count)
    elif distribution == "trace":
        lengths = random.sample(_traced(path, count, longest), count)
    else:
        raise ValueError(f"distribution={distribution}: must be fixed, lognormal, recorded or trace")
    return _problems(lengths, random)


def _problems(lengths: list[tuple[int, int]], random: Random) -> Iterator[Problem]:
    for number, (prompt, output) in enumerate(lengths):
        # A word is a token or more, so there is always enough to cut the prompt from.
        text = " ".join([f"{number}", *random.choices(WORDS, k=prompt)])
        yield Problem(f"{number:05d}", text, gold="", prompt_tokens=prompt, output_tokens=output)


def _draw(random: Random, median: int, sigma: float, longest: int) -> int:
    return max(1, min(longest, round(median * math.exp(min(700.0, random.gauss(0.0, sigma))))))


def _recorded(run: str | None, count: int) -> list[tuple[int, int]]:
    import pyarrow.parquet

    from experiments.records import REQUESTS, table_path

    if run is None:
        raise ValueError("run=None: must be given with distribution=recorded: the folder of a finished run")
    try:
        columns = ["prompt_tokens", "output_tokens"]
        rows = pyarrow.parquet.read_table(table_path(Path(run).expanduser(), REQUESTS), columns=columns).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"run={run}: its {REQUESTS} can't be read ({' '.join(str(error).split())[:200]})") from error
    lengths = [(row["prompt_tokens"], row["output_tokens"]) for row in rows if row["output_tokens"]]
    if len(lengths) < count:
        raise ValueError(f"count={count}: the run has {len(lengths)} answered samples; ask for no more")
    return lengths[:count]


def _traced(path: str | None, count: int, longest: int) -> list[tuple[int, int]]:
    if path is None:
        raise ValueError("path=None: must be given with distribution=trace: the file of a trace")
    requests = read_lengths(path, longest=longest)
    if len(requests) < count:
        raise ValueError(f"count={count}: the trace has {len(requests)} requests; ask for no more")
    return [(request.prompt_tokens, request.output_tokens) for request in requests]
