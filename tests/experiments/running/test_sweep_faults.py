"""Sweeps that are wrong, arms that fail and children that die: what is said, and what the others lose."""

# ruff: noqa: F811

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from experiments import report, run
from experiments.records import load_runs
from experiments.running.child import reason_of
from tests.experiments.fake_engine import fake_backend
from tests.experiments.running.run_process import ROOT
from tests.experiments.running.sweep_helpers import launch_sweep, small, sweep_file  # noqa: F401


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"arms": [{"run": 3}]}', '{"arms": 3}'])
def test_file_that_is_no_sweep_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert report.main([str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{path}: is not the record of a sweep (")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["limt=3"], "limt: unknown option; did you mean limit?"),
        (["model.path=no/such/folder"], "model.path=no/such/folder: no such file or folder"),
        (["workload.options.kount=1"], "workload.options.kount: unknown option of word_problems"),
        (["policy.budget_tokens=16"], "policy.budget_tokens=16"),
    ],
)
def test_wrong_arm_is_named_before_anything_runs(launch_sweep, small, results, capsys, more, line):
    assert launch_sweep(small, *more) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: sweep {small.removeprefix('+sweep=')}: arm ")
    assert f"): {line}" in err
    assert err.count("\n") == 1
    assert launch_sweep.ran == []
    assert not list(results.glob("sweeps/*"))


def test_unknown_option_in_a_file_names_file_and_key(launch_sweep, tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("axes: {engine.blok_size: [16, 32]}")
    assert launch_sweep(f"+sweep={path}") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: sweep {path}: arm 1 (engine.blok_size=16 ")
    assert err.endswith("): engine.blok_size: unknown option; did you mean engine.block_size?\n")


@pytest.mark.parametrize("wrong", ["+sweep=bugdet", "+sweep=a,b", "+sweep=[demo,bugdet]"])
def test_wrong_sweep_is_one_line(launch_sweep, capsys, wrong):
    assert launch_sweep(wrong) == 2
    err = capsys.readouterr().err
    assert "sweep=" in err
    assert err.count("\n") == 1


def test_failed_arms_cost_themselves_only(launch_sweep, small, results, capsys):
    def behave(overrides):
        if "policy=zipage" not in overrides:
            return {}
        memory = MemoryError("CUDA out of memory:\n tried to allocate 2 GiB")
        return {"fail_at": 2} | ({"error": memory} if "policy.budget_tokens=48" in overrides else {})

    assert launch_sweep(small, behave=behave) == 1
    captured = capsys.readouterr()
    memory, device = captured.err.splitlines()
    assert memory.startswith(
        "error: arm 2 of 5: zipage budget=48: the engine failed after 2 steps: "
        "MemoryError: CUDA out of memory: tried to allocate 2 GiB"
    )
    assert device.startswith("error: arm 3 of 5: zipage budget=64: the engine failed after")
    assert len(launch_sweep.ran) == 5
    assert list(load_runs(sweep_file(results))["policy.name"]) == ["full", "random", "random"]
    assert captured.out.count("out of memory") == 0, "what went wrong is said once"
    assert "2 of 5 arms failed: see the errors above" in captured.out
    assert len(list((results / "sweeps").glob("*.log"))) == 2
    assert launch_sweep(small) == 0
    assert len(launch_sweep.ran) == 2
    assert list(load_runs(sweep_file(results))["policy.name"]) == ["full", "zipage", "zipage", "random", "random"]
    assert not list((results / "sweeps").glob("*.log"))


def test_full_disk_costs_what_could_not_be_written(launch_sweep, small, results, capsys, monkeypatch):
    from experiments.records import schemas

    write = schemas.write_rows

    def full(path, *more):
        if "random" in str(path):
            raise OSError(28, "No space left on device")
        write(path, *more)

    monkeypatch.setattr(schemas, "write_rows", full)
    assert launch_sweep(small) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("can't be written: No space left on device") for line in lines)
    assert len(load_runs(sweep_file(results))) == 3


def test_folders_that_cannot_be_written_are_one_line(launch_sweep, small, tmp_path, results, capsys):
    (tmp_path / "file").write_text("")
    assert launch_sweep(small, f"results_dir={tmp_path}/file/runs") == 2
    assert f": results_dir={tmp_path}/file/runs: can't be written" in capsys.readouterr().err
    results.mkdir(exist_ok=True)
    (results / "sweeps").write_text("")
    assert launch_sweep(small) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {results}/sweeps/small-")
    assert err.count("\n") == 1
    assert launch_sweep.ran == []


@pytest.mark.parametrize(("name", "content"), [("metrics.json", b"{"), ("requests.parquet", b"PAR1")])
def test_damaged_record_costs_itself_only(launch_sweep, tmp_path, results, capsys, name, content):
    (tmp_path / "three.yaml").write_text(
        "axes: {policy: zipage, engine.block_size: 16, policy.budget_tokens: [32, 48, 64]}"
    )
    small = f"+sweep={tmp_path}/three.yaml"
    launch_sweep(small)
    broken = Path(load_runs(sweep_file(results))["path"][1])
    whole = (broken / name).read_bytes()
    (broken / name).write_bytes(content)
    capsys.readouterr()
    assert launch_sweep(small) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: arm 2 of 3: budget=48: ")
    assert f"{broken}: its record is damaged (" in line
    assert line.endswith("); force=stale replaces it")
    assert "3 arms, 2 done, 1 to go" in captured.out
    assert len(launch_sweep.ran) == 1
    assert len(load_runs(sweep_file(results))) == 2
    assert launch_sweep(small, "force=stale") == 0
    assert len(launch_sweep.ran) == 1
    assert len(load_runs(sweep_file(results))) == 3
    assert len((broken / name).read_bytes()) == pytest.approx(len(whole), rel=0.1)


CRASHES = """
import os, signal, sys
from pathlib import Path

seed = next(argument for argument in sys.argv if argument.startswith("seed="))
if seed in ("seed=1", "seed=2"):
    print("working")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL if seed == "seed=1" else signal.SIGSEGV)
if seed == "seed=3":
    sys.exit(9)
if seed == "seed=4":
    sys.exit(0)
if seed == "seed=5":
    raise ValueError("what is\\nthis")
import tests.experiments.running.no_torch
from experiments.run import main
from tests.experiments.fake_engine import fake_backend

sys.exit(main(fake_backend()))
"""


def test_children_that_die_are_one_line_each(arguments, tmp_path, results, capsys, monkeypatch):
    path = tmp_path / "crashes.yaml"
    path.write_text("axes: {seed: [1, 2, 3, 4, 5, 6]}")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["run", *arguments, f"+sweep={path}"])
    assert run.main(fake_backend(), child=[sys.executable, "-c", CRASHES]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: arm 1 of 6: seed=1: killed by SIGKILL (did the memory run out?)",
        "error: arm 2 of 6: seed=2: killed by SIGSEGV",
        "error: arm 3 of 6: seed=3: ended with exit code 9 and no output",
        "error: arm 4 of 6: seed=4: ended without the record that it was to make: "
        "did what it reads change since the sweep began, or is this another kind of GPU?",
        "error: arm 5 of 6: seed=5: this",
    ]
    assert list(load_runs(sweep_file(results))["seed"]) == [6]
    logs = {path.read_text() for path in (results / "sweeps").glob("*.log")}
    assert len(logs) == 3
    assert "working\n" in logs


def test_command_that_is_none_is_one_line(arguments, small, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", *arguments, small])
    assert run.main(fake_backend(), child=["/no/such/python"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("error: arm 1 of 5: full: FileNotFoundError: ")


def test_reason_is_the_last_error_line():
    assert reason_of(1, "warning\nerror: first\nerror: no budget\nmore\n") == "no budget"
    assert reason_of(1, "Traceback:\n  file\nValueError: x\n") == "ValueError: x"
    engine = "(EngineCore pid=8) ERROR 11-25 [core.py:9] ValueError: Free memory (75 GiB) is less than desired\n"
    assert reason_of(1, engine + "error: RuntimeError: it failed. See root cause above.") == (
        "ValueError: Free memory (75 GiB) is less than desired"
    )
    assert reason_of(1, "error: E: See root cause above.") == "E: See root cause above."
    assert reason_of(-signal.SIGTERM, "error: x") == "killed by SIGTERM"
    assert reason_of(1, "\x1b[1;31merror: no\x07 budget\x1b[0m\r\n") == r"no\x07 budget"
    assert reason_of(-40, "") == "killed by signal 40"
