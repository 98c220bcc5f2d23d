"""Requests of given lengths, arrivals from a file, and grading that comes later or never."""

from __future__ import annotations

import json
import sys

import pandas as pd
import pytest

from experiments import archive, regrade, run
from experiments.backends import BACKENDS
from experiments.bench import gate
from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.records import HASHES, load_requests, load_runs
from experiments.running.job import sampling_params
from experiments.running.scenarios import arrival_times
from experiments.workloads import load_problems


def load(*options: str):
    return load_problems(load_experiment(["workload=lengths", *options]).workload)


class TestLengths:
    def test_prompts_and_outputs_are_as_long_as_asked(self, launch, results):
        options = ["prompt_tokens=30", "output_tokens=7", "count=6"]
        assert launch("workload=lengths", *(f"workload.options.{option}" for option in options)) == 0
        row = load_runs(results).iloc[0]
        requests = load_requests(row)
        assert requests["prompt_tokens"].tolist() == [30] * 6
        assert requests["output_tokens"].tolist() == [7] * 6
        assert requests["grade"].isna().all()
        assert row["accuracy"] is None
        assert requests["prompt"].nunique() == 6

    def test_refused_requests_are_not_graded_either(self, launch, results):
        options = ["workload.options.distribution=lognormal", "workload.options.output_tokens=5"]
        assert launch("workload=lengths", *options, "limit=20", max_prompt=512) == 0
        row = load_runs(results).iloc[0]
        assert row["errors"] > 0
        assert row["accuracy"] is None

    def test_end_tokens_do_not_end_them(self):
        experiment = load_experiment(["workload=lengths"])
        assert experiment.sampling.ignore_eos
        assert not load_experiment().sampling.ignore_eos
        params = sampling_params(experiment, load("workload.options.output_tokens=9")[0])
        assert (params.max_tokens, params.ignore_eos) == (9, True)

    def test_lognormal_lengths_follow_the_seed_and_the_median(self):
        options = ["workload.options.distribution=lognormal", "workload.options.count=999"]
        problems = load(*options, "workload.options.longest=1500")
        prompts = sorted(p.prompt_tokens for p in problems)
        assert 450 < prompts[499] < 580
        assert 1 <= prompts[0] < prompts[-1] <= 1500
        assert [p.prompt_tokens for p in problems] != [p.output_tokens for p in problems]
        assert problems == load(*options, "workload.options.longest=1500") != load(*options, "workload.seed=1")

    def test_lengths_of_a_record(self, launch, results):
        launch("limit=6")
        run = load_runs(results).iloc[0]
        recorded = ["workload.options.distribution=recorded", f"workload.options.run={run['path']}"]
        problems = load(*recorded, "workload.options.count=5")
        requests = load_requests(run)
        assert [p.prompt_tokens for p in problems] == requests["prompt_tokens"].tolist()[:5]
        assert [p.output_tokens for p in problems] == requests["output_tokens"].tolist()[:5]
        with pytest.raises(UsageError, match="count=64: the run has 6 answered samples"):
            load(*recorded)

    def test_lengths_drawn_from_a_trace(self, tmp_path):
        path = tmp_path / "trace.csv.gz"
        table = pd.DataFrame({"arrival": 0.5, "output_tokens": range(1, 41), "prompt_tokens": range(101, 141)})
        table.to_csv(path, index=False)
        traced = ["workload.options.distribution=trace", f"workload.options.path={path}", "workload.options.count=30"]
        problems = load(*traced)
        outputs = [p.output_tokens for p in problems]
        assert len(set(outputs)) == 30
        assert outputs != sorted(outputs)
        assert [p.prompt_tokens for p in problems] == [100 + n for n in outputs]
        assert problems == load(*traced) != load(*traced, "workload.seed=1")
        bounded = load(*traced, "workload.options.longest=20")
        assert [(p.prompt_tokens, p.output_tokens) for p in bounded] == [(20, min(20, n)) for n in outputs]
        with pytest.raises(UsageError, match="count=41: the trace has 40 requests"):
            load(*traced[:2], "workload.options.count=41")
        table.assign(output_tokens=0).to_csv(path, index=False)
        with pytest.raises(UsageError, match="line 2: output_tokens='0': must be a whole number of at least 1 tokens"):
            load(*traced)

    def test_a_shape_without_a_tokenizer_will_do(self, tmp_path, results, monkeypatch, capsys):
        folder = tmp_path / "shape"
        folder.mkdir()
        sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "vocab_size": 300}
        (folder / "config.json").write_text(json.dumps(gate.SHAPE | sizes))
        common = ["model=dummy", f"model.path={folder}", "hardware=cpu", f"results_dir={results}"]
        common += ["engine.block_size=16", "engine.num_blocks=32", "engine.max_model_len=128", "limit=3"]
        lengths = ["workload=lengths", *(f"workload.options.{n}" for n in ("prompt_tokens=30", "output_tokens=40"))]
        policy = ["policy=zipage", "policy.budget_tokens=32"]
        monkeypatch.setattr(sys, "argv", ["experiments.run", *common, *lengths, *policy])
        assert run.main(BACKENDS) == 0
        row = load_runs(results).iloc[0]
        assert load_requests(row)["output_tokens"].tolist() == [40] * 3
        assert row["prompt_tokens"] == 90
        assert row["compressions"] > 0
        monkeypatch.setattr(sys, "argv", ["experiments.run", *common])
        assert run.main(BACKENDS) == 2
        assert "has no tokenizer" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("option", "line"),
        [
            ("count=0", "count=0: must be a whole number of at least 1"),
            ("prompt_tokens=x", "prompt_tokens=x: must be"),
            ("sigma=-1", "sigma=-1"),
            ("distribution=normal", "distribution=normal: must be fixed, lognormal, recorded or trace"),
            ("distribution=trace", "path=None: must be given"),
            ("{distribution: trace, path: nowhere.csv}", "path=nowhere.csv: can't be read"),
            ("distribution=recorded", "run=None: must be given"),
            ("{distribution: recorded, run: nowhere}", "run=nowhere: its requests.parquet can't be read"),
        ],
    )
    def test_wrong_options(self, option, line):
        with pytest.raises(UsageError) as caught:
            load(f"workload.options={option}" if option[0] == "{" else f"workload.options.{option}")
        assert str(caught.value).startswith(f"workload.options: {line}")
        assert "\n" not in str(caught.value)


class TestTraces:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("t.jsonl", "0.5\n0\n\n2\n"),
            ("t.jsonl", '{"arrival": 2, "x": 1}\n{"arrival": 0.5}\n{"arrival": 0}\n'),
            ("t.csv", "id,arrival\na,0\nb,0.5\nc,2.0\n"),
        ],
    )
    def test_times_are_read_in_order(self, tmp_path, name, text):
        (tmp_path / name).write_text(text)
        scenario = load_experiment(["scenario=trace", f"scenario.path={tmp_path / name}"]).scenario
        assert arrival_times(scenario, 3) == [0.0, 0.5, 2.0]
        assert arrival_times(scenario, 2) == [0.0, 0.5]

    @pytest.mark.parametrize(
        ("name", "text", "line"),
        [
            ("t.jsonl", "1\n", "holds 1 times for 3 requests: give limit=1"),
            ("t.jsonl", "1\n-2\n3\n", "line 2: arrival=-2: must be seconds, 0 or more"),
            ("t.jsonl", "1\nNaN\n3\n", "line 2: arrival=nan: must be seconds, 0 or more"),
            ("t.jsonl", "[]\n", "line 1: must be a number, the arrival in seconds, or an object"),
            ("t.jsonl", "soon\n", "line 1: is not JSON"),
            ("t.jsonl", '{"time": 1}\n', "has the columns time, which fit no known trace"),
            ("t.csv", "0\n1\n2\n", "has the columns 0, which fit no known trace"),
            ("t.csv", "arrival\nx\n", "line 2: arrival='x': must be seconds, 0 or more"),
            ("t.txt", "1\n", "must end in .jsonl or .csv"),
            ("t.jsonl", None, "can't be read (No such file or directory)"),
        ],
    )
    def test_faults_are_named_before_the_model_is_loaded(self, tmp_path, launch, capsys, name, text, line):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        asked = ["workload=word_problems", "scenario=trace", f"scenario.path={path}", "limit=3"]
        assert launch(*asked, fail_at=0) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: scenario.path={path}: {line}")
        assert err.count("\n") == 1

    def test_requests_arrive_when_the_trace_says(self, tmp_path, launch, results):
        path = tmp_path / "t.jsonl"
        path.write_text("0\n0.2\n0.2\n0.4\n0.4\n0.6\n")
        trace = ["workload=word_problems", "scenario=trace", f"scenario.path={path}"]
        assert launch(*trace) == 0
        requests = load_requests(load_runs(results).iloc[0])
        assert requests["arrival"].tolist() == pytest.approx([0, 0.2, 0.2, 0.4, 0.4, 0.6])
        assert (requests["ttft"] < 0.15).all()
        path.write_text("0\n0\n0\n0\n0\n0\n")
        assert launch(*trace) == 0
        assert len(load_runs(results)) == 2, "the times decide the run, not the file's name"


class TestRegrade:
    def test_same_grader_gives_the_same_grades(self, launch, results, capsys):
        launch("workload.options.count=60", "limit=60")
        run = load_runs(results).iloc[0]
        capsys.readouterr()
        before = sorted(results.rglob("*"))
        assert regrade.main([str(results)]) == 0
        percent = f"{run['accuracy']:.1%}"
        assert capsys.readouterr().out == f"{run['run']}: {percent} -> {percent}, 0 of 60 grades changed\n"
        assert sorted(results.rglob("*")) == before, "nothing is written"

    def test_other_grader_and_its_grades_in_a_file(self, launch, results, tmp_path, capsys):
        launch("workload.grader=none", "workload.samples=2", "sampling=nucleus")
        file = tmp_path / "grades.parquet"
        capsys.readouterr()
        assert regrade.main([str(results), "--grader", "exact", "--write", str(file)]) == 0
        out = capsys.readouterr().out
        assert ": ungraded -> 0.0%, 12 of 12 grades changed\n" in out
        table = pd.read_parquet(file)
        assert len(table) == 12
        assert set(table["grader"]) == {"exact"}
        assert table["old_grade"].isna().all()
        assert (table["grade"] == 0).all()
        assert table["extracted"].str.startswith("So it goes.").all()

    def test_refused_samples_keep_their_grade(self, launch, results, capsys):
        launch(max_prompt=200)
        assert regrade.main([str(results), "--grader", "f1"]) == 0

    def test_a_run_that_cannot_be_graded_costs_itself(self, launch, results, tmp_path, capsys, caplog):
        """A copy without texts, one that runs code, a damaged one: each is a line, and the others are graded."""
        launch()
        kept = load_runs(results).iloc[0]["run"]
        file, copies = tmp_path / "grades.parquet", tmp_path / "copies"
        assert archive.main([str(results), "--to", str(copies)]) == 0
        launch("seed=1")
        launch("seed=2")
        code, damaged = sorted(set(load_runs(results)["run"]) - {kept})
        config = results / code / "config.yaml"
        config.write_text(config.read_text().replace("grader: number", "grader: code"))
        metrics = results / code / "metrics.json"
        kept_metrics = {key: value for key, value in json.loads(metrics.read_text()).items() if key != HASHES}
        metrics.write_text(json.dumps(kept_metrics))
        (results / damaged / "requests.parquet").write_bytes(b"PAR1")
        capsys.readouterr()
        assert regrade.main([str(copies), str(results), "--write", str(file)]) == 1
        out, err = capsys.readouterr()
        assert out.startswith(f"{kept}: ")
        assert set(pd.read_parquet(file)["run"]) == {kept}
        assert len(err.splitlines()) == 2
        assert f"error: {kept}: the record has no output: it is a copy without texts" in err
        assert f"error: {code}: --grader code: would run the Python programs" in err
        assert "--allow-code-execution allows it" in err
        assert f"{damaged}: skipped, its record is damaged" in caplog.text

    def test_code_needs_consent_here_too(self, launch, results, capsys):
        launch()
        capsys.readouterr()
        assert regrade.main([str(results), "--grader", "code"]) == 2
        err = capsys.readouterr().err
        assert "--allow-code-execution allows it" in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        ("more", "line"),
        [
            (["--grader", "mind"], "--grader mind: must be one of"),
            (["--write", "x.csv"], "--write x.csv: must be a .parquet file"),
        ],
    )
    def test_wrong_usage_is_one_line(self, launch, results, capsys, more, line):
        launch()
        capsys.readouterr()
        assert regrade.main([str(results), *more]) == 2
        assert capsys.readouterr().err.startswith(f"error: {line}")

    def test_no_run_is_said(self, tmp_path, capsys):
        assert regrade.main([str(tmp_path)]) == 2
        assert capsys.readouterr().err == "error: no finished run in what was given\n"


def test_code_without_consent_starts_nothing(launch, results, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    item = {"task_id": "0", "prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"}
    path.write_text(json.dumps(item) + "\n")
    assert launch("workload=humaneval", f"workload.path={path}", fail_at=0) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: workload.grader=code: would run the Python programs in the model's answers")
    assert err.count("\n") == 1
