"""`scenario=engine_bench`: engines under loads, one after another.

Zipage's arms run in this process, each engine shut down and freed before the next; those of other engines in processes
of their own, since some never give a GPU's memory back.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from experiments.backends import BackendFactory
from experiments.bench.gate import why_refused
from experiments.bench.kind import Keep, Measure
from experiments.bench.loads import Arm, read_arms
from experiments.bench.measure import device_used, measure, refused
from experiments.bench.roofline import ModelShape
from experiments.config.schema import EngineOptions, Experiment
from experiments.errors import UsageError, one_line
from experiments.records.sources import own_policy
from experiments.running.child import reason_of, run_child
from experiments.running.models import find_model
from zipage import EngineConfig

WORKER = (sys.executable, "-m", "experiments.bench.worker")


def prepare(experiment: Experiment, backends: Mapping[str, BackendFactory]) -> tuple[Any, Measure]:
    """As `experiments.bench.kind.Bench` says; the inputs are the loads and the model's files.

    Raises:
        UsageError: a load or the model can't be read, an option is wrong, or the loads are too large for a CPU.
    """
    if experiment.model.load_format != "dummy":
        raise UsageError(f"model.load_format={experiment.model.load_format}: a benchmark takes random weights: dummy")
    model, default, device = find_model(experiment.model), vars(EngineOptions()), experiment.hardware.device
    given = {name: value for name, value in vars(experiment.engine).items() if value != default[name]}
    arms = read_arms(
        experiment.scenario.loads,
        model=str(model.path),
        given=given | {"device": device},
        changes=experiment.scenario.options,
        trace=experiment.scenario.path,
        seed=experiment.seed,
        repeats=experiment.scenario.repeats,
        backends=backends,
    )
    _check_memory(arms, Path(model.path), device)
    loads = [arm.plain() | {"options": arm.options | {"model": None}} for arm in arms]

    def run(keep: Keep) -> tuple[list[dict], dict]:
        from zipage import measure_ceilings

        try:
            ceilings = measure_ceilings(device)
        except ValueError as error:
            raise UsageError(f"scenario=engine_bench: {error}") from error
        if ceilings is None:
            print("no CUDA device: no roofline to compare with", flush=True)
        ceilings = ceilings and asdict(ceilings)
        rows = []
        for number, arm in enumerate(arms, 1):
            begin = time.perf_counter()
            try:
                rows.append(_measured(arm, backends, ceilings))
            except KeyboardInterrupt:
                if not rows:
                    raise
                rows += [refused(late, "interrupted") for late in arms[number - 1 :]]
                print("interrupted: what was measured is recorded", flush=True)
                break
            keep(rows)
            rate = rows[-1].get("tokens_per_second")
            said = f"refused: {rows[-1]['refused']}" if rate is None else f"{rate:,.0f} tokens/s"
            print(f"{number}/{len(arms)} {arm.title}: {said} ({time.perf_counter() - begin:.0f} s)", flush=True)
        return rows, {"ceilings": ceilings}

    policies = {arm.options["policy"] for arm in arms if arm.is_own and ":" in arm.options.get("policy", "")}
    own = {"policies": {name: own_policy(name) for name in policies}} if policies else {}
    return {"loads": loads, "model": model.files} | own, run


def _check_memory(arms: Sequence[Arm], model: Path, device: str) -> None:
    """Raise UsageError where loads are made for a GPU and there is none, or a CPU's memory can't hold them."""
    import torch

    if device == "auto" and not torch.cuda.is_available():
        raise UsageError(
            "scenario=engine_bench: no CUDA device here: hardware=cpu takes small loads, scenario.loads=[FILE.yaml] "
            "with model.path=FOLDER"
        )
    available = _memory_available() if device == "cpu" else None
    for arm in arms:
        shape = ModelShape.read(model, arm.options.get("dtype", "auto"), device)
        blocks = arm.options.get("num_blocks")
        pool = arm.options.get("kv_cache_memory_bytes") or 0
        if blocks:
            pool = blocks * arm.options.get("block_size", EngineConfig.block_size) * shape.kv_bytes
        if available is not None and shape.held_weights + pool > available:
            raise UsageError(
                f"scenario=engine_bench: {arm.title} needs {(shape.held_weights + pool) / 1e9:.0f} GB of memory, "
                f"{available / 1e9:.0f} are free: take a smaller model.path or a smaller pool"
            )


def _memory_available() -> float | None:
    """Bytes of this machine's memory that programs can still get; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _measured(arm: Arm, backends: Mapping[str, BackendFactory], ceilings: Mapping[str, float] | None) -> dict:
    """The row of an arm; where an arm fails, its row says why and the others go on."""
    try:
        if not arm.is_own:
            return _in_child(arm, ceilings)
        device_used(arm.options["device"])  # the engine before is gone before the gate takes memory
        reason = _gate(json.dumps({name: value for name, value in arm.options.items() if name != "model"}))
        if reason is not None:
            return refused(arm, reason)
        return measure(arm, backends[arm.backend], ceilings, device_used(arm.options["device"]))
    except Exception as error:
        return refused(arm, one_line(error))


@cache
def _gate(options: str) -> str | None:
    """The gate's verdict on options, as JSON: loads that share them ask once."""
    return why_refused(json.loads(options))


def _in_child(arm: Arm, ceilings: Mapping[str, float] | None) -> dict:
    used = device_used(arm.options["device"])
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "arm.json", Path(folder) / "row.json"
        source.write_text(json.dumps({"arm": arm.plain(), "ceilings": ceilings, "used_before": used}))
        code, output = run_child([*WORKER, str(source), str(target)], lambda: f"  {arm.title}")
        if code == 0 and target.exists():
            return json.loads(target.read_text(encoding="utf-8"))
        return refused(arm, reason_of(code, output))
