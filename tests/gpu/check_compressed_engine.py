"""Compressed PagedAttention on CUDA: what must not change a token, what each head keeps, what a compression costs, and
200 long requests in memory for 100.

    python -m tests.gpu.check_compressed_engine --out FILE --commit $(git rev-parse HEAD) [--only loops,...] [--full]

* unbounded: policies without a bound that binds against full KV: block size, chunking, prefix hit, synchronous or not,
  paused or not; float32.
* bounded: every policy with a budget, its requests alone against a batch, chunks, tight pools, pauses and asynchronous
  compression; float32.
* loops: decode steps as CUDA graphs, and launched before the tokens of the last are known, against eager ones one by
  one; float32.
* kept: the positions that each head keeps over a generation against the dense simulation of the tests.
* sliding: models with sliding layers and sinks, the same of a few policies; float32.
* decode: a Qwen3-8B-shaped model, 128 requests at a budget of 2,048 entries: what compression adds to decoding.
* long: a Qwen3-0.6B-shaped model, 200 requests of `--long-tokens` tokens in a pool that holds the budgets of 100.

Of the settings of `unbounded` and `loops` any two meet; each policy takes a third of those of `bounded`, `kept` takes
each policy once, and `decode` compresses in the step. With `--full` all of them run. Exits with 1 where anything
disagrees.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

import torch
import transformers
import triton

from tests.engine.compressed import (
    UNBOUNDED,
    Recorder,
    ended_while_paused,
    greedy,
    make_llm,
    pause_now_and_then,
    random_prompts,
    record_events,
    tokens_of,
)
from tests.eviction.cases import CASES, Case
from tests.eviction.dense_simulation import Simulation
from tests.gpu.compression_times import measure_decode, measure_long, share
from tests.gpu.pairwise import pairwise
from tests.gpu.sliding_layers import check_sliding
from tests.tiny_models import VOCAB, save_tiny_model
from zipage import SamplingParams
from zipage.models.decoder import Decoder
from zipage.worker.paged_attention import PagedAttention

ONE_OF_EACH = list({case.policy: case for case in reversed(CASES)}.values())
LENGTHS = (5, 17, 33, 9, 70, 100)
BINDING = {
    "batch": {},
    "chunked": {"max_num_batched_tokens": 24},
    "constrained": {"scheduling": "constrained", "num_blocks": 25},
    "tight": {"num_blocks": 11, "headroom": 0},
    "paused": {},
    "prefix hit": {},
}
SYNC_ONLY = ("chunked", "constrained", "prefix hit")


def check_unbounded(folder: Path, device: str, full: bool) -> list[dict]:
    """One row a combination: policies whose tokens differ from full KV's, and how often each event happened."""
    prompts, new = random_prompts(LENGTHS[1:], VOCAB), greedy(16)
    expected = tokens_of(make_llm(folder, None, device=device, dtype="float32").generate(prompts, new, use_tqdm=False))
    rows, settings = [], defaultdict(list)
    factors = (16, 64, 256), (40, 512), *[(False, True)] * 3, ONE_OF_EACH
    for *setting, case in (product if full else pairwise)(*factors):
        settings[tuple(setting)].append(case)
    for (size, chunk, hit, asynchronous, paused), cases in settings.items():
        wrong, counts = [], Counter()
        for case in cases:
            options = {"page_size": size} if case.make().drops_blocks else {}
            llm = make_llm(
                folder,
                Case(case.policy, case.options | options, case.recent, case.protection),
                budget=UNBOUNDED,
                device=device,
                dtype="float32",
                block_size=size,
                max_num_batched_tokens=chunk,
                async_compression=asynchronous,
                debug=False,
            )
            if hit:
                llm.generate(prompts, new, use_tqdm=False)
            if paused:
                pause_now_and_then(llm, share=0.5)
            outputs = llm.generate(prompts, new, use_tqdm=False)
            if tokens_of(outputs) != expected or llm.stats.compressions_ordered:
                wrong.append(case.policy)
            counts["cached_tokens"] += sum(output.metrics.cached_tokens for output in outputs)
            counts["pauses"] += llm.stats.pauses
        rows.append(
            {
                "block_size": size,
                "chunk": chunk,
                "prefix_hit": hit,
                "async": asynchronous,
                "paused": paused,
                "policies": len(cases),
                "differ": wrong,
                **counts,
                "ok": not wrong
                and (counts["pauses"] > 0) == paused
                and (counts["cached_tokens"] > 0) == (hit and size < max(LENGTHS)),
            }
        )
    return rows


def check_bounded(folder: Path, device: str, full: bool) -> list[dict]:
    """One row a policy: variants whose tokens differ from those of the requests alone."""
    prompts = random_prompts(LENGTHS, VOCAB)
    params = [greedy(90, seed=i) for i in range(len(prompts))]
    variants = [pair for pair in product(BINDING, (False, True)) if not (pair[0] in SYNC_ONLY and pair[1])]
    rows = []
    for number, case in enumerate(ONE_OF_EACH):
        mine = variants if full else variants[number % 3 :: 3]
        llm = make_llm(folder, case, device=device, dtype="float32", async_compression=False)
        alone = [
            tokens_of(llm.generate([prompt], one, use_tqdm=False))[0]
            for prompt, one in zip(prompts, params, strict=True)
        ]
        wrong, counts = [], Counter()
        for name, asynchronous in mine:
            options = {"device": device, "dtype": "float32", "async_compression": asynchronous} | BINDING[name]
            llm = make_llm(folder, case, **options)
            if name == "prefix hit":
                llm.generate(prompts, params, use_tqdm=False)
            events = record_events(llm)
            if name == "paused":
                pause_now_and_then(llm, share=0.3)
            tokens = tokens_of(llm.generate(prompts, params, use_tqdm=False))
            stats = llm.stats
            if tokens != alone or not stats.compressions_applied == stats.compressions_ordered > 0:
                wrong.append(f"{name}, {'async' if asynchronous else 'sync'}")
            for counter in ("compressions_applied", "pauses", "resumes", "preemptions"):
                counts[counter] += getattr(stats, counter)
            counts["ended_while_paused"] += ended_while_paused(events)
        ok = not wrong and counts["pauses"] == counts["resumes"] + counts["ended_while_paused"]
        ok &= counts["pauses"] > 0 or "paused" not in dict(mine)
        rows.append({"case": str(case), "variants": len(mine), "differ": wrong, **counts, "ok": ok})
    return rows


def check_loops(folder: Path, device: str, full: bool) -> list[dict]:
    """One row a policy, block size and sampling: whether decode graphs, and steps launched ahead, give the tokens of
    eager steps one by one."""
    prompts = random_prompts(LENGTHS * 3, VOCAB)
    stop = {"ignore_eos": True, "stop_token_ids": list(range(3))}
    drawn = [SamplingParams(temperature=1.0, max_tokens=90, seed=i, **stop) for i in range(len(prompts))]
    choices = {"greedy": [greedy(90, seed=i) for i in range(len(prompts))], "drawn, with end tokens": drawn}
    rows = []
    cases = (None, Case("zipage", {"chunk": 32}), Case("random", {}, 16, "prompt"))
    loops = ((True, False, False), (False, False, False), (True, True, True), (False, True, True))
    for case, size, (sampling, params) in (product if full else pairwise)(cases, (16, 64), list(choices.items())):
        tokens = []
        for eager, ahead, beside in loops:
            llm = make_llm(
                folder,
                case,
                budget=128,
                device=device,
                dtype="float32",
                block_size=size,
                num_blocks=40 * 16 // size,
                max_num_seqs=18,
                enforce_eager=eager,
                async_scheduling=ahead,
                **({} if case is None else {"async_compression": beside}),
            )
            tokens.append(tokens_of(llm.generate(prompts, params, use_tqdm=False)))
        name = "full" if case is None else str(case)
        rows.append(
            {
                "case": name,
                "block_size": size,
                "sampling": sampling,
                "requests": len(prompts),
                "ended_early": sum(len(one) < 90 for one in tokens[0]),
                "compressions": llm.stats.compressions_applied,
                "preemptions": llm.stats.preemptions,
                "pauses": llm.stats.pauses,
                "ok": all(other == tokens[0] for other in tokens[1:]),
            }
        )
    return rows


def check_kept(folder: Path, device: str, full: bool) -> list[dict]:
    """One row a case of the policies' tests: events whose kept positions differ from the simulation's."""
    prompt, new, keep, size = 24, 130, 64, 16
    attend, forward = PagedAttention.__call__, Decoder.forward
    rows = []
    for case in CASES if full else ONE_OF_EACH:
        recorder = Recorder()
        # Eager, since the recorder cannot look into a graph.
        options = {"device": device, "dtype": "float32", "trace_positions": True, "enforce_eager": True}
        llm = make_llm(folder, case, budget=keep, **options)
        # Not before: to plan its memory, the engine runs a largest step.
        PagedAttention.__call__, Decoder.forward = recorder.wrap(attend), recorder.watch(forward)
        try:
            events = record_events(llm)
            llm.generate(random_prompts([prompt], VOCAB, seed=3), greedy(new, seed=5), use_tqdm=False)
        finally:
            PagedAttention.__call__, Decoder.forward = attend, forward
        simulation = Simulation(
            policy=case.policy,
            options=case.options,
            **recorder.arrays(llm),
            seed=5,
            prompt_len=prompt,
            keep=keep,
            recent=case.recent,
            protection=case.protection,
        )
        expected = simulation.run([keep + size] * len(events))
        wrong = [
            event.round
            for event, kept in zip(events, expected, strict=True)
            if any(event.kept_positions[place].tolist() != positions for place, positions in kept.items())
        ]
        rows.append({"case": str(case), "events": len(events), "differ": wrong, "ok": bool(events) and not wrong})
    return rows


CHECKS = {
    "unbounded": check_unbounded,
    "bounded": check_bounded,
    "loops": check_loops,
    "kept": check_kept,
    "sliding": check_sliding,
}
SECTIONS = (*CHECKS, "decode", "long")


def versions(device: str = "cuda") -> dict[str, str]:
    """What a record says of the machine."""
    return {
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--long-tokens", type=int, default=16_384)
    parser.add_argument("--full", action="store_true", help="every combination of the settings")
    args = parser.parse_args()
    chosen = args.only.split(",")
    unknown = sorted(set(chosen) - set(SECTIONS))
    if unknown:
        parser.error(f"--only {unknown[0]}: must be of {', '.join(SECTIONS)}")
    record = {
        "command": f"python -m tests.gpu.check_compressed_engine --only {args.only} --long-tokens {args.long_tokens}"
        + " --full" * args.full,
        "commit": args.commit,
        **versions(args.device),
    }
    good, summary = True, []
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model("qwen3", Path(folder))
        for section, check in CHECKS.items():
            if section not in chosen:
                continue
            begin = time.perf_counter()
            rows = record[section] = check(Path(folder), args.device, args.full)
            bad = [row for row in rows if not row["ok"]]
            good &= not bad
            seconds = time.perf_counter() - begin
            summary.append(f"{section}: {len(rows) - len(bad)} of {len(rows)} rows agree in {seconds:.0f} s")
            print(summary[-1], flush=True)
            for row in bad:
                print("  ", row)
            args.out.write_text(json.dumps(record | {"passed": good}, indent=1) + "\n")
    if "decode" in chosen:
        decode = record["decode"] = measure_decode(args.device, args.full)
        good &= decode["ok"]
        summary.append("compression takes " + ", ".join(share(row) for row in decode["rows"] if not row["async"]))
    if "long" in chosen:
        long = record["long"] = measure_long(args.device, args.long_tokens)
        good &= long["ok"]
        print({name: value for name, value in long.items() if not isinstance(value, list)}, flush=True)
        low, high = long["settled_bytes"]
        summary.append(
            f"{long['finished']} of {long['requests']} requests of {args.long_tokens} tokens ended in "
            f"{long['seconds']:.0f} s, and memory moved by {(high - low) / 2**20:.1f} MiB"
        )
    record["passed"] = good
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("; ".join(summary))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
