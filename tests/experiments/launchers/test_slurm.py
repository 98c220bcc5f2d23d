"""launcher=slurm on submitit's local executor, whose jobs are processes here; tests/slurm has a real Slurm."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
from types import SimpleNamespace

import pytest

from experiments import records, run
from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.launchers import slurm
from experiments.launchers.task import Commands, Task
from experiments.records import claims, load_runs
from tests.experiments.fake_engine import fake_backend
from tests.experiments.launchers.test_ray import begun, descendants, owners
from tests.experiments.running.forked import Forked
from tests.experiments.running.run_process import CHILD, wait_for
from tests.experiments.running.sweep_helpers import launch_sweep, small  # noqa: F401
from tests.experiments.running.test_lifeline import running


def sweep_of_processes() -> int:
    return run.main(fake_backend(), child=[sys.executable, "-c", CHILD, sys.argv.pop(1)])


@pytest.fixture
def start(arguments, tmp_path):
    pytest.importorskip("submitit")
    (tmp_path / "three.yaml").write_text("axes: {engine.block_size: 16, seed: [0, 1, 2]}")
    options = [*arguments, f"+sweep={tmp_path}/three.yaml", "launcher=slurm", "launcher.cluster=local"]

    def start(step_seconds: float, *more: str) -> Forked:
        return Forked(sweep_of_processes, [str(step_seconds), *options, *more])

    return start


def test_a_requeued_job_goes_on_and_a_killed_one_leaves_its_arm_to_others(start, results):
    started = start(0.06, "launcher.workers=2")
    wait_for(lambda: len(begun(results)) == 2)
    (requeued, its_run), (killed, other_run) = owners(results).items()
    os.kill(requeued, signal.SIGUSR2)  # as Slurm when its time is up
    wait_for(lambda: requeued not in owners(results))
    os.kill(killed, signal.SIGKILL)
    output = started.communicate(timeout=120)[0]
    assert started.returncode == 0, output
    assert output.count(" begins again on ") == 2
    assert output.count(" right, ") == 3
    assert {its_run, other_run} < set(load_runs(results)["run"])
    assert not list((results / claims.FOLDER).iterdir())


def test_jobs_end_with_ctrl_c(start, results):
    started = start(5.0, "launcher.workers=1")
    wait_for(lambda: len(begun(results)) == 1)
    processes = descendants(started.pid)
    os.killpg(started.pid, signal.SIGINT)
    output = started.communicate(timeout=60)[0]
    assert started.returncode == 130, output
    assert output.endswith("\nerror: interrupted: 0 of 3 arms recorded, and the same command goes on\n")
    wait_for(lambda: not any(map(running, processes)), seconds=10)
    assert sorted(path.name for path in results.iterdir()) == [".locks", "sweeps"]


def test_it_is_said_how_submitit_is_had(launch_sweep, small, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert launch_sweep(small, "launcher=slurm") == 2
    assert capsys.readouterr().err == (
        'error: launcher=slurm: submitit is not installed here: pip install -e ".[slurm]"\n'
    )


def test_a_machine_without_slurm_is_one_line(launch_sweep, small, capsys, monkeypatch, tmp_path):  # noqa: F811
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch_sweep(small, "launcher=slurm") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: launcher=slurm: RuntimeError: Could not detect ")
    assert err.count("\n") == 1


def test_arms_that_another_sweep_makes_are_waited_for(monkeypatch, tmp_path):
    """As after its start was killed and started again, while its jobs run on."""
    said, submitted = [], []
    monkeypatch.setattr(slurm, "LOOK", 0.05)
    tasks = [Task(n, (), tmp_path / f"run{n}", None, None, 0) for n in range(3)]
    others = [claims.take(task.folder, "another") for task in tasks]

    class Jobs:
        why = "without an error"

    @contextlib.contextmanager
    def jobs(submit, stop):
        submitted.append(len(pickle.loads((tmp_path / slurm.TASKS).read_bytes())))
        yield Jobs()

    def follow(self, left, jobs, report):
        return left if len(submitted) == 1 else []  # at first the jobs find nothing to do

    class Report:
        def ended(self, task, worker, reason, seconds):
            said.append((task.number, worker, reason))

        def note(self, line):
            said.append(line)
            if "waiting" in line:
                with records.claim(tmp_path / "made") as staging:
                    records.publish(staging, tasks[0].folder, {"a": 1})
                others[0].release()

        def tick(self):
            if len(said) == 3:
                others[1].release()  # it was interrupted

    monkeypatch.setattr(slurm, "_submitted", jobs)
    monkeypatch.setattr(slurm.Slurm, "_follow", follow)
    executor = SimpleNamespace(submit_array=list)
    launcher = slurm.Slurm(executor, options(), Commands((), ()), None, tmp_path)
    launcher.run(tasks, Report())
    notes = [line for line in said if isinstance(line, str)]
    assert [end for end in said if not isinstance(end, str)] == [(0, "another process", None)]
    assert notes[1] == "other processes are making what is to go (3): waiting for them"
    assert submitted == [3, 2]
    others[2].release()


def test_jobs_that_do_nothing_are_not_submitted_for_ever(monkeypatch, tmp_path):
    said = []

    @contextlib.contextmanager
    def jobs(submit, stop):
        yield SimpleNamespace(why="no such partition")

    report = SimpleNamespace(
        ended=lambda *end: said.append(end), note=lambda line: None, tick=lambda: None, started=lambda *begin: None
    )
    monkeypatch.setattr(slurm, "_submitted", jobs)
    monkeypatch.setattr(slurm.Slurm, "_follow", lambda self, left, jobs, report: left)
    task = Task(0, (), tmp_path / "run", None, None, 0)
    executor = SimpleNamespace(submit_array=list)
    launcher = slurm.Slurm(executor, options(), Commands((), ()), None, tmp_path)
    launcher.run([task], report)
    assert said == [(task, "no job", "every job ended before the arm did (no such partition)", None)]
    assert launcher.lost


def options(*given: str):
    return load_experiment(["model=reasoner", "launcher=slurm", *given]).launcher


def test_gpus_of_a_job_follow_from_the_arms():
    asked = slurm._parameters(options("launcher.partition=gpu", "launcher.parameters={account: mine}"), 2)
    assert asked == {
        "name": "zipage",
        "nodes": 1,
        "tasks_per_node": 1,
        "timeout_min": 240,
        "cpus_per_task": 4,
        "gpus_per_node": 2,
        "slurm_partition": "gpu",
        "slurm_array_parallelism": None,
        "slurm_additional_parameters": {"account": "mine"},
    }
    assert slurm._parameters(options(), 0)["gpus_per_node"] is None
    assert slurm._parameters(options("launcher.gpus=8"), 2)["gpus_per_node"] == 8
    assert slurm._parameters(options("launcher.parameters={gres: 'gpu:h100:2'}"), 2)["gpus_per_node"] is None
    with pytest.raises(UsageError, match="an arm takes 2 GPUs"):
        slurm._parameters(options("launcher.gpus=1"), 2)
