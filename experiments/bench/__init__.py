"""Benchmarks: runs that time kernels or the engine and ask no questions.

One is chosen as a scenario (`scenario=kernels`, `engine_bench`, `serve_bench`) and leaves a folder like any run's, with
`rows.json` instead of samples: one row a line of its table. Where the process is killed, the rows that it had are
in the folder's `.partial` until the next attempt.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from experiments import records
from experiments.backends import BACKENDS, BackendFactory
from experiments.bench import engine, kernels, serve
from experiments.bench.kind import Bench
from experiments.bench.pictures import picture
from experiments.bench.tables import markdown
from experiments.config.compose import load_experiment
from experiments.config.schema import Experiment, to_dict
from experiments.errors import RunError, UsageError, after_record
from experiments.records import provenance, sources
from experiments.running.tracking import open_tracker

ALWAYS = ("hardware.", "scenario.repeats", "tracking.", "results_dir", "force")

BENCHES = {
    "kernels": Bench(kernels.prepare, ("scenario.options",)),
    "engine_bench": Bench(
        engine.prepare, ("scenario.loads", "scenario.path", "scenario.options", "model.", "engine.", "seed")
    ),
    "serve_bench": Bench(
        serve.prepare, ("scenario.loads", "scenario.path", "scenario.options", "model.", "engine.", "seed")
    ),
}


def run(experiment: Experiment, backends: Mapping[str, BackendFactory] = BACKENDS) -> Path:
    """Run a benchmark, or find it done, and print its table.

    Returns:
        The record's folder.

    Raises:
        UsageError: it can't be run as asked; nothing was recorded.
        RunError: rows were refused; the record says which and why.
    """
    scenario = experiment.scenario
    bench = BENCHES[scenario.kind]
    _refuse_idle(experiment, bench)
    records.check_writable(Path(experiment.results_dir).expanduser())
    inputs, measure = bench.prepare(experiment, backends)
    options = {k: v for k, v in to_dict(experiment).items() if k not in ("results_dir", "force")}
    device = provenance.device_name(experiment.hardware.device)
    run_id = records.benchmark_id(scenario.name, options, inputs=inputs, device=device)
    folder = Path(experiment.results_dir).expanduser() / run_id
    hashes = sources.of_benchmarks(scenario.kind)
    standing = sources.standing(folder, hashes)
    if standing.state == "damaged" and experiment.force == "false":
        raise UsageError(f"{folder}: its record is damaged ({standing.reason}); force=stale replaces it")
    if standing.is_kept(experiment.force):
        with after_record():
            print("already done; force=true runs it again")
            _show(folder)
            if standing.state == "stale":
                print(f"note: this benchmark is stale: {standing.reason}; force=stale runs it again", flush=True)
        return folder
    with records.claim(folder) as staging:
        if experiment.hardware.threads is not None:
            import torch

            torch.set_num_threads(experiment.hardware.threads)
        started, begin = provenance.now(), time.perf_counter()
        records.write_config(staging, options)
        origin = provenance.collect() | {"sources": hashes, "started": started, "inputs": inputs}

        tracker = open_tracker(experiment.tracking, run_id, options, folder.parent)

        def keep(rows: list[dict]) -> None:
            tracker.log_rows(rows)
            records.write_json(staging / records.ROWS, rows)
            records.write_json(staging / records.PROVENANCE, origin | {"ended": provenance.now()})

        metrics = None
        try:
            rows, common = measure(keep)
            keep(rows)
            refused = sum(row["refused"] is not None for row in rows)
            metrics = {"rows": len(rows), "refused": refused, "seconds": time.perf_counter() - begin} | common
            tracker.log_benchmark(staging, lambda: picture(records.load_rows(staging)))
        finally:
            tracker.finish(metrics)
        records.publish(staging, folder, metrics)
    with after_record():
        _show(folder)
    if refused:
        raise RunError(f"{refused} of {len(rows)} rows were refused: see {folder / records.ROWS}")
    return folder


def _show(folder: Path) -> Path:
    print(markdown(records.load_rows(folder)))
    print(f"record: {folder}", flush=True)
    return folder


def _refuse_idle(experiment: Experiment, bench: Bench) -> None:
    """Raise a UsageError for an option that was set and means nothing to the benchmark."""
    name = experiment.scenario.name
    given, default = (records.flatten(to_dict(e)) for e in (experiment, load_experiment([f"scenario={name}"])))
    for key, value in given.items():
        if value != default.get(key) and not key.startswith((*ALWAYS, *bench.options)):
            raise UsageError(f"{key}={value!r}: means nothing to scenario={name}; leave it out")
