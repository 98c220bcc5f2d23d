"""Arms of a sweep around one loaded model: who shares with whom, and what a failure costs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from experiments import run
from experiments.config.compose import load_experiment
from experiments.records import load_runs
from experiments.running import job, worker
from experiments.running import sweep as sweep_module
from experiments.running.child import Worker
from experiments.running.lifeline import Child
from tests.experiments.fake_engine import FakeLLM, fake_backend
from tests.experiments.running.forked import ForkedChild
from tests.experiments.running.run_process import ROOT
from tests.experiments.running.sweep_helpers import deterministic, in_place_of_processes, sweep_file

TASKS = """
import json, os, signal, sys

done = os.fdopen(int(sys.argv[1]), "w")
for line in sys.stdin:
    word, *rest = json.loads(line)["arguments"]
    print(word, rest, os.getpid(), flush=True)
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "fail":
        sys.exit(3)
    print("done", file=done, flush=True)
"""


class Counted(FakeLLM):
    """Writes down who loads it, and that it is shut down."""

    def __post_init__(self):
        super().__post_init__()
        with Path(os.environ["LOADS"]).open("a") as file:
            print(os.getpid(), file=file)
        if self.config.budget_tokens == 48:
            self.fail_at = 2

    def shutdown(self):
        with Path(os.environ["LOADS"]).open("a") as file:
            print("shut", file=file)


def fork_functions(command, *how, **with_what) -> Child | ForkedChild:
    return (ForkedChild if callable(command[0]) else Child)(command, *how, **with_what)


def counting_worker() -> int:
    return worker.main({"zipage": lambda **options: Counted(options), "vllm": None})


@pytest.fixture
def share(arguments, tmp_path, monkeypatch):
    """Run a sweep, given as YAML, whose arms share a model; returns its exit code, and who loaded how often."""

    def share(content: str, *more: str) -> tuple[int, Counter]:
        path = tmp_path / "own.yaml"
        path.write_text(content)
        loads = tmp_path / "loads"
        loads.write_text("")
        monkeypatch.setenv("LOADS", str(loads))
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr("experiments.running.child.Child", fork_functions)
        monkeypatch.setattr(sys, "argv", ["run", *arguments, f"+sweep={path}", "+share_model=true", *more])
        backends = fake_backend() | {"transformers": fake_backend()["zipage"]}
        code = run.main(backends, child=["/no/such/command"], worker=[counting_worker])
        return code, Counter(loads.read_text().split())

    return share


def carried_out(worker: Worker, *task: str) -> tuple[int, str]:
    worker.start(task)
    return worker.poll(seconds=20)


def test_worker_does_tasks_until_one_fails():
    worker = Worker([sys.executable, "-c", TASKS])
    outputs = [carried_out(worker, *task) for task in (["a", "b c"], ["d"])]
    pid = outputs[0][1].split()[-1]
    assert outputs == [(0, f"a ['b c'] {pid}\n"), (0, f"d [] {pid}\n")]
    assert not worker.ended
    assert worker.poll() is None
    assert carried_out(worker, "fail") == (3, f"fail [] {pid}\n")
    assert worker.ended
    assert carried_out(worker, "e")[0] == 3
    worker.close()


def test_worker_that_is_killed_says_so():
    worker = Worker([sys.executable, "-c", TASKS])
    assert carried_out(worker, "die")[0] == -9
    worker.close()


def test_idle_worker_ends_with_its_input():
    worker = Worker([sys.executable, "-c", TASKS])
    pid = int(carried_out(worker, "a")[1].split()[-1])
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_command_that_is_none():
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no/such"):
        Worker(["/no/such/python"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_arms_share_a_process_and_their_records_are_those_of_processes_of_their_own(share, launch, results, tmp_path):
    sweep = "axes: {engine.block_size: 16, policy.budget_tokens: 64, policy: [full, zipage], seed: [0, 1]}"
    code, loads = share(sweep)
    assert code == 0
    assert sorted(loads.values()) == [4, 4], "loaded four times by one process, and shut down"
    shared = load_runs(sweep_file(results))
    assert all(" -m experiments.run engine.block_size=16 " in command for command in shared["provenance.command"])
    assert shared["provenance.command"].nunique() == 4
    for policy in ("full", "zipage"):
        budget = [] if policy == "full" else ["policy.budget_tokens=64"]
        for seed in (0, 1):
            more = [f"policy={policy}", *budget, f"seed={seed}", "engine.block_size=16"]
            assert launch(*more, f"results_dir={tmp_path}/alone") == 0
    alone = load_runs(tmp_path / "alone").set_index("run").loc[shared["run"]].reset_index()
    pd.testing.assert_frame_equal(deterministic(shared), deterministic(alone)[deterministic(shared).columns])


def test_what_sets_arms_apart_takes_another_process(share):
    code, loads = share("axes: {hardware.threads: [1, 2], engine.block_size: [16, 32]}")
    assert code == 0
    assert sorted(loads.values()) == [2, 2, 4]


def test_a_failure_costs_its_arm_and_the_next_has_a_new_process(share, results, capsys):
    code, loads = share("axes: {policy: zipage, policy.budget_tokens: [64, 48, 80, 96], engine.block_size: 16}")
    assert code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: arm 2 of 4: budget=48: the engine failed after 2 steps: RuntimeError")
    assert sorted(loads.values()) == [2, 2, 3], "two arms a process, and three of the four came to their end"
    assert sorted(load_runs(results)["policy.budget_tokens"]) == [64, 80, 96]


@pytest.mark.parametrize("wrong", ["+share_model=maybe", "share_model="])
def test_wrong_value_is_one_line(share, capsys, wrong):
    assert share("axes: {seed: [0, 1]}", wrong)[0] == 2
    assert "+share_model=true or +share_model=false" in capsys.readouterr().err


def test_without_a_sweep_it_is_no_option(launch, capsys):
    assert launch("+share_model=true") == 2
    assert "share_model: unknown option" in capsys.readouterr().err


def test_other_engines_have_processes_of_their_own(share, capsys):
    """Which do not start here: the command of an unshared arm is none."""
    code, loads = share("axes: {backend: [zipage, transformers], seed: [0]}", "policy=full")
    assert code == 1
    assert "/no/such/command" in capsys.readouterr().err
    assert sorted(loads.values()) == [1, 1]


def test_a_real_sweep_shares_the_shipped_model(tmp_path, monkeypatch, capsys):
    """A policy and full KV: the same answers as of arms that load it for themselves."""
    sweep = tmp_path / "tiny.yaml"
    sweep.write_text(
        """
axes: {model: reasoner, workload: chained_arithmetic, workload.options.steps: 8, workload.options.recalls: 1,
       workload.options.distance: "[64,96]", workload.max_tokens: 64, limit: 2, engine.block_size: 16}
arms: [{policy: full}, {policy: zipage, policy.budget_tokens: 64, policy.protection: none}]
"""
    )
    monkeypatch.chdir(ROOT)

    def run_here(command) -> tuple[int, str]:
        """An arm that loads the model for itself; here, to start no process."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            job.run(load_experiment(command[len(sweep_module.RUN) :]))
        return 0, output.getvalue()

    monkeypatch.setattr("experiments.launchers.local.Alone", in_place_of_processes(run_here))
    monkeypatch.setattr("experiments.running.child.Child", fork_functions)
    found = []
    for more in ([], ["+share_model=true"]):
        folder = tmp_path / f"runs{len(more)}"
        options = ["hardware=cpu", f"results_dir={folder}", "engine.num_blocks=120", "hardware.threads=1"]
        monkeypatch.setattr(sys, "argv", ["run", f"+sweep={sweep}", *options, *more])
        assert run.main(worker=[worker.main]) == 0, capsys.readouterr().err
        found.append(load_runs(folder / "sweeps" / Path(sweep_file(folder)).name))
    alone, shared = found
    assert shared["compressions"].tolist()[1] > 0
    pd.testing.assert_frame_equal(deterministic(shared), deterministic(alone))
