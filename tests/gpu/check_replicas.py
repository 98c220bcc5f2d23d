"""Replicas on GPUs of their own: the same tokens as one, and how much faster. Needs several GPUs.

    python -m tests.gpu.check_replicas [--sizes 1 2 4] [--requests 256] --out FILE

Tokens: a tiny model in float32, greedy and drawn, under a budget that binds. Speed: the shapes of Qwen3-8B with random
weights, `--requests` for each replica, all at once, through `LLM.generate`, after the same load has run once; `scaling`
is the rate over that of one replica. The parent must not have touched a GPU. Exits with 1 unless tokens are equal.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.engine.compressed import random_prompts, tokens_of
from tests.gpu.__main__ import commit_of_tree
from tests.tiny_models import VOCAB, save_tiny_model
from zipage import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
ZIPAGE = {"policy": "zipage", "skip_tokenizer_init": True, "device": "cuda"}
PROMPT, OUTPUT = 256, 1024


def tokens(folder: Path, size: int) -> list[list[int]]:
    options = ZIPAGE | {"budget_tokens": 48, "policy_options": {"chunk": 32}, "block_size": 16, "num_blocks": 256}
    llm = LLM(str(folder), dtype="float32", data_parallel_size=size, debug=True, **options)
    prompts = random_prompts(range(5, 60, 5), VOCAB)
    found = []
    for params in ({"temperature": 0.0}, {"seed": 3, "n": 2}):
        params = SamplingParams(max_tokens=150, ignore_eos=True, **params)
        found += tokens_of(llm.generate(prompts, params, use_tqdm=False))
    if not llm.stats.budget_bound:
        raise RuntimeError("the budget never bound")
    llm.shutdown()
    return found


def rate(size: int, requests: int) -> dict[str, float]:
    begin = time.perf_counter()
    options = ZIPAGE | {"budget_tokens": 1024, "load_format": "dummy", "max_model_len": 2 * (PROMPT + OUTPUT)}
    llm = LLM(str(ROOT / "models" / "qwen3-8b-shape"), data_parallel_size=size, **options)
    started = time.perf_counter() - begin
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    seconds = 0.0
    for seed in range(2):  # the first captures the graphs
        prompts = random_prompts([PROMPT] * (size * requests), 100_000, seed)
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
    llm.shutdown()
    return {"size": size, "start_seconds": started, "tokens_per_second": size * requests * OUTPUT / seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--requests", type=int, default=256, help="for each replica")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default=os.environ.get("ZIPAGE_COMMIT") or commit_of_tree(), help="of the code")
    given = parser.parse_args()
    sizes = sorted(size for size in given.sizes if size <= torch.cuda.device_count())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model("qwen3", Path(folder))
        for size in sorted(sizes, reverse=True):  # one replica runs in this process and is the first to touch a GPU
            row = {"tokens": tokens(model, size)} | rate(size, given.requests)
            row["parent_is_clean"] = size == 1 or not torch.cuda.is_initialized()
            rows.append(row)
            gc.collect()
    one = rows[-1]
    wrong = 0
    for row in rows:
        row["scaling"] = row["tokens_per_second"] / one["tokens_per_second"]
        row["tokens_equal"] = row["tokens"] == one["tokens"]
        wrong += not (row["tokens_equal"] and row["parent_is_clean"])
    shown = [{key: value for key, value in row.items() if key != "tokens"} for row in rows]
    head = {
        "gpu": torch.cuda.get_device_name(),
        "commit": given.commit,
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "requests": given.requests,
        "command": " ".join(["python", "-m", "tests.gpu.check_replicas", *sys.argv[1:]]),
    }
    given.out.write_text(json.dumps(head | {"rows": shown}, indent=2) + "\n")
    print(json.dumps(shown))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
