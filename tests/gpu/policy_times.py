"""How long a compression of each policy takes on CUDA: Qwen3-8B's shape, random weights, budgets of 2,048 entries.

    python -m tests.gpu.policy_times --out FILE --commit $(git rev-parse HEAD)

Each of 16 requests is compressed three times, from 2,304 entries to 2,048 over all layers. Policies that read a
calibration get one of made-up numbers. Exits with 1 where the median of a policy is `MOST` ms or more.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.calibrations import CALIBRATED, MADE_UP, given
from tests.gpu.check_compressed_engine import versions
from tests.gpu.compression_times import QWEN3_8B, timed_compressions
from zipage import LLM, SamplingParams, share_model

MOST = 1.5
BUDGET, REQUESTS, EVENTS = 2048, 16, 3
POLICIES = (
    ("random", {}),
    ("snapkv", {}),
    ("r_kv", {}),
    ("zipage", {}),
    ("lagkv", {}),
    ("lazy_eviction", {}),
    ("q_filters", {}),
    ("triattention", {}),
    ("expected_attention", {"cov": "pairs"}),
    ("expected_attention", {"cov": "full"}),
    ("kvzap", {}),
    ("critical", {"base": "snapkv"}),
)


def measure(folder: Path, policy: str, chosen: dict, device: str) -> dict:
    """Milliseconds of a compression, the median of all but each request's first."""
    options = chosen | (MADE_UP if policy in CALIBRATED else {})
    llm = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        device=device,
        policy=policy,
        policy_options=given(options, policy, folder, "dummy"),
        budget_tokens=BUDGET,
        protection="none",
        async_compression=False,
        num_blocks=REQUESTS * 10 + 8,
        max_num_seqs=REQUESTS,
        max_model_len=2 * BUDGET,
        enable_prefix_caching=False,
    )
    spans = timed_compressions(llm)
    rng = random.Random(0)
    params = SamplingParams(temperature=0.6, max_tokens=256 * EVENTS, ignore_eos=True)
    for i in range(REQUESTS):
        llm.add_request([rng.randrange(1000) for _ in range(BUDGET + 12 * i)], params)
    while llm.has_unfinished_requests():
        llm.step()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) / n for n, begin, end in spans][REQUESTS:]
    llm.shutdown()
    median = statistics.median(times)
    row = {"policy": policy, "options": chosen, "ms": median, "most_ms": max(times), "times": len(times)}
    return row | {"ok": median < MOST}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the JSON record")
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    device = "cuda"
    begin, rows = time.perf_counter(), []
    record = {"what": "a compression of each policy", "shape": "Qwen3-8B", "budget_tokens": BUDGET, "limit_ms": MOST}
    with tempfile.TemporaryDirectory() as folder, share_model():
        (Path(folder) / "config.json").write_text(json.dumps(QWEN3_8B))
        for policy, options in POLICIES:
            rows.append(measure(Path(folder), policy, options, device))
            print(rows[-1], flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            record |= {"commit": args.commit, "versions": versions(), "rows": rows}
            record |= {"seconds": round(time.perf_counter() - begin, 1), "ok": all(row["ok"] for row in rows)}
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    slow = [f"{row['policy']} {row['options']} {row['ms']:.2f} ms" for row in rows if not row["ok"]]
    print(f"over {MOST} ms: {'; '.join(slow)}" if slow else f"{len(rows)} policies under {MOST} ms")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
