"""The engine on CUDA: tokens against transformers, the memory plan against what is used, and what faults cost.

    python -m tests.gpu.check_engine --out engine.json --commit $(git rev-parse HEAD) [--only tokens,...] [--full]

* tokens: a tiny random model of each family, five prompts of mixed length and 200 new tokens, greedy, float32: all
  tokens and their log-probabilities equal transformers'. Of families, block sizes and ways to run any two meet; with
  `--full` all do.
* quantized: a model in FP8 has, to the bit, the parameters that its codes and scales mean.
* requests: `tests/gpu/check_requests.py`.
* memory: the plan of a Qwen3-8B-shaped model with random weights, full KV and compressed, against CUDA's peak in a run
  that fills it: never under it, and under full KV at most 1 % over.

Exits with 1 where anything disagrees.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import sys
import tempfile
import time
from collections import defaultdict
from itertools import product
from pathlib import Path

import torch
import transformers
import triton
from transformers import AutoModelForCausalLM

from tests.gpu.check_requests import check_requests
from tests.gpu.pairwise import pairwise
from tests.models.loading.fp8_writer import write_fp8
from tests.tiny_models import FAMILIES, HYBRIDS, MORE_FAMILIES, VOCAB, save_tiny_model, transformers_greedy
from zipage import LLM, SamplingParams
from zipage.models.loading.loader import load_model
from zipage.scheduling.swap_space import SwapCosts

NUM_TOKENS = 200
LENGTHS = (1, 15, 17, 70, 130)
PARAMS = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=True)
CASES = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 40},
    "unchunked": {"enable_chunked_prefill": False, "max_model_len": 512},
    "prefix-hit": {},
    "preempted": {},
    "copied": {"swap_space": 0.25},
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


def check_tokens(device: str, full: bool) -> list[dict]:
    """One row a family, block size and way to run: `tokens_equal`, and the largest difference of a log-probability."""
    torch.backends.cuda.matmul.allow_tf32 = False
    settings = defaultdict(list)
    families = sorted(FAMILIES | MORE_FAMILIES | HYBRIDS)
    for family, *setting in (product if full else pairwise)(families, (16, 256), tuple(CASES)):
        settings[family].append(setting)
    rows = []
    for family, cases in settings.items():
        with tempfile.TemporaryDirectory() as folder:
            # Short prompts, whose frequencies transformers and an engine choose alike in short contexts alone.
            more = {"original_max_position_embeddings": 1024} if family == "phi3" else {}
            rows += check_family(save_tiny_model(family, Path(folder), **more), family, cases, device)
    return rows


def check_family(folder: Path, family: str, cases: list[tuple[int, str]], device: str) -> list[dict]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in LENGTHS]
    expected = [transformers_greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    rows = []
    for block_size, case in cases:
        options = {"num_blocks": 4096 // block_size, "max_num_batched_tokens": 512} | CASES[case]
        if case in ("preempted", "copied"):
            options["num_blocks"] = {16: 30, 256: 3}[block_size]
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
        if case == "copied":  # a tiny model is computed in no time
            llm._core.scheduler.swap_space.costs = SwapCosts(0, 1, 0)
        if case == "prefix-hit":
            llm.generate(prompts, PARAMS, use_tqdm=False)
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
        samples = [output.outputs[0] for output in outputs]
        pairs = list(zip(samples, expected, strict=True))
        row = {
            "family": family,
            "block_size": block_size,
            "case": case,
            "tokens_equal": all(sample.token_ids == tokens for sample, (tokens, _) in pairs),
            "max_logprob_difference": max(
                abs(of[token].logprob - expected)
                for sample, (_, logprobs) in pairs
                for token, of, expected in zip(sample.token_ids, sample.logprobs, logprobs, strict=True)
            ),
            "cached_tokens": sum(output.metrics.cached_tokens for output in outputs),
            "preemptions": llm.stats.preemptions,
            "pauses": llm.stats.pauses,
        }
        row["ok"] = row["tokens_equal"] and row["max_logprob_difference"] < 1e-3
        if block_size == 16:  # too small a number of blocks of 256 to tell
            row["ok"] &= (row["preemptions"] > 0) == (case == "preempted")
            row["ok"] &= (row["pauses"] > 0) == (case == "copied")
            hits = case == "prefix-hit" and family not in HYBRIDS
            row["ok"] &= case in ("preempted", "copied") or (row["cached_tokens"] > 0) == hits
        rows.append(row)
    return rows


def check_quantized(device: str) -> list[dict]:
    """One row a family and dtype: how many parameters differ from those of the dense folder."""
    rows = []
    for family, dtype in product(("qwen3", "qwen3_moe"), ("float32", "bfloat16")):
        with tempfile.TemporaryDirectory() as path:
            plain = save_tiny_model(family, Path(path) / "plain")
            folder = write_fp8(plain, Path(path) / "fp8", (20, 24), torch.bfloat16)
            found, expected = (
                load_model(str(place), device=device, dtype=dtype).decoder.state_dict()
                for place in (folder, folder / "dense")
            )
        wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
        rows.append(
            {"family": family, "dtype": dtype, "wrong": wrong, "ok": not wrong and found.keys() == expected.keys()}
        )
    return rows


LOADS = {
    "full": (
        {},
        SamplingParams(
            temperature=0.6, top_p=0.95, min_p=0.01, repetition_penalty=1.1, max_tokens=128, ignore_eos=True,
            logprobs=True,
        ),
    ),
    "zipage": (
        {"policy": "zipage", "budget_tokens": 512},
        SamplingParams(temperature=0.6, top_p=0.95, max_tokens=128, ignore_eos=True, logprobs=True),
    ),
}  # fmt: skip
"""Options of the engine, and of 256 requests. Under `zipage` each is compressed once, at 768 entries."""


def check_memory(device: str) -> list[dict]:
    """One row a load: the plan of an 8B-shaped model at 0.9 of memory, and the peak of a run that fills it.

    Counted is what the engine allocates above what the process held before, which the plan leaves alone.
    """
    rows = []
    for name, (options, params) in LOADS.items():
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(QWEN3_8B))
            begin = time.perf_counter()
            llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, device=device, max_num_seqs=256, **options)
            startup = time.perf_counter() - begin
        torch.cuda.reset_peak_memory_stats()
        rng = random.Random(0)
        prompts = [[rng.randrange(1000) for _ in range(700)] for _ in range(256)]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        plan, stats = llm.memory_plan, llm.stats
        free, total = torch.cuda.mem_get_info(device)
        row = {
            "load": name,
            "plan": str(plan),
            "num_blocks": plan.num_blocks,
            "startup_seconds": startup,
            "allocated_before_bytes": before,
            "planned_bytes": plan.weight_bytes + plan.activation_bytes + plan.cache_bytes + plan.query_bytes,
            "peak_bytes": torch.cuda.max_memory_allocated() - before,
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "device_bytes": total - free,
            "limit_bytes": int(0.9 * total),
            "tokens_per_second": sum(len(output.outputs[0].token_ids) for output in outputs) / seconds,
            "seconds": seconds,
            "host_seconds": stats.host_time,
            "device_seconds": stats.device_time,
            "steps": stats.steps,
            "compressions": stats.compressions_applied,
            "preemptions": stats.preemptions,
        }
        row["planned_over_peak"] = row["planned_bytes"] / row["peak_bytes"] - 1
        row["ok"] = row["peak_bytes"] <= row["planned_bytes"] <= row["limit_bytes"]
        # The largest batch of compressions, which is planned, comes in no load as short as this one.
        row["ok"] &= bool(options) or row["planned_over_peak"] <= 0.01
        row["ok"] &= stats.compressions_applied >= (256 if options else 0)
        rows.append(row)
        llm.shutdown()
        del llm, outputs
    return rows


def tiny_requests(device: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        return check_requests(save_tiny_model("qwen3", Path(folder)), device)


SECTIONS = ("tokens", "quantized", "requests", "memory")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON record goes")
    parser.add_argument("--commit", default="unknown", help="git commit of the code")
    parser.add_argument("--device", default="cuda", help="a cpu leaves out `memory`")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--full", action="store_true", help="every combination of the tokens' cases")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if not set(chosen) <= set(SECTIONS):
        parser.error(f"--only {args.only}: name some of {', '.join(SECTIONS)}")
    cuda = args.device.startswith("cuda")
    record = {
        "command": f"python -m tests.gpu.check_engine --only {args.only} --device {args.device}{' --full' * args.full}",
        "commit": args.commit,
        "device": torch.cuda.get_device_name() if cuda else platform.processor(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "new_tokens": NUM_TOKENS,
        "prompt_lengths": LENGTHS,
    }
    checks = {
        "tokens": lambda: check_tokens(args.device, args.full),
        "quantized": lambda: check_quantized(args.device),
        "requests": lambda: tiny_requests(args.device),
        "memory": lambda: check_memory(args.device) if cuda else [],
    }
    summary = []
    for section in SECTIONS:
        if section not in chosen:
            continue
        rows = record[section] = checks[section]()
        bad = [row for row in rows if not row["ok"]]
        summary.append(f"{section}: {len(rows) - len(bad)} of {len(rows)} as they must be")
        if section == "memory":
            gigabytes = ((row["load"], row["peak_bytes"] / 1e9, row["planned_bytes"] / 1e9) for row in rows)
            summary += [f"{load}: peak {peak:.2f}, planned {planned:.2f} GB" for load, peak, planned in gigabytes]
        for row in rows if section == "memory" else bad:
            print(json.dumps(row, indent=1), flush=True)
        record["passed"] = record.get("passed", True) and not bad
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("; ".join(summary))
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
