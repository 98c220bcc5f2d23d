"""`scenario=serve_bench`: servers under load over HTTP, one after another.

Each server and each client is a process of its own (`experiments.serving`). A server that dies or does not come up
costs its arm alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.backends import BackendFactory
from experiments.bench.engine import WORKER
from experiments.bench.kind import Keep, Measure
from experiments.bench.loads import Arm
from experiments.bench.rates import lowest_broken, next_rate
from experiments.bench.roofline import ModelShape
from experiments.bench.serve_loads import ServedArm, read_served_arms, shortened
from experiments.config.schema import EngineOptions, Experiment
from experiments.errors import RunError, UsageError, one_line
from experiments.records import content_hash
from experiments.records.sources import own_policy
from experiments.running.child import reason_of, run_child
from experiments.running.models import LocalModel, find_model
from experiments.serving.drive import Task
from experiments.serving.server import NAME, RunningServer, command, free_port

DRIVE = (sys.executable, "-m", "experiments.serving.drive")
MOST_CLOSED = 1800.0
"""Seconds that a closed loop may take."""


def prepare(experiment: Experiment, backends: Mapping[str, BackendFactory]) -> tuple[Any, Measure]:
    """As `experiments.bench.kind.Bench` says; the inputs are the loads and the model's files.

    Raises:
        UsageError: a load or the model can't be read, or an option is wrong.
    """
    if experiment.scenario.repeats != 1:
        raise UsageError(
            f"scenario.repeats={experiment.scenario.repeats}: must be 1: scenario.options.seconds=N measures longer"
        )
    model = find_model(experiment.model)
    arms = served_arms(experiment, model, backends)
    vocab_size = ModelShape.read(Path(model.path), "float32", "cpu").vocab_size
    threads = experiment.hardware.threads

    def run(keep: Keep) -> tuple[list[dict], dict]:
        rows: list[dict] = []
        for number, arm in enumerate(arms, 1):
            print(f"{number}/{len(arms)} {arm.title}", flush=True)
            begin = time.perf_counter()
            try:
                for row in _rows(arm, rows, vocab_size, threads):
                    rows.append(row)
                    keep(rows)
                    print(f"  {_said(row)} ({time.perf_counter() - begin:.0f} s)", flush=True)
                    begin = time.perf_counter()
            except KeyboardInterrupt:
                if not rows:
                    raise
                rows += [_names(late) | {"refused": "interrupted"} for late in arms[number - 1 :]]
                print("interrupted: what was measured is recorded", flush=True)
                break
            except Exception as error:  # an arm's, whatever it is, costs the others nothing
                reason = str(error) if isinstance(error, RunError) else one_line(error)
                rows.append(_names(arm) | {"refused": reason})
                keep(rows)
                print(f"  refused: {reason}", flush=True)
        return rows, {}

    policies = {arm.options["policy"] for arm in arms if ":" in arm.options.get("policy", "")}
    own = {"policies": {name: own_policy(name) for name in policies}} if policies else {}
    return {"loads": content_hash([arm.plain() for arm in arms]), "model": model.files} | own, run


def served_arms(experiment: Experiment, model: LocalModel, backends: Mapping[str, BackendFactory]) -> list[ServedArm]:
    """Those of an experiment, in order. Raises UsageError as `read_served_arms`."""
    default = vars(EngineOptions())
    given = {name: value for name, value in vars(experiment.engine).items() if value != default[name]}
    return read_served_arms(
        experiment.scenario.loads,
        model=str(model.path),
        load_format=experiment.model.load_format,
        has_tokenizer=model.has_tokenizer and experiment.model.load_format != "dummy",
        given=given | {"device": experiment.hardware.device},
        changes=experiment.scenario.options,
        trace=experiment.scenario.path,
        seed=experiment.seed,
        backends=backends,
    )


def _rows(arm: ServedArm, before: list[dict], vocab_size: int, threads: int | None) -> Iterator[dict]:
    """A row for each load that the arm was put under.

    Raises:
        RunError: its server or its client ended, or the server did not let go of aborted requests.
    """
    spec, port = arm.spec, free_port()
    offline = None if spec.streams is None else _offline(arm)
    words, environment = command(arm.backend, arm.options, port, arm.flags)
    environment |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with RunningServer(words, port, environment) as server:
        server.wait_until_ready(spec.startup)
        client = _Client(arm, server, vocab_size)
        client.warm_up()
        if spec.streams is not None:
            row = client.closed("closed", arm.requests, spec.streams, MOST_CLOSED)
            yield row | {"offline": offline, "of_offline": row["tokens_per_second"] / offline}
            client.check(row)
        measured: dict[float, bool] = {}

        def at(rates: list[float]) -> Iterator[dict]:
            for rate in rates:
                if rate not in measured:
                    row = client.at(rate)
                    measured[rate] = row["slo_holds"]
                    yield row
                    client.check(row)

        yield from at([float(rate) for rate in spec.rates])
        if spec.search is not None:
            low, high, steps = (spec.search[name] for name in ("low", "high", "steps"))
            while (rate := next_rate(measured, float(low), float(high), steps)) is not None:
                yield from at([rate])
        if spec.at_break_of not in (None, arm.name):
            rate = lowest_broken(before, arm.load, spec.at_break_of)
            yield from at([] if rate is None else [rate])


class _Client:
    """Puts loads on a server, from a process for each."""

    def __init__(self, arm: ServedArm, server: RunningServer, vocab_size: int) -> None:
        self._arm, self._server, self._vocab_size = arm, server, vocab_size
        spec = arm.spec
        self._common = {
            "model": NAME,
            "temperature": spec.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | spec.request
        self._names = _names(arm) | {"startup_seconds": server.startup}

    def warm_up(self) -> None:
        """Raise RunError where no request is answered."""
        requests = shortened(self._arm)
        if requests:
            row = self.closed("warm-up", requests, len(requests), MOST_CLOSED)
            if not row["finished"]:
                raise RunError(f"the server answers no request: {row['error'] or 'they did not end in time'}")
            self.check(row)

    def at(self, rate: float) -> dict[str, Any]:
        spec = self._arm.spec
        bounds = {name: float(getattr(spec, name)) for name in ("warmup", "seconds", "drain", "patience")}
        return self._driven(f"rate {rate:g}", self._arm.arriving(rate), **bounds) | {"rate": rate}

    def closed(self, label: str, requests: list, streams: int, seconds: float) -> dict[str, Any]:
        return self._driven(label, requests, streams=streams, seconds=seconds) | {"streams": streams}

    def check(self, row: Mapping[str, Any]) -> None:
        if row.get("left"):
            raise RunError(f"the server still ran {row['left']} requests long after they were aborted")

    def _driven(self, label: str, requests: list, **bounds: Any) -> dict[str, Any]:
        task = Task(
            port=self._server.port, requests=requests, seed=f"{self._arm.seed} {label}", vocab_size=self._vocab_size,
            common=self._common, slo=self._arm.spec.slo, **bounds,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "task.json", Path(folder) / "row.json"
            source.write_text(json.dumps(task.plain()), encoding="utf-8")
            code, output = run_child([*DRIVE, str(source), str(target)], self._server.check)
            self._server.check()
            if code or not target.exists():
                raise RunError(f"the client failed: {reason_of(code or 1, output)}")
            return self._names | json.loads(target.read_text(encoding="utf-8"))


def _offline(arm: ServedArm) -> float:
    """Tokens a second of the same requests without a server, all there at the start, as `engine_bench` measures them.

    Raises:
        RunError: the engine failed.
    """
    spec = arm.spec
    lengths = [[request.prompt_tokens, request.output_tokens] for request in arm.requests]
    offline = Arm(
        load=arm.load, name=arm.name, backend=arm.backend, options=arm.options, lengths=lengths,
        temperature=spec.temperature, warmup_tokens=max(1, spec.warmup_tokens), window_steps=None, seed=arm.seed,
        repeats=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "arm.json", Path(folder) / "row.json"
        task = {"arm": offline.plain(), "ceilings": None, "used_before": None}
        source.write_text(json.dumps(task), encoding="utf-8")
        code, output = run_child([*WORKER, str(source), str(target)], lambda: None)
        if code or not target.exists():
            raise RunError(f"offline: {reason_of(code or 1, output)}")
        return json.loads(target.read_text(encoding="utf-8"))["tokens_per_second"]


def _names(arm: ServedArm) -> dict[str, Any]:
    policy = arm.options.get("policy", "full")
    return {
        "load": arm.load,
        "arm": arm.name,
        "backend": arm.backend,
        "policy": policy,
        "budget_tokens": arm.options.get("budget_tokens") if policy != "full" else None,
        "gpus": arm.gpus,
        "slo": arm.spec.slo,
        "rate": None,
        "streams": None,
        "refused": None,
    }


def _said(row: Mapping[str, Any]) -> str:
    load = f"{row['streams']} streams" if row["rate"] is None else f"{row['rate']:g} requests/s"
    ttft, itl = (row[name] and row[name]["p99"] for name in ("ttft", "itl"))
    tails = ", ".join(f"{name} p99 {1e3 * t:,.0f} ms" for name, t in (("TTFT", ttft), ("ITL", itl)) if t is not None)
    verdict = "broken" if row["broken"] else "limits hold" if row["slo_holds"] else "limits do not hold"
    late = "; THE CLIENT WAS LATE" if row["client_late"] else ""
    return f"{load}: {row['tokens_per_second']:,.0f} tokens/s, {tails}, {row['goodput']:.2f} in time/s: {verdict}{late}"
