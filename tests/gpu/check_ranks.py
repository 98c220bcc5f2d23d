"""Tensor parallelism on several GPUs: tokens and kept positions of every policy against one GPU's.

    python -m tests.gpu.check_ranks --out FILE --commit $(git rev-parse HEAD) [--sizes 2,4] [--full]

One row a number of ranks and engine: greedy float32 tokens, and the logical positions that each layer and KV head kept
at each compression, with budgets that bind, chunked prompts, compressions beside the steps, and pauses. One engine
serves all policies that keep single entries, each page policy has its own; with `--full`, so has every policy with all
of its options. Models have two KV heads, so four ranks hold each twice. Those with windows in some layers run the first
two engines.

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

import torch

from tests.eviction.cases import CASES, SMALL_CHUNK, Case
from tests.parallel.ranked import OWN_CASES, TOKEN_POLICIES, Answers, answers, engine
from tests.tiny_models import FORMED, save_tiny_model

ENGINES = [
    (None, [None]),
    (Case("zipage", SMALL_CHUNK), TOKEN_POLICIES),
    (Case("page_attention", {"page_size": 16}), [None]),
    (Case("page_random", {"page_size": 16}), [None]),
    *((case, [None]) for case in OWN_CASES),
]
"""Its own policy, and those of its requests; None: its own."""
KV_HEADS = 2
"""Of the model: more ranks hold each twice, which a policy may refuse."""
AT_ONCE = 8
"""Engines beside each other, each with its ranks."""


def generated(folder: Path, case: Case | None, policies: list[str | None], device: str, **options) -> Answers:
    llm = engine(folder, case, device=device, **options)
    try:
        return answers(llm, policies, pauses=0.2 if case is not None else 0.0)
    finally:
        llm.shutdown()


def compared(folder: Path, case: Case | None, policies: list[str | None], device: str, size: int, one: Answers) -> dict:
    """One row."""
    row = {"model": folder.name, "engine": str(case or "full"), "policies": len(policies), "ranks": size}
    try:
        found = generated(folder, case, policies, device, tensor_parallel_size=size)
    except Exception as error:
        if "needs the output projection of whole groups" in str(error) and size > KV_HEADS:
            return row | {"ok": True, "refused": str(error)[:300]}
        return row | {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    differences = found.differences(one)
    return row | {
        "requests": len(found.tokens),
        "compressions": len(found.kept),
        "differences": differences[:5],
        "ok": not differences and (case is None or len(found.kept) > 0),
    }


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
    engines = [*ENGINES, *([(case, [None]) for case in CASES] if options.full else [])]
    rows = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = []
        for family, some in (("qwen3", engines), *((family, ENGINES[:2]) for family in sorted(FORMED))):
            folder = save_tiny_model(family, Path(name) / family)
            for case, policies in some:
                one = generated(folder, case, policies, options.device)
                waiting += [pool.submit(compared, folder, case, policies, options.device, size, one) for size in sizes]
        for future in waiting:
            rows.append(future.result())
            print(rows[-1], flush=True)
            options.out.write_text(json.dumps({"commit": options.commit, "gpus": count, "rows": rows}, indent=1))
    wrong = [f"{row['model']}, {row['engine']} on {row['ranks']}" for row in rows if not row["ok"]]
    kept = sum(row.get("compressions", 0) for row in rows)
    verdict = f"differ: {', '.join(wrong)}" if wrong else "all alike"
    print(f"{len(rows)} engines on {sizes} ranks, {kept} compressions: {verdict}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
