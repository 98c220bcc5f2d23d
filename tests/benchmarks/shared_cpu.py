"""Tokens a second of the engine on a CPU beside idle and beside busy cores, by how its threads wait.

    python -m tests.benchmarks.shared_cpu --models tiny models/zipage-reasoner --rounds 5 --out FILE

In each round every way runs once beside nobody and once beside as many spinning processes as there are cores, one after
another, each in a process of its own. What is printed are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64},
}
"""Random weights of these sizes; any other name is a model's folder."""
WAYS = {
    "spinning": {},  # what libgomp does where nobody says otherwise
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SPIN = (sys.executable, "-c", "while True: pass")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.shared_cpu")
    parser.add_argument("--models", nargs="+", default=["tiny", "models/zipage-reasoner"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", metavar="MODEL", help="measure in this process, with torch loaded before zipage")
    options = parser.parse_args()
    if options.one:
        print(tokens_per_second(options.one, options.requests, options.tokens))
        return
    cores = len(os.sched_getaffinity(0))
    rows = []
    for model in options.models:
        rates: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for neighbours, count in (("idle", 0), ("busy", cores)):
                for way, variables in WAYS.items():
                    spinners = [subprocess.Popen(SPIN) for _ in range(count)]
                    try:
                        rate = in_a_process(model, options, variables)
                    finally:
                        for spinner in spinners:
                            spinner.kill()
                            spinner.wait()
                    rates.setdefault((neighbours, way), []).append(rate)
        for (neighbours, way), values in rates.items():
            rows.append({"model": model, "neighbours": neighbours, "way": way, "tokens_per_second": values})
            middle, least, most = statistics.median(values), min(values), max(values)
            print(f"{model:24} {neighbours:5} {way:11} {middle:8,.0f} [{least:,.0f}, {most:,.0f}]", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"cores": cores, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def in_a_process(model: str, options: argparse.Namespace, variables: dict[str, str]) -> float:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    sizes = ("--requests", str(options.requests), "--tokens", str(options.tokens))
    command = [sys.executable, "-m", "tests.benchmarks.shared_cpu", "--one", model, *sizes]
    done = subprocess.run(command, env=clean | variables, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def tokens_per_second(model: str, requests: int, tokens: int) -> float:
    import torch  # noqa: F401

    from experiments.bench.gate import SHAPE
    from zipage import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        load_format = "auto"
        if model in SHAPES:
            (Path(folder) / "config.json").write_text(json.dumps(SHAPE | SHAPES[model]))
            model, load_format = folder, "dummy"
        sizes = {"block_size": 16, "num_blocks": 256}
        llm = LLM(model, load_format=load_format, device="cpu", skip_tokenizer_init=True, **sizes)
    prompts = [[10 + number, 11, 12, 13] for number in range(requests)]

    def generate(count: int) -> float:
        begin = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - begin

    generate(4)
    return requests * tokens / generate(tokens)


if __name__ == "__main__":
    main()
