"""Ctrl-C, or a request to end, in each phase of each command: what is said, and what stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from experiments import archive, bench, regrade, report, run
from experiments.records import load_runs
from experiments.running import bounded, job
from experiments.running import sweep as sweep_module
from tests.experiments.fake_engine import FakeLLM
from tests.experiments.running.run_process import ROOT
from tests.experiments.running.sweep_helpers import launch_sweep, small  # noqa: F401


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_several_runs_say_how_many_are_recorded(launch, results, capsys):
    more = ("seed=0,1", "-m")
    for done, said in enumerate(("no run is", "1 run is")):
        assert launch(*more, fail_at=5, error=KeyboardInterrupt()) == 130
        assert capsys.readouterr().err == f"error: interrupted: {said} recorded, and the same command goes on\n"
        assert len(load_runs(results)) == done
        assert launch(f"seed={done}") == 0
        capsys.readouterr()


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_is_recorded_is_not_said_to_be_lost(launch, results, capsys, monkeypatch, again):
    if again:
        launch()
    monkeypatch.setattr(job, "_show", interrupt)
    assert launch() == 130
    assert capsys.readouterr().err == "error: interrupted: the run is recorded\n"
    assert len(load_runs(results)) == 1
    assert sorted(path.name for path in results.glob("*.partial")) == []


def test_a_request_to_end_is_like_ctrl_c(arguments, results, capsys, monkeypatch):
    class Ended(FakeLLM):
        def step(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().step()

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    assert run.main({"zipage": lambda **options: Ended(options)}) == 130
    assert capsys.readouterr().err == "error: interrupted: nothing was recorded\n"
    assert not list(results.glob("*.partial"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_benchmark_that_is_recorded_is_not_said_to_be_lost(results, capsys, monkeypatch):
    rows = [{"refused": None}]
    measured = bench.Bench(lambda *_: ({}, lambda keep: (rows, {})), bench.BENCHES["kernels"].options)
    monkeypatch.setitem(bench.BENCHES, "kernels", measured)
    monkeypatch.setattr(bench, "_show", interrupt)
    monkeypatch.setattr(sys, "argv", ["run", "scenario=kernels", "hardware=cpu", f"results_dir={results}"])
    for _ in range(2):
        assert run.main() == 130
        assert capsys.readouterr().err == "error: interrupted: the run is recorded\n"
        assert len(list(results.glob("*/rows.json"))) == 1


def test_a_sweep_says_how_many_arms_are_recorded(launch_sweep, small, capsys, monkeypatch):  # noqa: F811
    def behave(overrides):
        return {"fail_at": 1, "error": KeyboardInterrupt()} if "policy=random" in overrides else {}

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "load_problems", interrupt)
        assert launch_sweep(small) == 130
        assert capsys.readouterr().err == "\nerror: interrupted: nothing was run, and the same command goes on\n"
    assert launch_sweep(small, behave=behave) == 130
    assert capsys.readouterr().err == "\nerror: interrupted: 3 of 5 arms recorded, and the same command goes on\n"
    monkeypatch.setattr(sweep_module, "sweep_table", interrupt)
    assert launch_sweep(small) == 130
    assert capsys.readouterr().err == "\nerror: interrupted: 5 of 5 arms recorded, and the same command goes on\n"
    assert len(launch_sweep.ran) == 2


def test_other_commands_end_with_a_line(launch, results, tmp_path, capsys, monkeypatch):
    launch()
    launch("seed=1")
    capsys.readouterr()
    for command in (report, regrade):
        with monkeypatch.context() as patch:
            patch.setattr(command, "load_runs", interrupt)
            assert command.main([str(results)]) == 130
        assert capsys.readouterr().err == "error: interrupted\n"

    copied = []
    monkeypatch.setattr(archive, "archive", lambda run, *_: interrupt() if copied else copied.append(run))
    assert archive.main([str(results), "--to", f"{tmp_path}/copies"]) == 130
    assert capsys.readouterr().err == f"error: interrupted: 1 of 2 runs copied to {tmp_path}/copies\n"


def test_ctrl_c_of_the_terminal_is_for_the_parent_of_what_renders_prompts():
    def kill(item: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return item

    assert bounded.texts(kill, ["a", "b"], seconds=10, mebibytes=100, characters=10) == ["a", "b"]


def test_ctrl_c_during_a_fork_is_not_lost():
    """Python drops a KeyboardInterrupt in the hooks after a fork, as those of logging."""
    at_fork = []
    os.register_at_fork(after_in_parent=lambda: at_fork and os.kill(os.getpid(), at_fork.pop()))
    at_fork.append(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        bounded.texts(str.upper, ["a"], seconds=10, mebibytes=100, characters=10)
    assert not at_fork
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reader_that_has_left_is_no_error(launch, results):
    """As `report ... | head -1`; the first line is longer than a pipe's patience."""
    launch()
    code = "import sys; from experiments import report; sys.exit(report.main(sys.argv[1:]))"
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.closing(os.fdopen(writer, "w")) as pipe:
        done = subprocess.run(
            [sys.executable, "-c", code, str(results)], cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(("argument", "said"), [("-m", "error: interrupted: nothing was run\n"), ("x.py", "Traceback")])
def test_ctrl_c_while_a_command_is_imported(argument, said):
    """Python calls itself `-m` while it looks for the module to run."""
    code = f"import sys; sys.argv = [{argument!r}]; import experiments; raise KeyboardInterrupt"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr.startswith(said)
