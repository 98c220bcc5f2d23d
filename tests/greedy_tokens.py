"""Greedy tokens of random small configurations: recorded at one commit, compared at another.

python -m tests.greedy_tokens record FILE [--num 200]
python -m tests.greedy_tokens compare FILE
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import zlib
from pathlib import Path

from tests.tiny_models import FAMILIES, VOCAB, save_tiny_model
from zipage import LLM, SamplingParams

POLICIES = [
    ("full", {}),
    ("zipage", {"window": 8}),
    ("zipage", {"window": 4, "redundancy": "full"}),
    ("r_kv", {"window": 8}),
    ("g_kv", {"window": 8}),
    ("snapkv", {"window": 8}),
    ("h2o", {}),
    ("tova", {}),
    ("morphkv", {"window": 8}),
    ("vase", {"window": 8}),
    ("keydiff", {}),
    ("knorm", {}),
    ("streaming", {}),
    ("random", {}),
    ("random_shared", {}),
    ("page_attention", {"window": 8, "page_size": 16}),
    ("page_random", {"page_size": 16}),
]


def configuration(seed: int) -> dict:
    """Options of the engine, prompts and what is asked of each."""
    rng = random.Random(seed)
    policy, policy_options = rng.choice(POLICIES)
    budget_blocks = rng.randrange(2, 5)
    max_num_seqs = rng.choice([2, 4, 8])
    options = {
        "block_size": 16,
        "num_blocks": rng.randrange(8, 26),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": rng.choice([max_num_seqs, 16, 64, 512]),
        "max_model_len": 512,
        "enable_prefix_caching": rng.random() < 0.7,
        "async_scheduling": rng.random() < 0.5,
    }
    options["max_num_batched_tokens"] = max(options["max_num_batched_tokens"], max_num_seqs)
    if policy != "full":
        options |= {
            "policy": policy,
            "policy_options": policy_options,
            "budget_tokens": 16 * budget_blocks,
            "protection": rng.choice(["none", "sink:4", "prompt"]),
            "recent_tokens": rng.choice([8, 12]),
            "trigger": rng.choice(["block_full", "block_full", "pressure"]),
            "scheduling": rng.choice(["hybrid", "constrained"]),
            "layer_stride": rng.choice([None, 1]),
        }
        # Under pressure, who is compressed depends on when the ones before are done.
        options["async_compression"] = options["trigger"] == "block_full" and rng.random() < 0.5
    common = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 20, 40]))]
    requests = []
    for _ in range(rng.randrange(4, 9)):
        prompt = common + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 50))]
        params = {"temperature": 0.0, "max_tokens": rng.randrange(10, 120), "n": rng.choice([1, 1, 1, 2])}
        if rng.random() < 0.2:
            params["repetition_penalty"] = 1.3
        if rng.random() < 0.2:
            params["stop_token_ids"] = [rng.randrange(VOCAB) for _ in range(3)]
        requests.append((prompt, params))
    return {"family": rng.choice(sorted(FAMILIES)), "options": options, "requests": requests}


def run(seed: int, models: Path) -> dict:
    """Tokens of all samples, and what happened on the way; or the refusal."""
    made = configuration(seed)
    folder = models / made["family"]
    if not folder.exists():
        save_tiny_model(made["family"], folder)
    try:
        llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", device="cpu", **made["options"])
    except ValueError as error:
        return {"refused": str(error)}
    params = [SamplingParams(**options) for _, options in made["requests"]]
    outputs = llm.generate([prompt for prompt, _ in made["requests"]], params, use_tqdm=False)
    stats = llm.stats
    llm.shutdown()
    return {
        "tokens": [[list(sample.token_ids) for sample in output.outputs] for output in outputs],
        "reasons": [[sample.finish_reason for sample in output.outputs] for output in outputs],
        "compressions": stats.compressions_applied,
        "preemptions": stats.preemptions,
        "pauses": stats.pauses,
        "cached_tokens": stats.cached_tokens,
    }


def run_all(seeds: range) -> dict[str, dict]:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            results[str(seed)] = run(seed, Path(folder))
            print(f"\r{seed + 1}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


def summary(results: dict[str, dict]) -> str:
    ran = [r for r in results.values() if "tokens" in r]
    sums = {name: sum(r[name] for r in ran) for name in ("compressions", "preemptions", "pauses", "cached_tokens")}
    num_tokens = sum(len(tokens) for r in ran for samples in r["tokens"] for tokens in samples)
    crc = zlib.crc32(json.dumps([r["tokens"] for r in ran]).encode())
    return f"{len(ran)} of {len(results)} configurations ran, {num_tokens} tokens (crc {crc:08x}), " + ", ".join(
        f"{value} {name}" for name, value in sums.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--num", type=int, default=200, help="configurations to record")
    args = parser.parse_args()
    if args.command == "record":
        results = run_all(range(args.num))
        args.file.write_text(json.dumps(results))
        print(summary(results))
        return 0
    before = json.loads(args.file.read_text())
    after = run_all(range(len(before)))
    print(summary(after))
    keys = ("tokens", "reasons", "refused")
    differ = [seed for seed in before if any(before[seed].get(k) != after[seed].get(k) for k in keys)]
    print("equal" if not differ else f"{len(differ)} differ: {', '.join(differ)}")
    return bool(differ)


if __name__ == "__main__":
    raise SystemExit(main())
