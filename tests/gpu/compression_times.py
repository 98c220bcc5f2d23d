"""What compression costs a decode step on CUDA, and 200 long requests in memory for 100; models with random weights."""

from __future__ import annotations

import gc
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from itertools import product
from pathlib import Path

import torch

from tests.engine.compressed import greedy
from zipage import LLM, SamplingParams

QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "dtype": "bfloat16",
}
QWEN3_8B = QWEN3 | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
QWEN3_0_6B = QWEN3 | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}


def dummy_llm(shape: dict, device: str, **options) -> LLM:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        return LLM(folder, load_format="dummy", skip_tokenizer_init=True, device=device, **options)


def timed_compressions(llm: LLM) -> list[tuple[int, torch.cuda.Event, torch.cuda.Event]]:
    """Wraps every submission of compressions, in synchronous mode, in a pair of CUDA events."""
    spans = []
    submit = llm._core.compressor.submit

    def timed(orders):
        if not orders:
            return submit(orders)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        submit(orders)
        end.record()
        spans.append((len(orders), begin, end))

    llm._core.compressor.submit = timed
    return spans


def measure_decode(device: str, full: bool) -> dict:
    """128 requests at budget 2,048, 256 decode steps: every request is compressed once on average."""
    rows = []
    for asynchronous, policy in product((False, True) if full else (False,), ("zipage", "random")):
        llm = dummy_llm(
            QWEN3_8B,
            device,
            policy=policy,
            budget_tokens=2048,
            protection="none",
            async_compression=asynchronous,
            num_blocks=128 * 9 + 8,
            max_num_seqs=128,
            max_model_len=4096,
            enable_prefix_caching=False,
        )
        spans = [] if asynchronous else timed_compressions(llm)
        steps = []
        rng = random.Random(0)
        # Staggered lengths, so that the requests come due one after the other, as they do in a long run.
        prompts = [[rng.randrange(1000) for _ in range(2048 + 2 * i)] for i in range(128)]
        for prompt in prompts:
            llm.add_request(prompt, SamplingParams(temperature=0.6, max_tokens=300, ignore_eos=True))
        llm.step_listeners.append(steps.append)
        while llm.has_unfinished_requests() and sum(not step.num_prefill for step in steps) < 258:
            llm.step()
        torch.cuda.synchronize()
        # Of the pure decode steps the first two warm up, and those of compiling kernels stand out: medians.
        decodes = [step for step in steps if not step.num_prefill][2:]
        quiet = [step.step_time for step in decodes if not step.num_compressed and not step.num_compressing]
        total = sum(step.step_time for step in decodes)
        applied = sum(step.num_compressed for step in decodes)
        typical = statistics.median(quiet)
        row = {
            "policy": policy,
            "async": asynchronous,
            "decode_steps": len(decodes),
            "mean_batch": statistics.mean(step.num_decode for step in decodes),
            "compressions": applied,
            "step_ms": {"median_without_compression": 1e3 * typical, "mean": 1e3 * total / len(decodes)},
            "tokens_per_second": sum(step.num_decode for step in decodes) / total,
            "seconds": total,
        }
        if not asynchronous:
            times = [(n, begin.elapsed_time(end)) for n, begin, end in spans][2:]
            row["compression_ms_each_median"] = statistics.median(ms / n for n, ms in times)
            row["compression_ms_total"] = sum(ms for _, ms in times)
            row["share_of_decode"] = row["compression_ms_each_median"] * applied / len(decodes) / (1e3 * typical)
        rows.append(row)
        print(row, flush=True)
        llm.shutdown()
        del llm, spans
        gc.collect()
        torch.cuda.empty_cache()
    ok = all(row["share_of_decode"] < 0.03 for row in rows if not row["async"])
    return {"shape": "Qwen3-8B", "budget_tokens": 2048, "requests": 128, "rows": rows, "ok": ok}


def measure_long(device: str, num_tokens: int, requests: int = 200, limit_s: float = 540.0) -> dict:
    """Twice the requests that the pool holds budgets of, to their end."""
    budget, size = 1024, 256
    per_request = budget // size + 1
    llm = dummy_llm(
        QWEN3_0_6B,
        device,
        policy="zipage",
        budget_tokens=budget,
        num_blocks=requests // 2 * per_request,
        max_num_seqs=requests,
        max_model_len=num_tokens + 256,
    )
    rng = random.Random(0)
    params = greedy(num_tokens)
    for _ in range(requests):
        llm.add_request([rng.randrange(1000) for _ in range(rng.randrange(64, 192))], params)
    series, peak = [], 0
    llm.step_listeners.append(
        lambda s: series.append((s.num_decode, s.num_running, s.num_stalled, s.blocks_used, s.step_time))
    )
    begin = time.perf_counter()
    outputs = []
    allocated = []
    while llm.has_unfinished_requests() and time.perf_counter() - begin < limit_s:
        outputs += llm.step()
        if len(series) >= 100 * (len(allocated) + 1) and not llm.stats.num_compressing:
            allocated.append(torch.cuda.memory_allocated())
            peak = torch.cuda.max_memory_allocated()
        if len(series) % 5000 == 0:
            print(f"step {len(series)}: {len(outputs)} done, {time.perf_counter() - begin:.0f} s", flush=True)
    seconds = time.perf_counter() - begin
    stats = llm.stats
    settled = allocated[len(allocated) // 10 :]
    lengths = Counter(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "shape": "Qwen3-0.6B",
        "budget_tokens": budget,
        "requests": requests,
        "tokens_each": num_tokens,
        "pool_blocks": llm.memory_plan.num_blocks,
        "blocks_of_a_budget": per_request,
        "finished": len(outputs),
        "lengths": dict(lengths),
        "seconds": seconds,
        "steps": len(series),
        "median_step_ms": 1e3 * statistics.median(row[4] for row in series),
        "output_tokens": stats.output_tokens,
        "tokens_per_second": stats.output_tokens / seconds,
        "allocated_bytes_every_1000_steps": allocated[::10],
        "settled_bytes": [min(settled), max(settled)],
        "peak_bytes": peak,
        "peak_blocks": max(row[3] for row in series),
        "every_500_steps": [
            dict(zip(("decode", "running", "stalled", "blocks", "step_s"), row, strict=True)) for row in series[::500]
        ],
        "counters": {
            name: getattr(stats, name)
            for name in (
                "compressions_ordered",
                "compressions_applied",
                "pauses",
                "resumes",
                "preemptions",
                "budget_bound",
                "blocks_returned",
            )
        },
        "ok": lengths == {num_tokens: requests} and max(settled) - min(settled) < 2**20,
    }


def share(row: dict) -> str:
    return f"{row['policy']} {row['share_of_decode']:.1%} of decoding"
