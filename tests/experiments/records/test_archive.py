"""Small copies of runs: what they keep, what they leave behind, what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from experiments import archive, regrade
from experiments.analysis.comparison import compare
from experiments.analysis.samples import read_samples
from experiments.records import (
    CONFIG,
    EVENTS,
    HASHES,
    METRICS,
    PROVENANCE,
    REQUESTS,
    STEPS,
    damage,
    load_requests,
    load_runs,
    load_steps,
)


@pytest.fixture
def run(launch, results):
    assert launch("limit=3", "sampling.max_tokens=5") == 0
    return load_runs(results).iloc[0]


def test_a_copy_tells_the_same_without_the_texts(run, results, tmp_path, capsys):
    copies = tmp_path / "copies"
    assert archive.main([str(results), "--to", str(copies)]) == 0
    assert "1 run copied" in capsys.readouterr().out
    copy = load_runs(copies).iloc[0]
    places = ["path", "model.path"]
    pd.testing.assert_series_equal(copy.drop(places), run.drop(places), check_names=False)
    whole, kept = load_requests(run), load_requests(copy)
    assert set(whole.columns) - set(kept.columns) == {"prompt", "output", "output_token_ids"}
    pd.testing.assert_frame_equal(kept, whole[kept.columns])
    assert not (copies / run["run"] / STEPS).exists()
    assert not (copies / run["run"] / EVENTS).exists()


def test_a_copy_names_no_folder_of_the_machine(run, results, tmp_path):
    assert str(tmp_path) in (Path(run["path"]) / CONFIG).read_text()
    assert archive.main([str(results), "--to", str(tmp_path / "copies")]) == 0
    copy = load_runs(tmp_path / "copies").iloc[0]
    for name in (CONFIG, PROVENANCE):
        text = (Path(copy["path"]) / name).read_text()
        assert str(tmp_path) not in text
    assert Path(copy["model.path"]).name == copy["model.path"]


def test_steps_and_events_when_asked_for(run, results, tmp_path):
    assert archive.main([str(results), "--to", str(tmp_path / "copies"), "--steps", "--events"]) == 0
    copy = load_runs(tmp_path / "copies").iloc[0]
    pd.testing.assert_frame_equal(load_steps(copy), load_steps(run))
    assert (tmp_path / "copies" / run["run"] / EVENTS).exists()


def test_texts_when_asked_for(run, results, tmp_path):
    assert archive.main([str(results), "--to", str(tmp_path / "copies"), "--texts"]) == 0
    whole, kept = load_requests(run), load_requests(load_runs(tmp_path / "copies").iloc[0])
    assert set(whole.columns) - set(kept.columns) == {"output_token_ids"}
    assert kept["output"].tolist() == whole["output"].tolist()


def test_a_copy_replaces_the_one_before(run, results, tmp_path):
    for options in (["--steps"], []):
        assert archive.main([str(results), "--to", str(tmp_path / "copies"), *options]) == 0
    assert not (tmp_path / "copies" / run["run"] / STEPS).exists()


def test_a_run_is_not_copied_onto_itself(run, results, capsys):
    assert archive.main([run["path"], "--to", str(results)]) == 2
    assert "holds" in capsys.readouterr().err
    assert "output" in load_requests(run).columns


def test_faults_are_one_line(run, results, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, line in (
        ([str(results), "--to", str(tmp_path / "file" / "copies")], "can't be written"),
        ([str(tmp_path / "nowhere"), "--to", str(tmp_path / "copies")], "no such folder of runs"),
        ([str(tmp_path / "file"), "--to", str(tmp_path / "copies")], "not the record of a sweep"),
    ):
        assert archive.main(arguments) == 2
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
    broken = results / run["run"] / REQUESTS
    broken.write_bytes(b"no parquet")
    assert archive.main([str(results), "--to", str(tmp_path / "copies")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list((tmp_path / "copies").glob("*/metrics.json")), "no copy passes for whole"


def test_a_damaged_run_costs_the_others_nothing(run, launch, results, tmp_path, capsys):
    launch("seed=1")
    (results / run["run"] / REQUESTS).write_bytes(b"no parquet")
    capsys.readouterr()
    assert archive.main([str(results), "--to", str(tmp_path / "copies")]) == 0
    assert "1 run copied" in capsys.readouterr().out
    assert damage(Path(load_runs(tmp_path / "copies")["path"][0])) is None


def test_a_copy_of_an_old_record_says_how_many_loop(run, results, tmp_path):
    path = results / run["run"] / METRICS
    metrics = json.loads(path.read_text())
    rate = metrics.pop("loop_rate")
    del metrics[HASHES]
    path.write_text(json.dumps(metrics))
    assert archive.main([str(results), "--to", str(tmp_path / "copies")]) == 0
    assert load_runs(tmp_path / "copies")["loop_rate"].tolist() == [rate]
    assert compare(load_runs(tmp_path / "copies"))["problems"].tolist() == [3]


def test_samples_without_tokens_can_be_compared(run, results, tmp_path):
    archive.archive(results / run["run"], tmp_path)
    samples = read_samples(tmp_path / run["run"], loops=True)
    assert samples.loop_rate is None
    assert len(samples.problems) == 3


def test_a_table_of_another_run_is_not_taken_for_its_own(launch, results, tmp_path, capsys, caplog):
    for seed in (1, 2):
        assert launch("limit=3", "sampling.max_tokens=5", f"seed={seed}") == 0
    runs = load_runs(results)
    own, other = (Path(path) for path in runs["path"])
    (own / REQUESTS).write_bytes((other / REQUESTS).read_bytes())
    for read in (load_requests, read_samples):
        with pytest.raises(ValueError, match=f"^{REQUESTS} is not as it was written$"):
            read(own)
    assert compare(runs)["accuracy"].notna().tolist() == [False, True]
    assert caplog.messages == [f"{own}: its samples can't be read ({REQUESTS} is not as it was written)"]
    assert regrade.main([str(results)]) == 1
    error = capsys.readouterr().err
    assert error == f"error: {own.name}: its samples can't be read (ValueError: {REQUESTS} is not as it was written)\n"
