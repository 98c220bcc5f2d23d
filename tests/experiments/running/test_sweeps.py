"""Sweeps on the fake engine: which arms are run, what is reported, and how sweeps end, go on and share their work."""

# ruff: noqa: F811

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments import report, run
from experiments.records import load_runs
from experiments.running.child import run_child
from tests.experiments.fake_engine import fake_backend
from tests.experiments.running.forked import Forked
from tests.experiments.running.run_process import CHILD, wait_for
from tests.experiments.running.sweep_helpers import deterministic, launch_sweep, six, small, start_sweep, sweep_file  # noqa: F401


def test_plan_then_arms_then_table(launch_sweep, small, results, capsys):
    assert launch_sweep(small, "limit=3") == 0
    out = capsys.readouterr().out
    plan, rest = out.split("arm 1 of 5", 1)
    lines = plan.splitlines()
    assert lines[0] == "sweep small: 5 arms, 0 done, 5 to go"
    assert " ".join(plan.split()).partition("all arms: ")[2].startswith("block_size=16 model=hf path=")
    assert [" ".join(line.split()) for line in lines[-5:]] == [
        "1 full",
        "2 zipage budget=48",
        "3 zipage budget=64",
        "4 random budget=48",
        "5 random budget=64",
    ]
    runs = load_runs(sweep_file(results))
    arms = [line for line in out.splitlines() if line.startswith("arm ")]
    assert len(arms) == 5
    for number, (line, (_, row)) in enumerate(zip(arms, runs.iterrows(), strict=True), 1):
        assert line.startswith(f"arm {number} of 5: ")
        assert f": {row['accuracy']:.1%} right, {row['output_tokens_per_second']:,.1f} tokens/s; 0:00:0" in line
        assert line.endswith("nothing to go") if number == 5 else f"{5 - number} to go, about 0:00:0" in line
    assert list(runs["policy.name"]) == ["full", "zipage", "zipage", "random", "random"]
    assert set(runs["limit"]) == {3}, "the command line holds for every arm and wins"
    below = rest[rest.index("\n\n") + 2 :].splitlines()
    assert below[0] == f"sweep: {sweep_file(results)}"
    rows = [line for line in below if line.startswith("|")][2:]
    assert {row.split("|")[1].strip() for row in rows} == {run.rpartition("-")[2][:8] for run in runs["run"]}
    assert below[-1].startswith("|"), "no conclusion where full KV has no right answer"
    assert max(len(line) for line in lines) <= 100
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out), "a file has no control characters"


def test_finished_arms_are_not_repeated(launch_sweep, small, results, capsys):
    launch_sweep(small)
    before = load_runs(sweep_file(results))
    capsys.readouterr()
    assert launch_sweep(small, "policy.budget_tokens=32,48,64") == 0
    assert [overrides[2] for overrides in launch_sweep.ran] == ["policy.budget_tokens=32"] * 2
    assert "7 arms, 5 done, 2 to go, about 0:0" in capsys.readouterr().out
    assert len(list((results / "sweeps").glob("*.json"))) == 2
    assert launch_sweep(small) == 0
    assert launch_sweep.ran == []
    assert "5 arms, 5 done, nothing to go" in capsys.readouterr().out
    assert load_runs(results).set_index("run")["seconds"][before["run"]].tolist() == before["seconds"].tolist()
    assert launch_sweep(small, "force=true") == 0
    assert len(launch_sweep.ran) == 5
    assert len(load_runs(results)) == 7


def test_arm_that_was_run_by_itself_is_known(launch, launch_sweep, small):
    launch("policy=zipage", "policy.budget_tokens=48", "engine.block_size=16")
    launch_sweep(small)
    assert len(launch_sweep.ran) == 4


def test_arms_that_mean_the_same_run_are_one(launch_sweep, tmp_path):
    path = tmp_path / "same.yaml"
    path.write_text("arms: [{policy: random_attention}, {policy: random, policy.protection: prompt}, {policy: full}]")
    assert launch_sweep(f"+sweep={path}", "policy.budget_tokens=512") == 0
    assert len(launch_sweep.ran) == 2


def table_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("|")]


def test_report_renders_a_sweep(launch_sweep, tmp_path, results, capsys):
    (tmp_path / "two.yaml").write_text("axes: {policy: [full, zipage], policy.budget_tokens: 256}")
    launch_sweep(f"+sweep={tmp_path}/two.yaml", "seed=0,1", "engine.max_num_seqs=4,8")
    capsys.readouterr()
    path = sweep_file(results)
    assert report.main([str(path)]) == 0
    headings, _, *rows = table_of(capsys.readouterr().out)
    assert len(rows) == 8
    columns = list(zip(*([cell.strip() for cell in row.split("|")] for row in rows), strict=True))
    places = [columns.index(column) for column in columns if set(column) in ({"4", "8"}, {"0", "1"})][:2]
    assert "seed" in headings
    assert {tuple(row.split("|")[place].strip() for place in places) for row in rows} == {
        ("4", "0"),
        ("4", "1"),
        ("8", "0"),
        ("8", "1"),
    }
    assert report.main([str(results)]) == 0
    assert len(table_of(capsys.readouterr().out)) == 10, "the folder of runs has no more than the runs"
    moved = tmp_path / "moved"
    results.rename(moved)
    assert report.main([str(moved / "sweeps" / path.name)]) == 0
    assert len(table_of(capsys.readouterr().out)) == 10


def test_arms_that_other_code_made_are_stale(launch_sweep, small, results, capsys, other_code):
    launch_sweep(small)
    path = sweep_file(results)
    seconds = load_runs(path)["seconds"]
    other_code("zipage/eviction/policies/zipage.py")
    capsys.readouterr()
    assert launch_sweep(small) == 0
    plan = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    first = plan.index("1 done full")
    assert plan[first : first + 6] == [
        "1 done full",
        "2 stale zipage budget=48",
        "3 stale zipage budget=64",
        "4 done random budget=48",
        "5 done random budget=64",
        "2 stale: the policy has changed since; force=stale runs such arms again",
    ]
    assert launch_sweep.ran == []
    assert launch_sweep(small, "policy.budget_tokens=48", "force=stale") == 0
    assert len(launch_sweep.ran) == 1
    assert launch_sweep(small) == 0
    assert "note: these rows were made by 2 versions of the policy zipage" in " ".join(capsys.readouterr().out.split())
    assert launch_sweep(small, "force=stale") == 0
    assert len(launch_sweep.ran) == 1
    out = capsys.readouterr().out
    assert "4 done, 1 to go" in out
    assert "note:" not in out
    after = load_runs(path)["seconds"]
    assert (after == seconds).tolist() == [True, False, False, True, True]


def test_child_is_not_in_the_way_of_the_terminal():
    code = "import os, sys; print(os.getpgrp() == os.getpid(), sys.stdin.read() == '')"
    assert run_child([sys.executable, "-c", code], lambda: "") == (0, "True True\n")


def sweep_of_processes() -> int:
    return run.main(fake_backend(), child=[sys.executable, "-c", CHILD, "10"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_stops_child_and_sweep(arguments, small, results, number):
    parent = Forked(sweep_of_processes, [*arguments, small], apart=True)
    wait_for(lambda: list(results.glob("*.partial/config.yaml")))
    (child,) = map(int, Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
    parent.send_signal(number)
    err = parent.communicate(timeout=20)[1]
    assert parent.returncode == 130
    assert err == "\nerror: interrupted: 0 of 5 arms recorded, and the same command goes on\n"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert sorted(path.name for path in results.iterdir()) == [".locks", "sweeps"], "the child cleaned up"


def test_kill_at_any_moment_then_start_again(launch_sweep, start_sweep, six, results, tmp_path):
    def finished() -> dict[str, int]:
        return {path.parent.name: path.stat().st_mtime_ns for path in results.glob("*[!l]/metrics.json")}

    def under_way() -> bool:
        return bool(list(results.glob("*.partial/config.yaml")))

    kept: dict[str, int] = {}
    moments = [
        (os.kill, lambda: list(results.glob("sweeps/*.json"))),
        (os.killpg, lambda: len(finished()) >= 2 and under_way()),
        (os.kill, lambda: len(finished()) >= 4),
    ]
    for kill, moment in moments:
        sweep = start_sweep(six, step_seconds=0.01)
        wait_for(moment)
        kill(sweep.pid, signal.SIGKILL)
        sweep.wait()
        assert finished().items() >= kept.items()
        kept = finished()
    assert 4 <= len(kept) < 6
    sweep = start_sweep(six)
    output = sweep.communicate(timeout=120)[0]
    assert sweep.returncode == 0, output
    assert f"6 arms, {len(kept)} done, {6 - len(kept)} to go" in output
    assert finished().items() >= kept.items(), "a finished arm was repeated"
    assert len((tmp_path / "loads").read_text().split()) <= 6 + len(moments), "each kill costs one arm at most"

    assert launch_sweep(six, f"results_dir={tmp_path}/whole") == 0
    whole = load_runs(sweep_file(tmp_path / "whole"))
    resumed = load_runs(sweep_file(results))
    assert len(whole) == 6
    assert load_runs(results).attrs["incomplete"] == 0
    pd.testing.assert_frame_equal(deterministic(resumed), deterministic(whole))


def test_two_sweeps_at_once_share_the_work(start_sweep, six, results, tmp_path):
    both = [start_sweep(six, step_seconds=0.002) for _ in range(2)]
    outputs = [sweep.communicate(timeout=120)[0] for sweep in both]
    assert [sweep.returncode for sweep in both] == [0, 0], outputs
    runs = load_runs(results)
    assert len(runs) == 6
    assert runs.attrs["incomplete"] == 0
    assert len((tmp_path / "loads").read_text().split()) == 6, "no arm was run twice"
    assert len(json.loads(sweep_file(results).read_text())["arms"]) == 6
    assert list(load_runs(sweep_file(results))["run"].sort_values()) == list(runs["run"].sort_values())


def test_name_of_many_joined_sweeps_is_short_enough_for_wandb(launch_sweep, tmp_path, results):
    names = [f"sweep_of_a_long_name_{number}" for number in range(20)]
    for name in names:
        (tmp_path / f"{name}.yaml").write_text("axes: {engine.block_size: 16}")
    paths = ",".join(f"{tmp_path}/{name}.yaml" for name in names)
    assert launch_sweep(f"+sweep=[{paths}]", "limit=1") == 0
    assert sweep_file(results).stem.startswith("sweep_of_a_long_name_0+")
    assert len(sweep_file(results).stem) <= 128


@pytest.mark.parametrize(
    ("more", "group"),
    [
        (["tracking=wandb_offline"], "own-"),
        (["tracking=wandb_offline", "tracking.group=mine"], "mine"),
        ([], None),
    ],
)
def test_runs_in_wandb_are_grouped_by_their_sweep(launch_sweep, tmp_path, results, more, group, monkeypatch):
    monkeypatch.setattr("experiments.running.tracking.pictures", dict)
    (tmp_path / "own.yaml").write_text("axes: {seed: [0, 1]}")
    assert launch_sweep(f"+sweep={tmp_path}/own.yaml", "limit=2", *more) == 0
    assert len(load_runs(results)) == 2
    groups = load_runs(results)["tracking.group"].unique().tolist()
    assert len(groups) == 1
    assert groups[0] is None if group is None else groups[0].startswith(group)
