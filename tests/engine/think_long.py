"""30,000 tokens a sample inside a handful of blocks, under every policy, with everything on at once.

    python -m tests.engine.think_long --out FILE --commit $(git rev-parse HEAD) [--tokens 30000] [--policies NAME ...]

A tiny random model; two prompts of two samples each, one prompt longer than its budget; protected prompts that the
samples share, chunked prefill, prefix caching, asynchronous compression, hybrid scheduling in a pool that is too small
for all, pauses now and then, and the checks of debug mode after every step.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.engine.compressed import (
    ended_while_paused,
    greedy,
    make_llm,
    pause_now_and_then,
    random_prompts,
    record_events,
    tokens_of,
)
from tests.eviction.cases import CASES, Case
from tests.tiny_models import VOCAB, save_tiny_model

POLICIES = sorted({case.policy: case for case in reversed(CASES)}.values(), key=str)


def think(folder: Path, case: Case, device: str, num_tokens: int) -> dict:
    """One policy's row."""
    protected = Case(case.policy, case.options, case.recent, "prompt")
    llm = make_llm(
        folder,
        protected,
        budget=96,
        device=device,
        dtype="float32",
        num_blocks=26,
        max_num_seqs=4,
        max_num_batched_tokens=48,
        async_compression=True,
    )
    events = record_events(llm)
    pause_now_and_then(llm, share=0.002)
    used = []
    llm.step_listeners.append(lambda step: used.append(step.blocks_used))
    begin = time.perf_counter()
    outputs = llm.generate(random_prompts([40, 150], VOCAB), greedy(num_tokens, n=2, seed=1), use_tqdm=False)
    stats = llm.stats
    lengths = [len(tokens) for tokens in tokens_of(outputs)]
    row = {
        "policy": case.policy,
        "seconds": round(time.perf_counter() - begin, 1),
        "steps": stats.steps,
        "lengths": lengths,
        "most_blocks": max(used),
        "cached_tokens": stats.cached_tokens,
    }
    for name in ("compressions_applied", "entries_evicted", "pauses", "resumes", "preemptions"):
        row[name] = getattr(stats, name)
    row["ok"] = (
        lengths == [num_tokens] * 4
        and stats.compressions_applied == stats.compressions_ordered > 0
        and stats.pauses == stats.resumes + ended_while_paused(events)
        and stats.blocks_used == stats.query_slots_used == 0
    )
    llm.shutdown()
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--policies", nargs="+", default=[case.policy for case in POLICIES], help="by name")
    args = parser.parse_args()
    unknown = sorted(set(args.policies) - {case.policy for case in POLICIES})
    if unknown:
        parser.error(f"--policies {unknown[0]}: must be of {', '.join(case.policy for case in POLICIES)}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_model("qwen3", Path(folder)) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 40_960}))
        for case in (case for case in POLICIES if case.policy in args.policies):
            rows.append(think(Path(folder), case, args.device, args.tokens))
            print(*rows[-1].values(), flush=True)
            record = {
                "command": f"python -m tests.engine.think_long --tokens {args.tokens} --device {args.device} "
                f"--policies {' '.join(args.policies)}",
                "commit": args.commit,
                "device": torch.cuda.get_device_name() if args.device != "cpu" else platform.machine(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "passed": all(row["ok"] for row in rows),
                "rows": rows,
            }
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
