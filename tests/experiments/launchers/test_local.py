"""Several workers on one machine: who runs what, on which GPUs, and what a death or Ctrl-C costs."""

# ruff: noqa: F811

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import launchers, records
from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.launchers import local
from experiments.launchers.task import Commands, Task, gpus_of
from experiments.records import claims, load_runs
from experiments.running import job, sweep
from tests.experiments.running.run_process import wait_for
from tests.experiments.running.sweep_helpers import launch_sweep, six, small, start_sweep, sweep_file  # noqa: F401


@pytest.fixture
def log(tmp_path):
    """What happened: lines of "begins" or "ends", process, seed and policy; or those of the words that are given."""

    def log(*words: str) -> list[list[str]]:
        path = tmp_path / "loads.log"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line[0] in (words or ("begins", "ends"))]

    return log


def most_at_once(log: list[list[str]]) -> int:
    running, most = set(), 0
    for what, *arm in log:
        running = running | {tuple(arm)} if what == "begins" else running - {tuple(arm)}
        most = max(most, len(running))
    return most


def test_two_sweeps_of_two_workers_share_the_work(start_sweep, six, log, tmp_path):
    gate = tmp_path / "loads.gate"
    gate.touch()
    both = [start_sweep(six, "launcher.workers=2") for _ in range(2)]
    wait_for(lambda: len(log()) == 4)
    gate.unlink()
    outputs = [started.communicate(timeout=120)[0] for started in both]
    assert [started.returncode for started in both] == [0, 0], outputs
    assert Counter(what for what, *_ in log()) == {"begins": 6, "ends": 6}
    assert most_at_once(log()) > 2
    assert all(output.count("tokens/s;") == 6 for output in outputs), "each tells of all arms"
    assert "on another process" in "".join(outputs)


def test_two_workers_run_two_arms_at_once_and_one_that_is_killed_costs_itself(start_sweep, six, log, results):
    started = start_sweep(six, "launcher.workers=2", step_seconds=0.02)
    wait_for(lambda: len(log()) >= 2)
    victim = log()[1]
    os.kill(int(victim[1]), signal.SIGKILL)
    output = started.communicate(timeout=120)[0]
    assert started.returncode == 1, output
    assert Counter(what for what, *_ in log()) == {"begins": 6, "ends": 5}
    assert output.count("killed by SIGKILL") == 1
    assert "1 of 6 arms failed" in output
    lines = [line for line in output.splitlines() if line.startswith("arm ")]
    begun = [line for line in lines if " begins on worker " in line]
    assert (len(begun), len(lines)) == (6, 12)
    assert {line.rpartition(" ")[2] for line in begun} == {"1", "2"}
    assert all(", on worker " in line for line in lines if line not in begun)
    assert lines[-1].endswith("nothing to go")
    done = {(str(seed), name) for seed, name in load_runs(results)[["seed", "policy.name"]].itertuples(index=False)}
    assert len(done) == 5
    assert tuple(victim[2:]) not in done
    again = start_sweep(six, "launcher.workers=2")
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    assert "6 arms, 5 done, 1 to go" in output
    assert [line[2:] for line in log()[11:]] == [victim[2:]] * 2
    assert len(load_runs(sweep_file(results))) == 6


def test_ctrl_c_ends_every_worker(start_sweep, six, log, results):
    started = start_sweep(six, "launcher.workers=2", step_seconds=5)
    wait_for(lambda: len(log("serves")) == 2)  # while a process forks, Python loses what a signal raises
    started.send_signal(signal.SIGINT)
    output = started.communicate(timeout=60)[0]
    assert started.returncode == 130
    assert output.endswith("\nerror: interrupted: 0 of 6 arms recorded, and the same command goes on\n")
    for _, process, *_ in log():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)
    assert sorted(path.name for path in results.iterdir()) == [".locks", "sweeps"]
    assert not list((results / claims.FOLDER).iterdir())


def test_a_launcher_changes_no_run(launch_sweep, small, results):
    options = ["launcher=local", "launcher.workers=3", "launcher=slurm", "launcher.partition=gpu", "launcher=ray"]
    ids = {job.prepare(load_experiment(small_run(results, more))).run_id for more in (None, *options[:2])}
    ids |= {job.prepare(load_experiment(small_run(results, *options[2:4]))).run_id}
    ids |= {job.prepare(load_experiment(small_run(results, options[4]))).run_id}
    assert len(ids) == 1
    assert launch_sweep(small, "launcher.workers=2") == 0
    text = sweep_file(results).read_text()
    assert "launcher." not in text
    assert launch_sweep(small) == 0
    assert launch_sweep.ran == []
    assert sweep_file(results).read_text() == text
    (row, *_) = load_runs(results).to_dict("records")
    assert not any("launcher." in str(item) for item in row.items())


def small_run(results: Path, *more: str | None) -> list[str]:
    return ["model=reasoner", "workload=chained_arithmetic", "limit=1", f"results_dir={results}", *filter(None, more)]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["launcher.workers=0"], "launcher.workers=0: must be 1 or more"),
        (["launcher.partition=gpu"], "launcher.partition='gpu': must be left out: only launcher=slurm has it"),
        (["launcher.cpus=2"], "launcher.cpus=2: must be left out: only launcher=ray and launcher=slurm have it"),
        (["launcher.name=rey"], "launcher.name='rey': must be local or ray or slurm"),
        (["launcher=slurm", "launcher.cluster=lsf"], "launcher.cluster='lsf': must be slurm or local"),
        (["launcher.wrokers=2"], "launcher.wrokers: unknown option; did you mean launcher.workers?"),
        (["launcher.workers=1,2"], "launcher: must be one for all arms"),
        (["launcher=kubernetes"], "launcher=kubernetes: no such choice"),
    ],
)
def test_wrong_options_are_one_line(launch_sweep, small, capsys, more, line):
    assert launch_sweep(small, *more) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert launch_sweep.ran == []


def test_a_single_run_is_launched_nowhere(launch, capsys):
    assert launch("launcher=ray") == 2
    assert capsys.readouterr().err == "error: launcher=ray: launches the arms of a +sweep=NAME, not one run\n"


# GPUs, which are only names here


class Gpus:
    """Arms that end when they are told to, and the GPUs that each was given."""

    def __init__(self, monkeypatch):
        self.running: dict[str, list[str]] = {}
        gpus = self

        class Alone:
            def __init__(self, command, environment):
                (self.name,) = command
                mine = environment["CUDA_VISIBLE_DEVICES"]
                gpus.running[self.name] = mine.split(",") if mine else []

            def poll(self):
                return None if self.name in gpus.running else (1, "error: over\n")

            def close(self):
                return

        monkeypatch.setattr(local, "Alone", Alone)


@pytest.mark.parametrize("needs", [[1] * 9, [2, 1, 1, 4, 1, 2], [4, 4], [3, 1, 3, 1], [0, 1, 0, 4]])
def test_gpus_are_shared_out(monkeypatch, tmp_path, needs):
    """An arm has as many as it takes and no two have the same; none is idle that an arm could use."""
    gpus, done = Gpus(monkeypatch), []
    tasks = [Task(n, (f"arm{n}",), tmp_path / f"arm{n}", None, None, need) for n, need in enumerate(needs)]
    need_of = {f"arm{n}": need for n, need in enumerate(needs)}

    class Report:
        def started(self, task, worker):
            assert worker.startswith("GPU ") or not task.gpus

        def ended(self, task, worker, reason, seconds):
            done.append(task.number)

        def is_over(self, task):
            return False

    def look(seconds):
        used = [gpu for mine in gpus.running.values() for gpu in mine]
        assert all(len(mine) == need_of[name] for name, mine in gpus.running.items())
        assert len(used) == len(set(used)) <= 4
        assert set(used) <= {"4", "5", "6", "7"}
        waits = set(need_of) - set(gpus.running) - {f"arm{n}" for n in done}
        if len(gpus.running) < 4:
            assert all(need_of[name] > 4 - len(used) for name in waits)
        gpus.running.pop(min(gpus.running), None)

    monkeypatch.setattr(local, "time", SimpleNamespace(sleep=look, monotonic=time.monotonic))  # between two looks
    local.Local(Commands((), ()), ["4", "5", "6", "7"], 4).run(tasks, Report())
    assert sorted(done) == list(range(len(needs)))


def test_workers_share_a_model_each(monkeypatch, tmp_path):
    """Two models, two workers: each loads one, and keeps to it while it has arms."""
    done, loaded = [], []

    class Worker:
        process, ended = None, False

        def __init__(self, command, environment):
            self.arms, self.is_busy = [], False
            loaded.append(self)

        def start(self, arguments, environment):
            self.arms += arguments
            self.is_busy = True

        def poll(self):
            return None if self.is_busy else (0, "")

        def close(self):
            assert not self.is_busy

    class Report:
        def started(self, task, worker):
            return

        def ended(self, task, worker, reason, seconds):
            done.append(task.number)

        def is_over(self, task):
            return False

    def look(seconds):
        busy = [worker for worker in loaded if worker.is_busy]
        min(busy, key=lambda worker: len(worker.arms)).is_busy = False

    monkeypatch.setattr(local, "Worker", Worker)
    monkeypatch.setattr(local, "time", SimpleNamespace(sleep=look, monotonic=time.monotonic))  # between two looks
    tasks = [Task(n, (f"{n}",), tmp_path / f"arm{n}", None, "aaabbb"[n], 0) for n in range(6)]
    local.Local(Commands((), ()), [], 2).run(tasks, Report())
    assert sorted(done) == list(range(6))
    assert [worker.arms for worker in loaded] == [["0", "1", "2"], ["3", "4", "5"]]
    loaded.clear()
    tasks = [Task(n, (f"{n}",), tmp_path / f"arm{n}", None, "abbbbb"[n], 0) for n in range(6)]
    local.Local(Commands((), ()), [], 2).run(tasks, Report())
    assert [len(worker.arms) for worker in loaded] == [1, 3, 2], "who has no arms left helps with those of the other"


def arms(*options: str) -> list:
    return [load_experiment(["model=reasoner", *options])]


def opened(monkeypatch, gpus: int, *options: str) -> local.Local:
    monkeypatch.setattr(launchers, "visible_gpus", lambda: [str(n) for n in range(gpus)])
    (arm,) = arms(*options)
    with launchers.open_launcher(arm.launcher, Commands((), ()), [arm]) as launcher:
        return launcher


@pytest.mark.parametrize(
    ("gpus", "options", "workers"),
    [
        (0, [], 1),
        (1, [], 1),
        (8, [], 8),
        (8, ["launcher.workers=3"], 3),
        (8, ["hardware=cpu"], 1),
        (8, ["hardware=cpu", "launcher.workers=2"], 2),
        (8, ["hardware.device=cuda:1"], 1),
    ],
)
def test_as_many_workers_as_gpus(monkeypatch, gpus, options, workers):
    assert len(opened(monkeypatch, gpus, *options)._slots) == workers


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["launcher.workers=3"], "launcher.workers=3: must be at most 2"),
        (["hardware.device=cuda:1", "launcher.workers=2"], "hardware.device=cuda:1 must be cuda, or"),
    ],
)
def test_more_than_there_is(monkeypatch, options, line):
    with pytest.raises(UsageError, match=line):
        opened(monkeypatch, 2, *options)


def test_an_arm_that_takes_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(launchers, "gpus_of", lambda arm: 4)
    with pytest.raises(UsageError, match=r"an arm takes 4 GPUs .* 2 can be seen here"):
        opened(monkeypatch, 2)


def test_a_lone_worker_leaves_the_choice_of_a_gpu_to_its_arm(monkeypatch, tmp_path):
    given = []

    class Alone:
        def __init__(self, command, environment):
            given.append(dict(environment))

        def poll(self):
            return 1, ""

        def close(self):
            return

    monkeypatch.setattr(local, "Alone", Alone)
    report = sweep.Sweep("x", [PLANNED(tmp_path)], of=1)
    local.Local(Commands((), ()), ["0", "1"], 1).run([Task(1, (), tmp_path / "run", None, None, 1)], report)
    assert [set(environment) for environment in given] == [{claims.VARIABLE}]


def PLANNED(folder: Path) -> sweep.PlannedRun:
    return sweep.PlannedRun(1, ("seed=0",), arms()[0], folder / "run", sweep.Standing("missing"))


def test_gpus_of_an_arm():
    assert gpus_of(arms()[0]) == 1
    assert gpus_of(arms("hardware=cpu")[0]) == 0


@pytest.mark.parametrize(("given", "found"), [(None, ["0", "1", "2"]), ("5,7,GPU-a", ["5", "7", "GPU-a"])])
def test_gpus_are_named_as_this_process_was_given_them(monkeypatch, given, found):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert local.visible_gpus() == found


def test_an_arm_that_can_not_be_claimed_costs_itself(launch_sweep, small, results, capsys, monkeypatch):
    take = claims.take

    def full(run, worker):
        if "random" in run.name:
            raise OSError(28, "No space left on device")
        return take(run, worker)

    monkeypatch.setattr(claims, "take", full)
    assert launch_sweep(small) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("can't be claimed: OSError: [Errno 28] No space left on device") for line in lines)
    assert len(load_runs(sweep_file(results))) == 3


@pytest.mark.parametrize("ended", [None, (1, "error: another process makes the run")])
def test_an_arm_whose_claim_was_lost_is_the_other_processs(monkeypatch, tmp_path, ended):
    """As after a machine was asleep. It is stopped, if it did not end itself, and has not failed: another makes it."""
    said, other, stopped = [], [], []
    monkeypatch.setattr(local, "AGAIN", 0.1)
    monkeypatch.setattr(local, "stop", stopped.extend)

    class Alone:
        process = "its process"

        def __init__(self, command, environment):
            path = tmp_path / claims.FOLDER / "run"
            old = time.time() - 2 * claims.LOST
            os.utime(path, (old, old))
            with monkeypatch.context() as patch:
                patch.setattr(claims, "WATCH", 0.0)
                other.append(claims.take(tmp_path / "run", "another"))

        def poll(self):
            return ended

        def close(self):
            return

    class Report:
        def started(self, task, worker):
            said.append("started")

        def ended(self, task, worker, reason, seconds):
            said.append((worker, reason))

        def is_over(self, task):
            return False

        def note(self, line):
            said.append(line)
            if "waiting for them" in line:
                with records.claim(tmp_path / "made") as staging:
                    records.publish(staging, tmp_path / "run", {"a": 1})
                other[0].release()

        def tick(self):
            return

    monkeypatch.setattr(local, "Alone", Alone)
    local.Local(Commands((), ()), [], 1).run([Task(4, (), tmp_path / "run", None, None, 0)], Report())
    assert said == [
        "started",
        "arm 4: this process was silent for so long that another has taken it over",
        "other processes are making what is to go (1): waiting for them",
        ("another process", None),
    ]
    assert stopped == ([] if ended else ["its process"])
    assert not list((tmp_path / claims.FOLDER).iterdir())
    assert not local.log_of(tmp_path / "run").exists()
