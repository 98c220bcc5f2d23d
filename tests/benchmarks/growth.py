"""How much room to keep for those that run, and what else a short pool has to give, by the scheduler alone.

python -m tests.benchmarks.growth --out FILE    # writes a JSON record

A step is taken to last as long as one of Qwen3-8B's shape on an H100: 6.6 ms, 147,456 bytes of each entry read at
2.7 TB/s, and 23 us for each token that is not decoded. These three were measured; what follows from them is not.

Two things that the engine does not do are tried beside: the entries of a preempted request copied back from the host at
25 GB/s instead of computed anew, and of those that wait the one with the fewest tokens first instead of the oldest.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections import deque
from itertools import product
from pathlib import Path
from statistics import mean

from tests.scheduling.fabricated import make_request, make_scheduler
from zipage.scheduling.headroom import HEADROOM

STEP, ENTRY, PREFILL, COPIED = 6.6e-3, 147_456 / 2.7e12, 23e-6, 147_456 / 25e9
"""Seconds of a step, of an entry that it reads, of a token that it prefills, and of one that is copied back."""
POOL = 90_000
"""Entries."""
ROOMS = (0, 32, 64, 128, 256, 512)


def loads() -> dict[str, list[tuple[int, int]]]:
    """Lengths of prompts and outputs."""
    rng = random.Random(0)
    varied = [
        (rng.randrange(64, 400), min(3900, int(rng.lognormvariate(7.3, 0.7)) + 16))  # median 1,480 tokens
        for _ in range(256)
    ]
    return {"128 of 128 + 3,072": [(128, 3072)] * 128, "256 of varied lengths": varied}


def simulate(
    lengths: list[tuple[int, int]], block_size: int, growth: int, copied: bool = False, fewest_first: bool = False
) -> dict[str, float | int]:
    scheduler = make_scheduler(
        POOL // block_size, block_size, caching=False, headroom=growth, max_num_seqs=128, max_num_batched_tokens=8192
    )
    requests = [make_request(f"r{i}", prompt, output) for i, (prompt, output) in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    seconds, prefilled, batches, queued = 0.0, 0, [], 0
    while scheduler.has_unfinished:
        if fewest_first:
            scheduler.waiting = deque(sorted(scheduler.waiting, key=lambda r: (r.num_tokens, r.number)))
        plan = scheduler.schedule()
        scheduler.advance(plan)
        seconds += STEP + ENTRY * sum(request.cache_len for request in plan.decodes)
        for request, count in plan.prefills:
            seconds += count * (COPIED if copied and request.num_preemptions else PREFILL)
            prefilled += count
        batches.append(len(plan.decodes))
        if scheduler.waiting:
            queued = len(batches)
        scheduler.update(plan, [7] * len(plan.sampled))
    return {
        "tokens_per_second": round(sum(output for _, output in lengths) / seconds),
        "steps": len(batches),
        "steps_after_the_queue": len(batches) - queued,
        "batch_after_the_queue": round(mean(batches[queued:]), 1),
        "prefilled": prefilled,
        "preemptions": sum(request.num_preemptions for request in requests),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    rows = []
    for load, lengths in loads().items():
        for block_size in (16, 256):
            for growth in ROOMS:
                row = {"load": load, "block_size": block_size, "growth": growth}
                rows.append(row | simulate(lengths, block_size, growth))
                print(" ".join(map(str, rows[-1].values())), flush=True)
    tried = []
    for load, lengths in loads().items():
        for copied, fewest_first in product((False, True), repeat=2):
            row = {"load": load, "copied": copied, "fewest_first": fewest_first}
            tried.append(row | simulate(lengths, 16, HEADROOM, copied, fewest_first))
            print(" ".join(map(str, tried[-1].values())), flush=True)
    record = {
        "what": "simulated throughput of full KV in a short pool, by the room kept for growth",
        "command": "python -m tests.benchmarks.growth",
        "commit": args.commit,
        "python": platform.python_version(),
        "seconds": {"step": STEP, "entry": ENTRY, "prefilled_token": PREFILL, "copied_token": COPIED},
        "pool_entries": POOL,
        "rows": rows,
        "tried": tried,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
