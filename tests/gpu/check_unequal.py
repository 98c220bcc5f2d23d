"""Unequal budgets on CUDA: what must not change a token, what each head keeps, and what it costs.

    python -m tests.gpu.check_unequal --out FILE --commit $(git rev-parse HEAD) [--only tokens,kept,speed] [--full]

* tokens: requests alone, eager and compressed in place, against a batch in decode graphs, with steps launched ahead,
  asynchronous compression, pauses and a tight pool; with an unbounded budget against full KV; float32.
* kept: the positions that each head keeps over a generation against the dense simulation of the tests; float32.
* speed: a Qwen3-8B-shaped model, 128 requests at a budget of 2,048 entries in the mean: a decode step takes at most
  `SLOWER` times what it takes under uniform budgets, and a compression is timed.

Exits with 1 where anything disagrees. With `--full`, every kind meets both ways to round.
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
from itertools import product
from pathlib import Path

import torch

from tests.engine.compressed import (
    UNBOUNDED,
    Recorder,
    greedy,
    make_llm,
    pause_now_and_then,
    random_prompts,
    record_events,
    tokens_of,
)
from tests.eviction.cases import SMALL_CHUNK, Case
from tests.eviction.dense_allocation import UnequalSimulation
from tests.gpu.check_compressed_engine import LENGTHS, versions
from tests.gpu.compression_times import QWEN3_8B, dummy_llm, timed_compressions
from tests.tiny_models import VOCAB, save_tiny_model
from zipage import SamplingParams
from zipage.models.decoder import Decoder
from zipage.worker.tiled_attention import TiledAttention

SLOWER = 1.05
KINDS = {"pyramid": {"beta": 4.0}, "adaptive": {}, "threshold": {"tau": 0.02}}
SNAPKV, ZIPAGE = Case("snapkv"), Case("zipage", SMALL_CHUNK)
LOOPS = {
    "graphs": {"enforce_eager": False},
    "ahead": {"enforce_eager": False, "async_scheduling": True, "async_compression": True},
    "eager": {"async_compression": True},
    "chunked": {"max_num_batched_tokens": 24},
    "tight": {"num_blocks": 12, "headroom": 0, "enforce_eager": False, "async_compression": True},
    "paused": {"enforce_eager": False},
}
PLAIN = {"dtype": "float32", "enforce_eager": True, "async_scheduling": False, "async_compression": False}


def unequal(name: str, rounding: str = "page") -> dict:
    options = KINDS[name] | {"round": rounding}
    return {"allocation": name, "allocation_options": options, "enable_prefix_caching": False}


def kinds(full: bool) -> list[tuple[str, str]]:
    every = list(product(KINDS, ("page", "entry")))
    return every if full else [every[0], every[3], every[4]]


def check_tokens(folder: Path, device: str, full: bool) -> list[dict]:
    """One row a kind: loops whose tokens differ from those of the requests alone."""
    prompts = random_prompts(LENGTHS, VOCAB)
    params = [greedy(90, seed=i) for i in range(len(prompts))]
    whole = tokens_of(make_llm(folder, None, device=device, **PLAIN).generate(prompts, params, use_tqdm=False))
    rows = []
    for case, (name, rounding) in zip((SNAPKV, ZIPAGE) * 3, kinds(full), strict=False):
        options = {"device": device} | PLAIN | unequal(name, rounding)
        llm = make_llm(folder, case, **options)
        alone = [
            tokens_of(llm.generate([prompt], one, use_tqdm=False))[0]
            for prompt, one in zip(prompts, params, strict=True)
        ]
        wrong, pauses, applied = [], 0, 0
        for loop, changes in LOOPS.items():
            llm = make_llm(folder, case, **options | changes)
            if loop == "paused":
                pause_now_and_then(llm, share=0.3)
            tokens = tokens_of(llm.generate(prompts, params, use_tqdm=False))
            if tokens != alone or llm.stats.blocks_used:
                wrong.append(loop)
            pauses, applied = pauses + llm.stats.pauses, applied + llm.stats.compressions_applied
        for loop in ("graphs", "eager"):
            llm = make_llm(folder, case, budget=UNBOUNDED, **options | LOOPS[loop] | {"debug": False})
            if tokens_of(llm.generate(prompts, params, use_tqdm=False)) != whole:
                wrong.append(f"unbounded, {loop}")
        ok = not wrong and pauses > 0 and applied > 0
        rows.append({"kind": name, "round": rounding, "differ": wrong, "pauses": pauses, "events": applied, "ok": ok})
    return rows


def check_kept(folder: Path, device: str, full: bool) -> list[dict]:
    """One row a kind and policy: events whose kept positions differ from the simulation's."""
    prompt, new, keep, block = 24, 130, 64, 16
    attend, forward = TiledAttention.__call__, Decoder.forward
    rows = []
    for case, (name, rounding) in product((SNAPKV, ZIPAGE, Case("r_kv")), kinds(full)):
        recorder = Recorder()
        llm = make_llm(folder, case, keep, device=device, trace_positions=True, **PLAIN | unequal(name, rounding))
        TiledAttention.__call__, Decoder.forward = recorder.wrap(attend), recorder.watch(forward)
        try:
            events = record_events(llm)
            llm.generate(random_prompts([prompt], VOCAB, seed=3), greedy(new, seed=5), use_tqdm=False)
        finally:
            TiledAttention.__call__, Decoder.forward = attend, forward
        sizes = {"seed": 5, "prompt_len": prompt, "keep": keep, "recent": case.recent, "protection": case.protection}
        simulation = UnequalSimulation(policy=case.policy, options=case.options, **recorder.arrays(llm), **sizes)
        gains = [keep + block] + [block] * (len(events) - 1)
        expected = simulation.run_unequal(gains, (name, KINDS[name], rounding), block)
        wrong = [
            event.round
            for event, kept in zip(events, expected, strict=True)
            if any(event.kept_positions[at][event.kept_positions[at] >= 0].tolist() != kept[at] for at in kept)
        ]
        row = {"case": str(case), "kind": name, "round": rounding, "events": len(events), "differ": wrong}
        rows.append(row | {"ok": bool(events) and not wrong})
    return rows


def measure_speed(device: str, full: bool) -> list[dict]:
    """One row an allocation: the mean decode step, and the median compression, of 128 requests.

    A compression makes the host wait, which moves time between steps. So all requests are compressed before the steps
    that are timed, and next after them.
    """
    rows = []
    for name, rounding in [("uniform", "page"), *(kind for kind in kinds(full) if kind[0] != "threshold")]:
        options = {"enable_prefix_caching": False} if name == "uniform" else unequal(name, rounding)
        sizes = {"num_blocks": 128 * 10 + 8, "max_num_seqs": 128, "max_model_len": 4096}
        policy = {"policy": "snapkv", "budget_tokens": 2048, "async_compression": False}
        llm = dummy_llm(QWEN3_8B, device, **policy, **sizes, **options)
        spans, steps, rng = timed_compressions(llm), [], random.Random(0)
        for i in range(128):
            prompt = [rng.randrange(1000) for _ in range(2048 + i)]
            llm.add_request(prompt, SamplingParams(temperature=0.6, max_tokens=420, ignore_eos=True))
        llm.step_listeners.append(steps.append)
        while llm.has_unfinished_requests() and (not steps or steps[-1].num_prefill or steps[-1].num_decode < 128):
            llm.step()
        steps.clear()
        while llm.has_unfinished_requests() and len(steps) < 370:
            llm.step()
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) / number for number, begin, end in spans]
        timed = steps[-100:]
        row = {
            "kind": name,
            "round": rounding,
            "step_ms": 1e3 * statistics.mean(step.step_time for step in timed),
            "compression_ms": statistics.median(times),
            "compressed": sum(step.num_compressed for step in steps[:-100]),
            "entries": llm.stats.entries_kept,
        }
        quiet = all(step.num_decode == 128 and not step.num_compressed for step in timed)
        row["slower"] = row["step_ms"] / (rows[0]["step_ms"] if rows else row["step_ms"])
        rows.append(row | {"ok": quiet and row["compressed"] == 128 and row["slower"] <= SLOWER})
        llm.shutdown()
        del llm
        gc.collect()
        torch.cuda.empty_cache()
    return rows


CHECKS = {"tokens": check_tokens, "kept": check_kept}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="tokens,kept,speed", help="sections, separated by commas")
    parser.add_argument("--full", action="store_true", help="every kind with both ways to round")
    args = parser.parse_args()
    chosen = args.only.split(",")
    unknown = sorted(set(chosen) - {*CHECKS, "speed"})
    if unknown:
        parser.error(f"--only {unknown[0]}: must be of {', '.join(CHECKS)}, speed")
    command = f"python -m tests.gpu.check_unequal --only {args.only}" + " --full" * args.full
    record = {"command": command, "commit": args.commit, **versions(args.device)}
    good, summary = True, []
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model("qwen3", Path(folder))
        for section in chosen:
            begin = time.perf_counter()
            if section == "speed":
                rows = measure_speed(args.device, args.full)
                summary += [f"{r['kind']} {r['slower']:.3f} x, {r['compression_ms']:.2f} ms" for r in rows]
            else:
                rows = CHECKS[section](Path(folder), args.device, args.full)
                agree = sum(row["ok"] for row in rows)
                summary.append(f"{section}: {agree} of {len(rows)} rows agree in {time.perf_counter() - begin:.0f} s")
            record[section] = rows
            good &= all(row["ok"] for row in rows)
            for row in rows:
                if section == "speed" or not row["ok"]:
                    print("  ", row, flush=True)
            args.out.write_text(json.dumps(record | {"passed": good}, indent=1) + "\n")
    print("; ".join(summary))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
