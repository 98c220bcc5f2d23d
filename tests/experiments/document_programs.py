"""Programs that the documents name, in less than full size: each is tried with the options that are written there."""

import importlib
import json
from pathlib import Path

import httpx

from experiments.backends import BACKENDS
from experiments.config.arms import expand
from experiments.config.compose import load_experiment
from experiments.config.schema import Experiment, LauncherConfig
from experiments.paths import ROOT
from experiments.running import job, sweep

PLANNED: dict[tuple[str, ...], str] = {}
"""Sweeps with what decides their arms -> the command that has planned them all."""

SHORTENED = ("warmup=", "seconds=", "drain=", "begun=")


def planned(sweeps: list[str], arguments: list[str], command: str) -> list[Experiment]:
    """The arms of a sweep. Of one that another command has planned the first one: all are launched alike."""
    elsewhere = ("launcher", "results_dir=", "workload.path=")
    key = (*sweeps, *(argument for argument in arguments if not argument.startswith(elsewhere)))
    if PLANNED.setdefault(key, command) == command:
        arms = [arm.experiment for arm in sweep.plan(sweeps, arguments, BACKENDS)]
        assert len(arms) > 1
        return arms
    first = job.prepare(load_experiment(expand(sweeps, arguments)[0]), BACKENDS).experiment
    assert "launcher" not in command or first.launcher != LauncherConfig()
    return [first]


def calibrate_a_little(given: list[str], request) -> None:
    """In full it takes minutes."""
    request.getfixturevalue("monkeypatch").setattr("experiments.calibration.answers.AT_ONCE", 8)
    out = request.getfixturevalue("tmp_path") / "file"
    program = importlib.import_module("experiments.calibrate")
    assert program.main([*given, "--out", str(out), "--tokens", "200", "--max-tokens", "8", "--device", "cpu"]) == 0
    assert out.exists()


def train_a_little(given: list[str], request) -> None:
    """In full it takes minutes."""
    request.getfixturevalue("monkeypatch").setattr("experiments.calibration.answers.AT_ONCE", 8)
    out = Path(given[given.index("--out") + 1]).name
    given[given.index("--out") + 1] = str(request.getfixturevalue("tmp_path") / out)
    program = importlib.import_module("experiments.train_scorer")
    assert program.main([*given, "--tokens", "2200", "--max-tokens", "8", "--device", "cpu"]) == 0


def simulate(module: str, given: list[str], request) -> None:
    """Of all records one short one is simulated, and nothing is fitted: tests/experiments/simulation does that."""
    patch, folder = request.getfixturevalue("monkeypatch"), request.getfixturevalue("tmp_path")
    program = importlib.import_module(module)
    if module.endswith("fit"):
        patch.setattr(program, "_of_servers", lambda machine, *_: machine)
        several = "device", "sum", "host", "few_rows"
        for stage in (
            *(f"{name}_constants" for name in several),
            "block_constant",
            "launch_constant",
            "imbalance_constant",
        ):
            patch.setattr(program, stage, lambda machine, *_: machine)
    elif given[0] in ("serve", "fleet", "capacity"):
        given = ["examples/traffic.csv" if option == "FILE" else option for option in given]
        at = given.index("--set") if "--set" in given else len(given)
        end = next((place for place in range(at + 1, len(given)) if given[place].startswith("--")), len(given))
        changed = [option for option in given[at + 1 : end] if not option.startswith(SHORTENED)]
        given = given[:at] + given[end:] + ["--set", *changed, "warmup=1", "seconds=2", "drain=1", "begun=null"]
    elif given[0] == "paper":
        rates = dict.fromkeys(("full KV", "zipage"), 1.0)
        patch.setattr(program.paper, "pairs", lambda folders: {"a model": {}})
        patch.setattr(program.paper, "_row", lambda model, *_: {"model": model, "measured": rates, "simulated": rates})
    else:
        assert [path for option in given if option.startswith("results/") for path in ROOT.glob(option)]
        patch.setattr(program, "measured_runs", lambda record: [])
        short = [ROOT / "results" / "records" / "engine_bench_short_256_h100"]
        patch.setattr(program, "_benchmarks", lambda record: short)
        given = [option for option in given if not option.startswith("results/")] + [str(short[0])]
    if "--out" in given:
        given[given.index("--out") + 1] = str(folder / "out")
    assert program.main(given) == 0


def send_body(given: list[str], request) -> None:
    """What curl would send is answered."""
    served, tiny = request.getfixturevalue("served"), request.getfixturevalue("tiny")
    url, *options = given
    values = dict(zip(options[::2], options[1::2], strict=True))
    assert set(values) == {"-H", "-d"}
    body = json.loads(values["-d"]) | {"model": str(tiny), "max_completion_tokens": 4}
    headers = dict([values["-H"].split(": ")])
    answer = httpx.post(url.replace("http://127.0.0.1:8000", served), headers=headers, json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 4
