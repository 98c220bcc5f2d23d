"""Another client's word: `aiperf` and ours under the same loads, one after the other, against the same servers.

python -m tests.benchmarks.witness --aiperf FILE --out FILE

`--aiperf` is its program, of an environment of its own: `python -m venv E && E/bin/pip install aiperf`. The servers are
`zipage serve` with the shipped reasoner on a CPU, and one of known delays (`tests/experiments/serving/fake_server.py`),
whose figures are known beforehand. Two loads: four streams at a time, and a request each half second.

Both measure a request from its sending or due time to its first token (TTFT) and its last (E2E), the time between
chunks (ITL; aiperf's "inter chunk latency") and its mean a request (TPOT; aiperf's "inter token latency").
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from experiments.records import provenance
from experiments.running.child import run_child
from experiments.serving.drive import Task
from experiments.serving.prompts import Asked
from experiments.serving.server import HOST, NAME, RunningServer, command, free_port
from tests.benchmarks.soak import ENGINE, REASONER

PROMPT, OUTPUT, COUNT, STREAMS, RATE = 48, 48, 24, 4, 2.0
DELAYS = {"first": 0.1, "step": 0.02}
"""Seconds of the server of known delays."""
KNOWN = {"ttft p50": 100.0, "itl p50": 20.0, "tpot p50": 20.0, "e2e p50": 1e3 * (0.1 + 0.02 * (OUTPUT - 1))}
THEIRS = {
    "ttft": "time_to_first_token",
    "itl": "inter_chunk_latency",
    "tpot": "inter_token_latency",
    "e2e": "request_latency",
}
LOADS = ("closed", "open")
AIPERF = ("--streaming", "--use-server-token-count", "--no-gpu-telemetry", "--no-server-metrics", "--ui", "none")


def ours(port: int, load: str, seed: str) -> dict[str, float]:
    """Milliseconds by name, and tokens a second."""
    common = {"model": NAME, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    gap = 0.0 if load == "closed" else 1 / RATE
    requests = [Asked(number * gap, PROMPT, OUTPUT) for number in range(COUNT)]
    bounds = {"streams": STREAMS, "seconds": 600.0} if load == "closed" else {"seconds": COUNT * gap, "drain": 60.0}
    vocab_size = json.loads((Path(REASONER) / "config.json").read_text())["vocab_size"]
    task = Task(port=port, requests=requests, seed=seed, vocab_size=vocab_size, common=common, patience=60.0, **bounds)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "task.json", Path(folder) / "row.json"
        source.write_text(json.dumps(task.plain()))
        words = [sys.executable, "-m", "experiments.serving.drive", str(source), str(target)]
        code, output = run_child(words, lambda: None)
        assert code == 0, output
        row = json.loads(target.read_text())
    assert row["finished"] == COUNT, row
    return figures({name: row[name] for name in THEIRS}, row["tokens_per_second"] if load == "closed" else None)


def aiperfs(program: str, port: int, load: str, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        shape = ["--isl", PROMPT, "--isl-stddev", 0, "--osl", OUTPUT, "--osl-stddev", 0, "--request-count", COUNT]
        pace = ["--concurrency", STREAMS] if load == "closed" else ["--request-rate", RATE]
        pace += [] if load == "closed" else ["--arrival-pattern", "constant"]
        server = ["-m", NAME, "--url", f"http://{HOST}:{port}", "--endpoint-type", "completions"]
        words = [program, "profile", *server, *AIPERF, *shape, *pace, "--extra-inputs", "ignore_eos:true"]
        words += ["--tokenizer", REASONER, "--random-seed", seed, "--artifact-dir", folder]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, cwd=folder)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        found = json.loads((Path(folder) / "profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == COUNT, found["request_count"]
    times = {name: {q: found[theirs][q] / 1e3 for q in ("p50", "p99")} for name, theirs in THEIRS.items()}
    return figures(times, found["output_token_throughput"]["avg"] if load == "closed" else None)


def figures(seconds: dict[str, dict[str, float]], tokens_per_second: float | None) -> dict[str, float]:
    found = {f"{name} {q}": 1e3 * seconds[name][q] for name in seconds for q in ("p50", "p99")}
    return found if tokens_per_second is None else found | {"tokens/s": tokens_per_second}


def compare(program: str, port: int, repeats: int) -> dict[str, dict[str, Any]]:
    """By load and figure: each repeat of both, and the ratio of the medians."""
    table: dict[str, dict[str, Any]] = {}
    ours(port, "closed", "warm-up")
    for load in LOADS:
        pairs = [(ours(port, load, str(i)), aiperfs(program, port, load, i)) for i in range(repeats)]
        for name in pairs[0][0]:
            mine, its = [pair[0][name] for pair in pairs], [pair[1][name] for pair in pairs]
            row = {"ours": mine, "aiperf": its, "ratio": median(mine) / median(its)}
            table[f"{load}, {name}"] = row
            print(f"{load:7} {name:9} ours {median(mine):8.1f}  aiperf {median(its):8.1f}  {row['ratio']:.3f}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--aiperf", required=True, metavar="FILE", help="its program")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    version = subprocess.run([given.aiperf, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    tables = {}
    for name in ("known delays", "zipage serve"):
        port = free_port()
        words, environment = command("zipage", {"model": REASONER} | ENGINE, port)
        if name == "known delays":
            words = [sys.executable, "-m", "tests.experiments.serving.fake_server", str(port), json.dumps(DELAYS)]
        with RunningServer(words, port, environment) as server:
            server.wait_until_ready(120)
            print(name, flush=True)
            tables[name] = compare(given.aiperf, port, given.repeats)
    if given.out:
        load = {"prompt_tokens": PROMPT, "output_tokens": OUTPUT, "requests": COUNT, "streams": STREAMS, "rate": RATE}
        record = {"what": "our client's figures and aiperf's, in ms and tokens/s", "aiperf": version, "load": load}
        record |= {"engine": ENGINE, "delays": DELAYS, "known": KNOWN, "tables": tables}
        origin = provenance.collect(["-m", "tests.benchmarks.witness", "--aiperf", "aiperf", "--out", given.out.name])
        given.out.write_text(json.dumps(record | {"provenance": origin}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
