"""Tensor parallelism on several GPUs: tokens and kept positions of every policy against one GPU's.

    python -m tests.gpu.check_ranks --out FILE --commit $(git rev-parse HEAD) [--sizes 2,4] [--full]

One row a policy and number of ranks: greedy float32 tokens, and the logical positions that each layer and KV head kept
at each compression, with budgets that bind, chunked prompts, compressions beside the steps, and pauses. The model has
two KV heads, so four ranks hold each twice. Without `--full` each policy comes once; with it, with all its options.

`--sizes` defaults to those of 2 and 4 that the machine has GPUs for. Exits with 1 where anything disagrees, or where
there are fewer than two GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from tests.engine.compressed import greedy, make_llm, pause_now_and_then, random_prompts, tokens_of
from tests.eviction.cases import CASES, Case
from tests.tiny_models import VOCAB, save_tiny_model

ONE_OF_EACH = list({case.policy: case for case in reversed(CASES)}.values())
LENGTHS = (5, 17, 33, 9, 70, 100)
TOKENS = 64
AT_ONCE = 16
"""Engines beside each other, each with its ranks."""


def generated(folder: Path, case: Case | None, device: str, **options) -> tuple[list, dict]:
    """Tokens, and the positions kept, by request and round."""
    llm = make_llm(
        folder, case, budget=48, device=device, dtype="float32", max_num_batched_tokens=24, num_blocks=40,
        trace_positions=case is not None, **options,
    )  # fmt: skip
    kept = {}

    def note(event) -> None:
        if event.kind == "compress":
            kept[event.request_id, event.round] = event.kept_positions

    llm.event_listeners.append(note)
    try:
        if case is not None:
            pause_now_and_then(llm, share=0.2)
        outputs = llm.generate(random_prompts(LENGTHS, VOCAB), greedy(TOKENS), use_tqdm=False)
        return tokens_of(outputs), kept
    finally:
        llm.shutdown()


def compare(folder: Path, case: Case | None, device: str, size: int, expected: tuple[list, dict]) -> dict:
    """One row."""
    row = {"policy": str(case or "full"), "ranks": size}
    try:
        tokens, kept = generated(folder, case, device, tensor_parallel_size=size)
    except Exception as error:
        return row | {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    same_kept = kept.keys() == expected[1].keys() and all(
        (kept[key] is None and expected[1][key] is None) or np.array_equal(kept[key], expected[1][key]) for key in kept
    )
    differ = sum(a != b for a, b in zip(tokens, expected[0], strict=True))
    ok = not differ and same_kept and (case is None or len(kept) > 0)
    return row | {"requests_that_differ": differ, "compressions": len(kept), "kept_alike": same_kept, "ok": ok}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--sizes", default="")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    count = torch.cuda.device_count() if options.device == "cuda" else 4
    sizes = [int(size) for size in options.sizes.split(",") if size] or [size for size in (2, 4) if size <= count]
    if not sizes:
        print(f"{count} GPU: tensor parallelism needs two")
        return 1
    cases = [None, *(CASES if options.full else ONE_OF_EACH)]
    rows = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(AT_ONCE) as pool:
        folder = save_tiny_model("qwen3", Path(name) / "qwen3")
        waiting = []
        for case in cases:
            expected = generated(folder, case, options.device)
            for size in sizes:
                waiting.append(pool.submit(compare, folder, case, options.device, size, expected))
        for future in waiting:
            rows.append(future.result())
            if not rows[-1]["ok"]:
                print(rows[-1], flush=True)
            options.out.write_text(json.dumps({"commit": options.commit, "gpus": count, "rows": rows}, indent=1))
    wrong = [f"{row['policy']} on {row['ranks']}" for row in rows if not row["ok"]]
    kept = sum(row.get("compressions", 0) for row in rows)
    verdict = f"differ: {', '.join(wrong)}" if wrong else "all alike"
    print(f"{len(rows)} engines on {sizes} ranks, {kept} compressions: {verdict}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
