"""A small sweep with `launcher=slurm` on a real Slurm of one node, of whose jobs one is killed and one is requeued.

    python -m tests.slurm.one_node

Needs root, Debian's packages slurmctld, slurmd, slurm-client and munge, and the extra `slurm`. It uses the shipped
model on the CPU and takes a minute or two. The record, `results/records/slurm_one_node.json`, has what the sweep
printed. Exits with 1 unless each arm has its record, and only the two that were ended were begun again.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments import records
from experiments.records import claims, load_runs, provenance
from tests.slurm.cluster import Absent, cluster

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "results" / "records" / "slurm_one_node.json"
SWEEP = """
axes: {model: reasoner, workload: chained_arithmetic, limit: 2, engine.block_size: 16, engine.num_blocks: 400,
       hardware: cpu, hardware.threads: 1, seed: [0, 1, 2]}
arms:
  - policy: full
  - {policy: zipage, policy.budget_tokens: 640}
"""
OPTIONS = (
    "launcher=slurm",
    "launcher.workers=3",
    "launcher.array_parallelism=2",
    "launcher.cpus=1",
    "launcher.timeout=30",
)
SECONDS = 600.0
"""For the sweep, and for each thing that is waited for."""


def main() -> int:
    code = provenance.code_state()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            with cluster(folder / "slurm") as environment:
                record = {"versions": versions(environment)} | measure(folder, environment)
                config = (folder / "slurm" / "slurm.conf").read_text(encoding="utf-8").replace(scratch, "FOLDER")
        except Absent as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    record = {"date": provenance.now(), "code": code, "slurm_conf": config.strip().splitlines()} | record
    records.write_json(RECORD, record)
    print(f"{'passed' if record['passed'] else 'FAILED'}: {RECORD.relative_to(ROOT)}")
    return 0 if record["passed"] else 1


def measure(folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run the sweep. Returns what is recorded of it."""
    results, file = folder / "runs", folder / "sweep.yaml"
    file.write_text(SWEEP, encoding="utf-8")
    command = ["-m", "experiments.run", f"+sweep={file}", f"results_dir={results}", *OPTIONS]
    begin = time.monotonic()
    with (folder / "output").open("w+", encoding="utf-8") as output:
        sweep = subprocess.Popen(
            [sys.executable, "-u", *command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            wait_for(lambda: len(owners(results)) == 2, sweep)
            (killed, lost), (requeued, job) = owners(results).items()
            events = [event(begin, f"kill -9 of process {killed} of {lost['worker']}")]
            os.kill(killed, signal.SIGKILL)
            wait_for(lambda: killed not in owners(results), sweep)
            events.append(event(begin, f"the arm of {lost['worker']} is free"))
            number = re.search(r"job (\w+)", job["worker"])[1]
            events.append(event(begin, f"scontrol requeue {number}"))
            subprocess.run(["scontrol", "requeue", number], env=environment, check=True)
            wait_for(lambda: requeued not in owners(results), sweep)
            events.append(event(begin, f"{job['worker']} has ended"))
            code = sweep.wait(SECONDS)
        finally:
            sweep.kill()
        seconds = time.monotonic() - begin
        output.seek(0)
        lines = output.read().replace(str(folder), "FOLDER").splitlines()
    print(*lines, sep="\n", flush=True)
    runs = load_runs(results)
    free = not list((results / claims.FOLDER).iterdir())
    begun, again = (sum(what in line for line in lines) for what in (" begins on ", " begins again on "))
    passed = (code, len(runs), runs.attrs["incomplete"], free, begun, again) == (0, 6, 0, True, 6, 2)
    return {
        "passed": passed,
        "command": shlex.join(["python", *command]).replace(str(folder), "FOLDER"),
        "sweep": SWEEP.strip().splitlines(),
        "exit_code": code,
        "seconds": round(seconds, 1),
        "runs": sorted(runs["run"]),
        "incomplete": runs.attrs["incomplete"],
        "claims_left": not free,
        "begun": begun,
        "begun_again": again,
        "events": events,
        "output": lines,
    }


def owners(results: Path) -> dict[int, dict[str, Any]]:
    """Process -> claim, of the jobs that run an arm now."""
    names = {path.name.rpartition(".")[0].rpartition(".")[0] for path in results.glob("*.partial")}
    found = [claims.holder(results / name) for name in names]
    return {owner["pid"]: owner for owner in found if owner is not None}


def wait_for(condition: Callable[[], bool], sweep: subprocess.Popen) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        if sweep.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the sweep went another way (exit code {sweep.poll()})")
        time.sleep(0.1)


def event(begin: float, what: str) -> dict[str, Any]:
    print(f"-- {what}", flush=True)
    return {"seconds": round(time.monotonic() - begin, 1), "what": what}


def versions(environment: dict[str, str]) -> dict[str, str]:
    command = ["scontrol", "--version"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    packages = {name: version(name) for name in ("submitit", "torch", "zipage")}
    return {"slurm": said[-1], "python": platform.python_version(), "system": platform.platform()} | packages


if __name__ == "__main__":
    sys.exit(main())
