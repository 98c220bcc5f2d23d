"""How much room to keep for those that run: the scheduler alone, under loads that do not fit the pool.

python -m tests.benchmarks.growth --out FILE    # writes a JSON record

A step is taken to last as long as one of Qwen3-8B's shape on an H100: 6.6 ms, 147,456 bytes of each entry read at
2.7 TB/s, and 23 us for each token that is not decoded. These three were measured; what follows from them is not.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from pathlib import Path
from statistics import mean

from tests.scheduling import make_request, make_scheduler

STEP, ENTRY, PREFILL = 6.6e-3, 147_456 / 2.7e12, 23e-6
"""Seconds of a step, of an entry that it reads, and of a token that it prefills."""
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


def simulate(lengths: list[tuple[int, int]], block_size: int, growth: int) -> dict[str, float | int]:
    scheduler = make_scheduler(
        POOL // block_size, block_size, caching=False, growth=growth, max_num_seqs=128, max_num_batched_tokens=8192
    )
    requests = [make_request(f"r{i}", prompt, output) for i, (prompt, output) in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    seconds, prefilled, batches, queued = 0.0, 0, [], 0
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        scheduler.advance(plan)
        chunks = sum(chunk.num_tokens for chunk in plan.prefills)
        seconds += STEP + ENTRY * sum(request.cache_len for request in plan.decodes) + PREFILL * chunks
        prefilled += chunks
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
    record = {
        "what": "simulated throughput of full KV in a short pool, by the room kept for growth",
        "command": "python -m tests.benchmarks.growth",
        "commit": args.commit,
        "python": platform.python_version(),
        "seconds": {"step": STEP, "entry": ENTRY, "prefilled_token": PREFILL},
        "pool_entries": POOL,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
