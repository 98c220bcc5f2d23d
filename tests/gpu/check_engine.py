"""The engine on CUDA: greedy tokens against transformers in float32, and the memory plan against what is really used.

    python -m tests.gpu.check_engine --out engine.json --commit $(git rev-parse HEAD)

Every case is a tiny random model of one family, five prompts of mixed length and 200 new tokens; compared are all
tokens and their log-probabilities. The last case plans memory for a Qwen3-8B-shaped model with random weights, serves a
batch that fills the plan's step, and compares CUDA's peak with the plan. Exits with 1 where anything disagrees.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
import triton
from transformers import AutoModelForCausalLM

from tests.tiny_models import FAMILIES, VOCAB, save_tiny_model, transformers_greedy
from zipage import LLM, SamplingParams

NUM_TOKENS = 200
LENGTHS = (1, 15, 17, 70, 130)
PARAMS = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=True)
CASES = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 40},
    "unchunked": {"enable_chunked_prefill": False, "max_model_len": 512},
    "prefix-hit": {},
    "preempted": {"tight": True},
}
QWEN3_8B = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def check_tokens(folder: Path, family: str, device: str) -> list[dict]:
    """One row a case: whether all tokens agree, and the largest difference of a log-probability."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in LENGTHS]
    expected = [transformers_greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    rows = []
    for block_size in (16, 256):
        for case, options in CASES.items():
            tight = options.get("tight", False)
            defaults = {
                "num_blocks": {16: 30, 256: 3}[block_size] if tight else 4096 // block_size,
                "max_num_batched_tokens": 512,
            }
            options = defaults | {name: value for name, value in options.items() if name != "tight"}
            llm = LLM(
                str(folder),
                skip_tokenizer_init=True,
                device=device,
                dtype="float32",
                block_size=block_size,
                max_num_seqs=8,
                debug=True,
                **options,
            )
            if case == "prefix-hit":
                llm.generate(prompts, PARAMS, use_tqdm=False)
            outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
            samples = [output.outputs[0] for output in outputs]
            pairs = list(zip(samples, expected, strict=True))
            rows.append(
                {
                    "family": family,
                    "block_size": block_size,
                    "case": case,
                    "tokens_equal": all(sample.token_ids == tokens for sample, (tokens, _) in pairs),
                    "max_logprob_difference": max(
                        abs(a - b) for sample, (_, logprobs) in pairs for a, b in zip(sample.logprobs, logprobs)
                    ),
                    "cached_tokens": sum(output.metrics.cached_tokens for output in outputs),
                    "preemptions": llm.stats.preemptions,
                }
            )
    return rows


def check_memory(device: str) -> dict:
    """The plan of an 8B-shaped model at 0.9 of memory, and the peak of a run that fills it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN3_8B))
        begin = time.perf_counter()
        llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, device=device, max_num_seqs=256)
        startup = time.perf_counter() - begin
    torch.cuda.reset_peak_memory_stats()
    rng = random.Random(0)
    prompts = [[rng.randrange(1000) for _ in range(512)] for _ in range(256)]
    params = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=128, ignore_eos=True, logprobs=True)
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    plan = llm.memory_plan
    total = torch.cuda.get_device_properties(device).total_memory
    return {
        "plan": str(plan),
        "num_blocks": plan.num_blocks,
        "startup_seconds": startup,
        "planned_bytes": plan.weight_bytes + plan.activation_bytes + plan.cache_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "limit_bytes": int(0.9 * total),
        "tokens_per_second": sum(len(output.outputs[0].token_ids) for output in outputs) / seconds,
        "seconds": seconds,
        "host_seconds": llm.stats.host_time,
        "device_seconds": llm.stats.device_time,
        "steps": llm.stats.steps,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON record goes")
    parser.add_argument("--commit", default="unknown", help="git commit of the code")
    parser.add_argument("--device", default="cuda", help="cpu runs the token cases alone")
    parser.add_argument("--no-memory", action="store_true", help="the token cases alone, beside other processes")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for family in sorted(FAMILIES):
        with tempfile.TemporaryDirectory() as folder:
            rows += check_tokens(save_tiny_model(family, Path(folder)), family, args.device)
    cuda = args.device.startswith("cuda")
    memory = check_memory(args.device) if cuda and not args.no_memory else None
    good = all(row["tokens_equal"] and row["max_logprob_difference"] < 1e-3 for row in rows)
    good &= all((row["preemptions"] > 0) == (row["case"] == "preempted") for row in rows if row["block_size"] == 16)
    good &= all(
        (row["cached_tokens"] > 0) == (row["case"] == "prefix-hit")
        for row in rows
        if row["block_size"] == 16 and row["case"] != "preempted"
    )
    if memory:
        good &= memory["peak_bytes"] <= memory["planned_bytes"] <= memory["limit_bytes"]
    record = {
        "command": f"python -m tests.gpu.check_engine --out {args.out.name} --device {args.device}",
        "commit": args.commit,
        "device": torch.cuda.get_device_name() if cuda else platform.processor(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "new_tokens": NUM_TOKENS,
        "prompt_lengths": LENGTHS,
        "passed": good,
        "tokens": rows,
        "memory": memory,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        print(*row.values())
    print(json.dumps(memory, indent=1))
    print("PASSED" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
