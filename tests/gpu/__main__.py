"""All checks of this folder in one command, with one verdict and one small record.

    python -m tests.gpu [--commit COMMIT] [--full] [--only NAMES --out FILE]

Each check is a process of its own with a limit of time. One that raises, is killed or runs out of time has failed; the
others run all the same. Those that neither time anything nor plan by the free memory run beside each other, the rest
after them, one by one. The record, `results/records/gpu_checks.json`, is written as verdicts come, and holds but one
line of each check. Exits with 1 unless all passed. Needs torch, triton, transformers and pytest, and one GPU.

Without `--full` the checks take grids in which any two values meet, and ten minutes are the limit of all. Those that
need several GPUs are left out where there is one, which the record shows (`gpus`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "results" / "records" / "gpu_checks.json"
SECONDS = 580.0
"""Of all checks together, without `--full`."""

MACHINE = """
import json, platform, torch, transformers, triton
print(json.dumps({
    "gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(),
    "torch": torch.__version__, "cuda": torch.version.cuda,
    "triton": triton.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
}))
"""


@dataclass(frozen=True)
class Check:
    """A module of this folder and its arguments.

    Attributes:
        limit: seconds, without `--full`.
        alone: on the GPU.
        gpus: that it needs; with fewer it is left out.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    limit: float = 300.0
    alone: bool = False
    gpus: int = 1

    def command(self, out: Path, commit: str, full: bool) -> list[str]:
        given = [*self.arguments, "--out", str(out), "--commit", commit, *["--full"] * full]
        return [sys.executable, "-m", self.module, *given]


KERNELS, COMPRESSION = "tests.gpu.check_kernels", "tests.gpu.check_compression"
ENGINE, COMPRESSED = "tests.gpu.check_engine", "tests.gpu.check_compressed_engine"
UNEQUAL = "tests.gpu.check_unequal"
CHECKS = (
    Check("ranks", "tests.gpu.check_ranks", gpus=2),
    # The longest first.
    Check("bounded", COMPRESSED, ("--only", "bounded")),
    Check("unbounded", COMPRESSED, ("--only", "unbounded")),
    Check("tokens", ENGINE, ("--only", "tokens")),
    Check("compression kernels", COMPRESSION, ("--no-timing",)),
    Check("attention kernels", KERNELS, ("--only", "attention", "--no-timing")),
    Check("loops", COMPRESSED, ("--only", "loops")),
    Check("kept", COMPRESSED, ("--only", "kept")),
    Check("sliding", COMPRESSED, ("--only", "sliding")),
    Check(
        "other kernels",
        KERNELS,
        ("--only", "forms,score_forms,replays,writes,layer_ops,linear,sampling", "--no-timing"),
    ),
    Check("recurrence", "tests.gpu.check_recurrence", ("--no-timing",)),
    Check("unequal budgets", UNEQUAL, ("--only", "tokens,kept")),
    Check("requests", ENGINE, ("--only", "requests")),
    Check("quantized weights", ENGINE, ("--only", "quantized")),
    Check("memory", ENGINE, ("--only", "memory"), limit=150, alone=True),
    Check("decode", COMPRESSED, ("--only", "decode"), limit=150, alone=True),
    Check("policies", "tests.gpu.policy_times", limit=200, alone=True),
    Check("unequal decode", UNEQUAL, ("--only", "speed"), limit=150, alone=True),
    Check("long", COMPRESSED, ("--only", "long", "--long-tokens", "1500"), limit=150, alone=True),
)


class Record:
    """What is known so far, on disk at every moment; methods may be called from several threads."""

    def __init__(self, path: Path, head: dict[str, Any], checks: Iterable[Check]) -> None:
        self._path, self._head = path, head
        self._begin, self._lock = time.monotonic(), threading.Lock()
        self._rows = {check.name: {"check": check.name, "verdict": "not run"} for check in checks}
        self._write()

    def add(self, check: Check, passed: bool, seconds: float, summary: str) -> None:
        row = {"verdict": "passed" if passed else "failed", "seconds": round(seconds, 1), "summary": summary}
        with self._lock:
            self._rows[check.name] |= row
            self._write()
        print(f"{row['verdict']:7}{seconds:6.0f} s  {check.name}: {summary}", flush=True)

    @property
    def passed(self) -> bool:
        return all(row["verdict"] == "passed" for row in self._rows.values())

    def _write(self) -> None:
        seconds = round(time.monotonic() - self._begin, 1)
        record = self._head | {"seconds": seconds, "passed": self.passed, "checks": list(self._rows.values())}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(self._path.name + ".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(self._path)


class Runner:
    """Runs checks, and ends those that still run when it is left.

    Args:
        commit, full: what each check is told.
        deadline: `time.monotonic()` at which every check has ended, or None.
        folder: for their output and their own records.
    """

    def __init__(self, record: Record, commit: str, full: bool, deadline: float | None, folder: Path) -> None:
        self._record, self._commit, self._full = record, commit, full
        self._deadline, self._folder = deadline, folder
        self._running: set[subprocess.Popen] = set()
        self._lock, self._left = threading.Lock(), False

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._left = True
            for process in self._running:
                kill(process)

    def run(self, check: Check, threads: int, gpu: str | None = None) -> None:
        """Run one check, with `threads` of torch on the host, and record its verdict. It sees only `gpu`, or all."""
        begin = time.monotonic()
        limits = [] if self._full else [check.limit]
        limits += [] if self._deadline is None else [self._deadline - begin]
        limit = min(limits, default=None)
        if limit is not None and limit <= 0:
            self._record.add(check, False, 0.0, "not begun: no time was left")
            return
        log = self._folder / f"{check.name.replace(' ', '_')}.log"
        process = self._start(check, log, threads, gpu)
        if process is None:
            return
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill(process)
            process.wait()
        with self._lock:
            self._running.discard(process)
            if self._left:
                return
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        last = lines[-1].strip()[:300]
        if code is None:
            last = f"killed after {limit:.0f} s: {last}"
        elif code not in (0, 1):
            last = f"{f'killed by signal {-code}' if code < 0 else f'exit status {code}'}: {last}"
        self._record.add(check, code == 0, time.monotonic() - begin, last)
        if code != 0:
            print("\n".join(f"    {check.name} | {line}" for line in lines[-30:]), flush=True)

    def _start(self, check: Check, log: Path, threads: int, gpu: str | None) -> subprocess.Popen | None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        settings = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
        settings |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        command = check.command(log.with_suffix(".json"), self._commit, self._full)
        env = os.environ | settings | {"PYTHONPATH": path}
        with log.open("wb") as output, self._lock:
            if self._left:
                return None
            # A group of its own, so that what the check starts ends with it.
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=env, process_group=0
            )
            self._running.add(process)
        return process


def kill(process: subprocess.Popen) -> None:
    """And what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_checks(
    checks: Iterable[Check],
    out: Path,
    head: dict[str, Any],
    *,
    full: bool = False,
    jobs: int = 1,
    seconds: float = SECONDS,
    gpus: Sequence[str] = (),
) -> bool:
    """Whether all passed. `head` is what the record says of code and machine; `jobs` run beside each other.

    Checks that need one GPU take turns with `gpus`, as CUDA_VISIBLE_DEVICES names them; those that must be alone have
    one each. Without any, all see what there is.
    """
    checks = list(checks)
    record = Record(out, head, checks)
    deadline = None if full else time.monotonic() + seconds
    cores = os.cpu_count() or 1
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(jobs) as pool,
        Runner(record, head["commit"], full, deadline, Path(folder)) as runner,
    ):
        turns = cycle(gpus or [None])
        beside = [(check, next(turns) if check.gpus == 1 else None) for check in checks if not check.alone]
        for future in [pool.submit(runner.run, check, max(1, cores // jobs), gpu) for check, gpu in beside]:
            future.result()
        free: SimpleQueue[str | None] = SimpleQueue()
        for gpu in gpus or [None]:
            free.put(gpu)

        def run_alone(check: Check) -> None:
            gpu = free.get()
            try:
                runner.run(check, max(1, cores // max(1, len(gpus))), gpu)
            finally:
                free.put(gpu)

        with ThreadPoolExecutor(max(1, len(gpus))) as places:
            for future in [places.submit(run_alone, check) for check in checks if check.alone]:
                future.result()
    return record.passed


def commit_of_tree() -> str | None:
    """Of this checkout, with a mark where files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", f":!{RECORD.relative_to(ROOT)}")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", help="of the code, for the record; default: $ZIPAGE_COMMIT, or what git says")
    parser.add_argument("--full", action="store_true", help="every combination of every grid, without a limit of time")
    parser.add_argument("--only", help="some of: " + ", ".join(check.name for check in CHECKS))
    parser.add_argument("--out", type=Path, help=f"default: {RECORD.relative_to(ROOT)}; needed beside --only")
    parser.add_argument("--jobs", type=int, help="checks beside each other; default: one for every two cores, up to 9")
    args = parser.parse_args()
    checks = CHECKS
    if args.only is not None:
        names = [name.strip() for name in args.only.split(",")]
        unknown = sorted(set(names) - {check.name for check in CHECKS})
        if unknown:
            parser.error(f"--only {unknown[0]}: must be of {', '.join(check.name for check in CHECKS)}")
        if args.out is None:
            parser.error("--only: name the record with --out, for the kept one is of all checks")
        checks = [check for check in CHECKS if check.name in names]
    commit = args.commit or os.environ.get("ZIPAGE_COMMIT") or commit_of_tree()
    if commit is None:
        parser.error("no git checkout here: give --commit, or set ZIPAGE_COMMIT")
    machine = subprocess.run([sys.executable, "-c", MACHINE], check=False, capture_output=True, text=True)
    if machine.returncode:
        print(machine.stderr.strip().splitlines()[-1], file=sys.stderr)
        parser.error("these checks need a CUDA device, and torch, triton and transformers")
    head = {
        "command": "python -m tests.gpu" + " --full" * args.full + (f" --only {args.only}" if args.only else ""),
        "commit": commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **json.loads(machine.stdout),
    }
    left_out = [check.name for check in checks if check.gpus > head["gpus"]]
    if left_out:
        print(f"left out with {head['gpus']} GPU: {', '.join(left_out)}", flush=True)
    checks = [check for check in checks if check.gpus <= head["gpus"]]
    jobs = args.jobs or max(1, min(9, (os.cpu_count() or 1) // 2))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(head["gpus"]))))
    gpus = visible.replace(" ", "").split(",")[: head["gpus"]]
    passed = run_checks(checks, args.out or RECORD, head, full=args.full, jobs=jobs, gpus=gpus)
    print("PASSED" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
