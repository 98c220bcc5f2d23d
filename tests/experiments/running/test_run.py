"""The main job on a fake engine: its record, its notes, and what it asks the engine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml

from experiments.config.compose import load_experiment
from experiments.config.notes import notes_before
from experiments.records import load_events, load_requests, load_runs, load_steps, provenance
from experiments.records.provenance import code_state
from experiments.workloads import Problem
from tests.experiments.fake_engine import FakeTokenizer
from tests.experiments.running.run_process import start


def test_record_is_whole_and_reads_back(launch, results, capsys):
    assert launch("sampling.max_tokens=20", "engine.block_size=32") == 0
    printed = capsys.readouterr().out
    runs = load_runs(results)
    assert len(runs) == 1
    row = runs.iloc[0]
    assert f"record: {row['path']}" in printed
    plan, table = printed.splitlines()[:2]
    assert plan.startswith("memory plan: ")
    assert table.startswith("| run")
    assert row["engine.block_size"] == 32
    assert row["samples"] == row["prompts"] == 6
    assert row["finish_reasons.length"] == 6
    assert row["output_tokens"] == 6 * 20
    assert row["output_length.p50"] == 20
    assert row["steps"] == 20
    assert row["peak_blocks"] == 7
    assert row["counters.steps"] == 20
    assert row["memory.num_blocks"] == 100

    folder = Path(row["path"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "events.parquet",
        "metrics.json",
        "provenance.json",
        "requests.parquet",
        "steps.parquet",
    ]
    requests, steps = load_requests(row), load_steps(folder)
    assert len(requests) == 6
    assert len(steps) == 20
    assert (requests["output_tokens"] == 20).all()
    assert requests["prompt"].str.startswith("<user>").all()
    assert requests["prompt"].str.endswith("<assistant>").all()
    assert (requests["arrival"] >= 0).all()
    assert (steps["time"] >= 0).all()
    assert [ord(c) for c in requests["output"][0]] == list(requests["output_token_ids"][0])


def test_provenance_says_where_the_numbers_come_from(launch, results):
    launch()
    folder = Path(load_runs(results)["path"][0])
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["model_files"].keys() == {"config.json"}
    assert len(provenance["data"]) == len(provenance["prompts"]) == len(provenance["chat_template"]) == 64
    assert {"python", "torch", "transformers", "zipage"} <= provenance["versions"].keys()
    assert provenance["hardware"]["threads"] >= 1
    assert provenance["seeds"] == {"run": 0, "workload": 0, "scenario": 0}
    assert provenance["started"] <= provenance["ended"]
    assert {"commit", "diff"} == provenance["code"].keys()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["limit"] == 6
    assert "results_dir" not in config


def test_asking_git_writes_nothing(tmp_path, monkeypatch):
    """Git's own lock would outlive a run that is killed meanwhile, and be in the way of the next commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("a")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "file"]):
        subprocess.run([*git, *command], check=True)
    os.utime(tmp_path / "file", (1, 1))  # which git would note in its index
    before = (tmp_path / ".git" / "index").read_bytes()
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert code_state()["diff"] == "none"
    assert (tmp_path / ".git" / "index").read_bytes() == before


def test_grades_are_those_of_the_answers(launch, results):
    launch("workload.options.count=200", "limit=200")
    requests = load_requests(load_runs(results).iloc[0])
    said = requests["output"].str.extract(r"answer is (\d+)")[0]
    right = said == requests["gold"]
    assert 0 < right.sum() < len(right)
    assert (requests["grade"] == right).all()
    assert (requests["extracted"] == said).all()
    assert load_runs(results)["accuracy"][0] == pytest.approx(right.mean())


def test_samples_of_a_prompt_are_rows_of_their_own(launch, results):
    assert launch("sampling=nucleus", "workload.samples=3") == 0
    requests = load_requests(load_runs(results).iloc[0])
    assert len(requests) == 18
    assert (requests.groupby("prompt_id")["sample_index"].apply(list).map(lambda x: x == [0, 1, 2])).all()


def test_finished_run_is_skipped_and_force_repeats_it(launch, results, capsys):
    launch()
    before = load_runs(results).iloc[0]
    capsys.readouterr()
    assert launch(fail_at=0) == 0, "the engine must not be asked again"
    out = capsys.readouterr().out
    assert "already done" in out
    assert f"record: {before['path']}" in out
    assert "| run" in out
    assert launch("tracking.project=other", fail_at=0) == 0
    assert launch("force=true") == 0
    after = load_runs(results)
    assert len(after) == 1
    assert after["run"][0] == before["run"]
    assert after["seconds"][0] != before["seconds"]
    assert launch("seed=1") == 0
    assert len(load_runs(results)) == 2


def test_what_is_hardly_meant_is_said_before_the_run(launch, results, tmp_path, capsys):
    data, times = tmp_path / "questions.jsonl", tmp_path / "times.csv"
    data.write_text('{"question": "1+1", "answer": "2"}\n{"question": "2+2", "answer": "four"}\n')
    times.write_text("arrival,prompt_tokens,output_tokens\n0,5,6\n0,7,8\n")
    trace = ("scenario=trace", f"scenario.path={times}")
    policy = ("policy=streaming", "policy.budget_tokens=100", "policy.interval=300")
    assert launch("workload=jsonl", f"workload.path={data}", "workload.samples=4", *policy, *trace) == 0
    said = capsys.readouterr().out.partition("memory plan")[0].splitlines()
    assert said == [
        "note: policy.budget_tokens=100: whole blocks of 256 make it 256, 156% more; a smaller engine.block_size comes "
        "closer",
        "note: policy.interval=300: whole blocks of 256 make it 512, 71% more; a smaller engine.block_size comes "
        "closer",
        "note: sampling.n=4 at temperature 0: unless the policy draws at random, the samples of a problem are equal; "
        "sampling=nucleus draws different ones, sampling.n=1 asks once",
        f"note: scenario.path={times}: only arrivals are read of it, not prompt_tokens, output_tokens; "
        "workload=trace makes requests as long as those of the trace",
        "note: workload.grader=number: can't read 1 of 2 golds, whose answers score 0; the first is 1: ValueError: the "
        "gold 'four' holds no number",
    ]


@pytest.mark.parametrize(
    ("grader", "good", "bad"),
    [
        ("number", "18", "four"),
        ("math", "\\frac{1}{2}", "}"),
        ("f1", "a word", "..."),
        ("literal", "[1, 2]", "f(x"),
        ("code", '{"setup": "", "tests": [["1", "2"]]}', "18"),
    ],
)
def test_golds_that_a_grader_cannot_read_are_found_without_an_answer(grader, good, bad):
    experiment = load_experiment(["model=hf", "model.path=m", f"workload.grader={grader}"])
    problems = [Problem(name, "?", gold) for name, gold in (("a", good), ("b", bad), ("c", bad))]
    problems.append(Problem("d", "", "", error="is null"))
    (line,) = notes_before(experiment, problems)
    assert line.startswith(f"workload.grader={grader}: can't read 2 of 3 golds, whose answers score 0; the first is b:")
    assert notes_before(experiment, problems[:1]) == []


def test_nothing_is_said_of_what_is_usual(launch, capsys):
    assert launch("policy=zipage", "policy.budget_tokens=500", "workload.samples=2", "sampling=nucleus") == 0
    assert "note:" not in capsys.readouterr().out


def test_poisson_arrivals_are_spread(launch, results):
    assert launch("scenario=poisson", "scenario.rate=50") == 0
    arrivals = load_requests(load_runs(results).iloc[0])["arrival"]
    assert arrivals.is_monotonic_increasing
    assert arrivals.iloc[-1] - arrivals.iloc[0] > 0.02


def test_nothing_is_littered(launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    launch()
    assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"runs", "cache"}


def test_sampling_seed_depends_on_the_problem_alone():
    from experiments.config.compose import load_experiment
    from experiments.running.job import sampling_params
    from experiments.workloads import load_problems

    experiment = load_experiment()
    problems = load_problems(experiment.workload, 8)
    seeds = [sampling_params(experiment, problem).seed for problem in problems]
    assert len(set(seeds)) == 8
    assert sampling_params(load_experiment(["limit=2"]), problems[3]).seed == seeds[3]
    assert sampling_params(load_experiment(["seed=1"]), problems[3]).seed != seeds[3]
    assert sampling_params(load_experiment(["sampling.seed=7"]), problems[3]).seed == 7


def test_two_processes_make_one_record(arguments, results):
    children = [start(0.02, arguments) for _ in range(2)]
    outputs = [child.communicate(timeout=50)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert sum("already done" in output for output in outputs) == 1
    runs = load_runs(results)
    assert len(runs) == 1
    assert runs.attrs["incomplete"] == 0


def test_prompts_follow_the_chat_template(model_folder):
    from experiments.config.compose import load_experiment
    from experiments.running.prompts import PromptRenderer
    from experiments.workloads import Problem

    problem = Problem("0", "1+1?", "2")

    def render(*options: str):
        experiment = load_experiment(["workload.template='Q: {question}'", *options])
        return PromptRenderer(experiment.workload, experiment.model, FakeTokenizer()).render(problem)

    assert render().text == "<user>Q: 1+1?<assistant>"
    assert render().token_ids == [ord(c) for c in "<user>Q: 1+1?<assistant>"], "no special tokens beside the template's"
    assert render("workload.system_prompt=Think.").text == "<system>Think.<user>Q: 1+1?<assistant>"
    assert render("model.chat_template_options={thinking: true}").text == "<user>Q: 1+1?thinking<assistant>"
    bare = render("model.chat_template=none", "workload.system_prompt=Think.")
    assert bare.text == "Think.\n\nQ: 1+1?"
    assert bare.token_ids[0] == 1

    # Earlier turns go before, as they were: the workload's template is for the question alone.
    problem = Problem("0", "1+1?", "2", history=(("3+3?", "6"), ("4+4?", "8")))
    turns = "<user>3+3?<assistant>6<user>4+4?<assistant>8<user>Q: 1+1?<assistant>"
    assert render().text == turns
    assert render("workload.system_prompt=Think.").text == f"<system>Think.{turns}"
    assert render("model.chat_template=none").text == "3+3?\n\n6\n\n4+4?\n\n8\n\nQ: 1+1?"
    assert render("model.chat_template=none", "workload.system_prompt=Think.").text.startswith("Think.\n\n3+3?\n\n6")


def test_steps_table_has_the_columns_of_the_engine(launch, results):
    from dataclasses import fields

    from zipage import StepStats

    launch()
    steps = load_steps(load_runs(results).iloc[0])
    assert list(steps.columns) == [f.name for f in fields(StepStats)]
    assert pd.api.types.is_integer_dtype(steps["num_decode"])


NEVER_BOUND = "the budget never bound: no request was compressed, so this run equals full KV"


def test_events_of_a_run_read_back(launch, results, capsys):
    policy = ["policy=zipage", "policy.budget_tokens=50", "engine.block_size=16", "engine.trace_positions=true"]
    assert launch(*policy, "workload.samples=2", "sampling=nucleus") == 0
    assert NEVER_BOUND not in capsys.readouterr().out
    row = load_runs(results).iloc[0]
    events, requests = load_events(row), load_requests(row)
    assert row["compressions"] == len(events) == requests["compressions"].sum() >= 12
    assert row["budget_bound_share"] == 1
    assert not row["budget_never_bound"]
    assert row["entries_evicted"] == (events["entries_before"] - events["entries_after"]).sum()
    assert row["peak_query_slots"] == 6
    assert set(events["kind"]) == {"compress"}
    assert set(events["prompt_id"]) == set(requests["prompt_id"])
    assert set(events["sample_index"]) == {0, 1}
    assert events["time"].between(0, row["seconds"]).all()
    for _, event in events.iterrows():
        kept = event["kept_positions"]
        assert kept.dtype == "int32"
        assert kept.shape == tuple(event["kept_shape"]) == (2, 3, 64)
        assert (kept == range(event["num_tokens"] - 64, event["num_tokens"])).all()


def test_a_budget_that_never_bound_is_said(launch, results, capsys):
    options = ["policy=zipage", "policy.budget_tokens=4000"]
    for first in ("memory plan", "already done"):
        assert launch(*options) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(first)
        assert lines[-2] == NEVER_BOUND
        (row,) = (line for line in lines if "4,096 (for 4,000)" in line)
        assert "never bound" in row
    row = load_runs(results).iloc[0]
    assert row["budget_never_bound"]
    assert (row["budget_bound_share"], row["compressions"], row["entries_evicted"]) == (0, 0, 0)
    assert load_events(row).empty


def test_full_kv_has_no_budget_to_bind(launch, results, capsys):
    assert launch("policy.budget_tokens=64", "engine.block_size=16") == 0
    assert NEVER_BOUND not in capsys.readouterr().out
    row = load_runs(results).iloc[0]
    assert row["budget_bound_share"] is None
    assert not row["budget_never_bound"]
    assert row["peak_query_slots"] == 0


def test_several_policies_in_one_command(launch, results, capsys):
    assert launch("policy=full,zipage,random_attention", "policy.budget_tokens=64", "engine.block_size=16", "-m") == 0
    runs = load_runs(results)
    assert sorted(zip(runs["policy.name"], runs["policy.protection"], strict=True)) == [
        ("full", "none"),
        ("random", "prompt"),
        ("zipage", "none"),
    ]
    said = capsys.readouterr().out
    assert said.count("| accuracy |") == 1, "they are in one table"
    table = said[said.index("| run") :].splitlines()
    assert [line.split("|")[2].strip() for line in table[2:5]] == ["full", "random + prompt", "zipage"]
    assert all(f"record: {path}\n" in said for path in runs["path"])
    assert launch("policy=zipage,snapkv", "policy.budget_tokens=64", "policy.options.chunk=16", "-m") == 2
    assert len(load_runs(results)) == 4, "the choice that takes the option ran"
