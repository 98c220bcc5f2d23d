"""Runs that fail, are interrupted or are asked for wrongly: what is said, and what stays."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from experiments.records import load_requests, load_runs
from tests.experiments.running.run_process import start, wait_for


def test_engine_that_fails_leaves_one_line_and_no_record(launch, results, capsys):
    assert launch(fail_at=5) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: the engine failed after 5 steps: RuntimeError: the device is gone")
    assert not list(results.rglob("metrics.json"))
    assert "RuntimeError: the device" in next(results.rglob("traceback.txt")).read_text()
    assert load_runs(results).attrs["incomplete"] == 1
    assert launch() == 0
    assert load_runs(results).attrs["incomplete"] == 0


def test_failed_repeat_keeps_the_old_record(launch, results):
    launch()
    before = load_runs(results)["seconds"][0]
    assert launch("force=true", fail_at=3) == 1
    assert load_runs(results)["seconds"][0] == before


def test_interrupt_leaves_nothing(launch, results, capsys):
    assert launch(fail_at=5, error=KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "error: interrupted: nothing was recorded\n"
    assert [path.name for path in results.iterdir()] == [".locks"]
    assert not list((results / ".locks").iterdir())


def test_refused_prompt_costs_itself_only(launch, results, capsys):
    assert launch("workload.samples=2", "sampling=nucleus", max_prompt=200) == 0
    row = load_runs(results).iloc[0]
    requests = load_requests(row)
    refused = requests[requests["prompt"].str.len() > 200]
    assert 0 < len(refused) < len(requests) == 12
    assert refused["error"].str.contains("the pool holds 200").all()
    assert (refused["grade"] == 0).all()
    assert row["errors"] == len(refused)
    assert row["finish_reasons.error"] == len(refused)
    assert f"{len(refused)} of 12 samples could not be answered; the first is" in capsys.readouterr().out


def test_items_that_cannot_be_asked_cost_themselves_only(launch, results, tmp_path, capsys):
    data = tmp_path / "questions.jsonl"
    lines = ['{"question": "1+1", "answer": "2"}', '{"question": "\\ud800", "answer": "2"}', '{"question": null}']
    data.write_text("\n".join(lines))
    assert launch("workload=jsonl", f"workload.path={data}", "workload.samples=2", "sampling=nucleus") == 0
    row = load_runs(results).iloc[0]
    requests = load_requests(row)
    assert row["errors"] == 4
    assert requests["error"].isna().tolist() == [True] * 2 + [False] * 4
    assert (requests["grade"][2:] == 0).all()
    assert requests["prompt"].str.contains("None").sum() == 0
    assert (
        "4 of 6 samples could not be answered; the first is 1: the question of item 1 holds" in capsys.readouterr().out
    )


def test_run_without_any_answer_is_no_run(launch, results, capsys):
    assert launch(max_prompt=1) == 1
    assert "6 of 6 samples could not be answered" in capsys.readouterr().err
    assert load_runs(results).empty


def test_fault_of_the_grader_costs_a_row(launch, results, tmp_path, capsys):
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "1+1", "answer": "2"}\n{"question": "2+2", "answer": "four"}\n')
    assert launch("workload=jsonl", f"workload.path={data}") == 0
    requests = load_requests(load_runs(results).iloc[0])
    assert requests["grader_error"].notna().tolist() == [False, True]
    assert "1 of 2 samples could not be graded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments_", "line"),
    [
        (["engine.blok_size=16"], "engine.blok_size: unknown option; did you mean engine.block_size?"),
        (["model.path=no/such/folder"], "model.path=no/such/folder: no such file or folder"),
        (["model.path=org/name"], "model.path=org/name: no such folder here, and not to be had from the hub"),
        (["workload.path=nowhere.jsonl"], "workload.path=nowhere.jsonl: no such file"),
        (["engine.block_size=17"], "engine.block_size=17: must be a power of two from 16 to 256"),
        (["workload.grader=mind"], "workload.grader=mind: must be one of number, math, exact"),
        (["backend=vlm"], "backend=vlm: must be one of zipage"),
        (["model.chat_template=none.jinja"], "model.chat_template=none.jinja: must be auto, none or a file"),
        (["workload.options.count=0"], "workload.options: count=0"),
        (["workload.options.kount=1"], "workload.options.kount: unknown option of word_problems; known: count, steps"),
    ],
)
def test_wrong_usage_is_one_line(launch, results, capsys, arguments_, line):
    assert launch(*arguments_) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {line}")
    assert captured.err.count("\n") == 1
    assert not list(results.rglob("*.parquet"))


def test_wrong_engine_option_from_the_engine_is_one_line(monkeypatch, arguments, capsys):
    from experiments import run

    def refuse(**options):
        raise ValueError("num_blocks=1: holds no\nrequest")

    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    assert run.main({"zipage": refuse}) == 2
    assert capsys.readouterr().err == "error: the model can't be loaded: engine.num_blocks=1: holds no request\n"


def test_unwritable_results_are_found_before_the_model(launch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert launch(f"results_dir={tmp_path}/file/runs", "model.path=nowhere") == 2
    assert capsys.readouterr().err.startswith(f"error: results_dir={tmp_path}/file/runs: can't be written")


def test_full_disk_is_one_line(launch, results, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("experiments.records.schemas.write_rows", full)
    assert launch() == 1
    err = capsys.readouterr().err
    assert "can't be written: No space left on device" in err
    assert err.count("\n") == 1
    assert load_runs(results).attrs["incomplete"] == 0


def test_kill_leaves_nothing_complete_and_the_next_run_completes(launch, arguments, results):
    child = start(10, arguments)
    wait_for(lambda: list(results.glob("*.partial/config.yaml")))
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    runs = load_runs(results)
    assert runs.empty
    assert runs.attrs["incomplete"] == 1
    assert launch() == 0
    runs = load_runs(results)
    assert len(runs) == 1
    assert runs.attrs["incomplete"] == 0
