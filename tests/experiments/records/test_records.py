"""Records: ids, whole or not at all, and reading them back."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from experiments import records
from experiments.analysis.metrics import cache_bytes, inter_token_latency
from experiments.config.compose import load_experiment
from experiments.config.schema import Experiment, WorkloadConfig, to_dict
from experiments.errors import RunError, UsageError
from experiments.paths import ROOT
from experiments.records import content, ids, schemas
from experiments.records.provenance import FOLDERS
from experiments.reporting.conclusion import conclusions
from experiments.running import outcomes
from experiments.running.job import Job
from experiments.workloads import load_problems
from tests.experiments import made_runs
from tests.experiments.records.benchmark_ids import BENCHMARK_IDS
from zipage import EventStats


def make_run(folder: Path, name: str, accuracy: float = 0.5) -> Path:
    with records.claim(folder / name) as staging:
        groups = {"model": {"name": "m"}, "workload": {"name": "w"}, "policy": {"name": "full", "protection": "none"}}
        records.write_config(staging, groups | {"limit": 3, "note": "1e-3"})
        records.write_json(staging / records.PROVENANCE, {"code": {"commit": "abc"}})
        schemas.write_rows(staging / records.REQUESTS, [], schemas.REQUEST_SCHEMA)
        records.publish(staging, folder / name, {"accuracy": accuracy, "ttft": {"p50": None}})
    return folder / name


def identify(*options: str, **replace: str) -> str:
    parts = {"model": "m0", "data": "d0", "device": "cpu"} | replace
    config = to_dict(load_experiment(options))
    config["model"]["name"] = "tiny"
    return records.run_id(config, **parts)


class TestRunId:
    def test_reads_well(self):
        assert re.fullmatch(r"tiny-word_problems-full-[0-9a-f]{12}", identify())

    def test_what_changes_no_number_changes_no_id(self):
        base = identify()
        for option in ("tracking=wandb_offline", "results_dir=elsewhere", "force=true", "workload.path=x.jsonl"):
            assert identify(option) == base, option

    def test_everything_else_does(self):
        others = [
            identify(option)
            for option in ("seed=1", "limit=3", "engine.block_size=16", "sampling.temperature=1", "hardware.threads=1")
        ]
        others += [
            identify(model="m1"),
            identify(data="d1"),
            identify(device="H100"),
            identify("policy.trigger=pressure"),
        ]
        assert len({identify(), *others}) == len(others) + 1

    def test_names_are_safe_as_folders(self):
        config = to_dict(load_experiment())
        config["model"]["name"] = "../a b/c"
        assert "/" not in records.run_id(config, model="m", data="d", device="cpu")

    @pytest.mark.parametrize("name", [".x", "..", "x" * 300, "模" * 300, "x\udcff"])
    def test_no_name_makes_a_folder_that_is_hidden_or_too_long(self, tmp_path, name):
        config = to_dict(load_experiment(["policy.name=full"]))
        config["model"]["name"] = name
        run = records.run_id(config, model="m", data="d", device="cpu")
        make_run(tmp_path, run)
        assert records.load_runs(tmp_path)["run"].tolist() == [run]
        assert len(run) <= 121, "wandb takes 128 characters, and an artifact is named record-<run id>"

    def test_an_option_that_comes_later_renames_no_run(self, monkeypatch):
        config = to_dict(load_experiment())
        config["model"]["name"] = "tiny"
        before = records.run_id(config, model="m", data="d", device="cpu")
        monkeypatch.setattr(ids, "LATER", ids.LATER | {"engine.new": False, "new": None})

        def with_new(inside: object, outside: object) -> str:
            later = config | {"engine": config["engine"] | {"new": inside}, "new": outside}
            return records.run_id(later, model="m", data="d", device="cpu")

        assert with_new(False, None) == before
        assert len({before, with_new(True, None), with_new(False, 1), with_new(0, None)}) == 4, "any other value does"


COMMITTED = sorted(
    path.parent
    for path in (ROOT / "results" / "records").rglob("config.yaml")
    if (path.parent / "requests.parquet").exists()
)
HINT = "an option came, went or has another default: see records.ids.LATER"


def test_committed_records_keep_their_ids():
    """What a record says gives its id, also when today's options stand beside those it knew."""
    today = to_dict(load_experiment())
    named = [run for run in COMMITTED if run.name != "demo"]  # renamed by hand
    assert len(named) > 150
    for run in named:
        config, origin = records.read_config(run), json.loads((run / records.PROVENANCE).read_text())
        gpus = origin["hardware"]["gpus"]
        device = gpus[0] if gpus and config["hardware"]["device"] != "cpu" else "cpu"
        parts = {"model": records.content_hash(origin["model_files"]), "data": origin["data"], "device": device}
        if calibration := origin.get("calibration"):
            parts["files"] = {records.CALIBRATION: calibration}
        assert records.run_id(config, **parts) == run.name
        for option, value in records.flatten(today).items():
            group, _, name = option.rpartition(".")
            if group in Experiment.__dataclass_fields__:
                config[group].setdefault(name, ids.LATER.get(option, value))
            elif not group:
                config.setdefault(name, ids.LATER.get(option, value))
        assert records.run_id(config, **parts) == run.name, HINT


def test_committed_benchmarks_keep_their_ids():
    """Their folders were renamed by hand, so the ids that they had stand here."""
    found = {}
    for rows in (ROOT / "results" / "records").rglob(records.ROWS):
        config, origin = records.read_config(rows.parent), json.loads((rows.parent / records.PROVENANCE).read_text())
        (device,) = set(origin["hardware"]["gpus"])
        name = config["scenario"]["name"]
        found[rows.parent.name] = records.benchmark_id(name, config, inputs=origin["inputs"], device=device)
    assert found == BENCHMARK_IDS


def test_the_questions_of_committed_records_are_still_drawn():
    """Each generated workload gives the content whose hash its records have."""
    hashes: dict[str, set[str]] = {}
    for run in COMMITTED:
        config, origin = records.read_config(run), json.loads((run / records.PROVENANCE).read_text())
        workload = config["workload"]
        if workload["path"] or (workload["options"] or {}).get("path"):  # data that do not come with the clone
            continue
        hashes.setdefault(json.dumps([config["workload"], config["limit"]]), set()).add(origin["data"])
    assert len(hashes) > 10
    for key, recorded in hashes.items():
        options, limit = json.loads(key)
        experiment = replace(Experiment(), workload=WorkloadConfig(**options), limit=limit)
        problems = load_problems(experiment.workload, limit)
        assert recorded == {Job(experiment, factory=None, problems=problems, model=None).data}, options


def test_committed_records_are_read():
    runs = records.load_runs(ROOT / "results" / "records")
    assert set(runs["run"]) == {run.name for run in COMMITTED}
    assert runs.attrs["incomplete"] == 0


def test_committed_steady_states_tell_nothing_of_their_short_requests():
    runs = records.load_runs(ROOT / "results" / "records" / "paper_speed_h100")
    assert runs[["kv_bytes.max", "ttft.p50", "tpot.p50", "output_length.mean"]].isna().all(axis=None)
    assert not any("of its memory" in line for line in conclusions(runs))


def test_content_hash_ignores_the_order_of_keys():
    assert records.content_hash({"a": 1, "b": [1, 2]}) == records.content_hash({"b": [1, 2], "a": 1})
    assert records.content_hash([1, 2]) != records.content_hash([2, 1])


class TestWriting:
    def test_json_is_whole_or_not_there(self, tmp_path, monkeypatch):
        path = tmp_path / "metrics.json"
        records.write_json(path, {"a": 1})

        def die(_):
            raise OSError("power is gone")

        monkeypatch.setattr(os, "fsync", die)
        with pytest.raises(OSError, match="power"):
            records.write_json(path, {"a": 2})
        assert json.loads(path.read_text()) == {"a": 1}
        with pytest.raises(ValueError, match="JSON compliant"):
            records.write_json(path, {"a": float("nan")})

    def test_claim_starts_from_an_empty_folder(self, tmp_path):
        for stale in (tmp_path / "run.partial", tmp_path / "run.0123456789ab.partial"):
            stale.mkdir()
            (stale / "metrics.json").write_text("{}")
        with records.claim(tmp_path / "run") as staging:
            assert list(tmp_path.glob("*.partial")) == [staging]
            assert not list(staging.iterdir())
        assert not staging.exists()

    @pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), UsageError("x")])
    def test_nothing_stays_behind_after_a_fault(self, tmp_path, error):
        def write_and_fail():
            with records.claim(tmp_path / "run") as staging:
                (staging / "steps.parquet").write_text("half")
                raise error

        with pytest.raises(type(error)):
            write_and_fail()
        assert [path.name for path in tmp_path.iterdir()] == [".locks"]
        assert not list((tmp_path / ".locks").iterdir())

    def test_traceback_of_a_failed_run_stays(self, tmp_path):
        def fail():
            with records.claim(tmp_path / "run") as staging:
                (staging / records.TRACEBACK).write_text("why")
                raise RunError("x")

        with pytest.raises(RunError):
            fail()
        (staging,) = tmp_path.glob("run.*.partial")
        assert (staging / records.TRACEBACK).read_text() == "why"

    def test_one_at_a_time(self, tmp_path, capsys):
        inside, most = [], []

        def work(number):
            with records.claim(tmp_path / "run") as staging:
                inside.append(number)
                most.append(len(inside))
                (staging / "mine").write_text(str(number))
                time.sleep(0.02)
                assert (staging / "mine").read_text() == str(number)
                inside.remove(number)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1] * 8
        assert "another process is making run: waiting for it" in capsys.readouterr().out

    def test_publish_replaces_what_was_there(self, tmp_path):
        make_run(tmp_path, "run", accuracy=0.1)
        (tmp_path / "run" / "old").write_text("")
        make_run(tmp_path, "run", accuracy=0.2)
        assert not (tmp_path / "run" / "old").exists()
        assert records.load_runs(tmp_path)["accuracy"].tolist() == [0.2]

    def test_unwritable_folder_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="can't be written: Not a directory"):
            records.check_writable(tmp_path / "file" / "runs")


class TestReading:
    def test_one_row_a_run(self, tmp_path):
        make_run(tmp_path, "b", 0.2)
        make_run(tmp_path, "a", 0.1)
        runs = records.load_runs(tmp_path)
        assert runs["run"].tolist() == ["a", "b"]
        assert runs["accuracy"].tolist() == [0.1, 0.2]
        assert runs["model.name"].tolist() == ["m", "m"]
        assert runs["provenance.code.commit"].tolist() == ["abc", "abc"]
        assert runs["note"].tolist() == ["1e-3", "1e-3"]

    @pytest.mark.parametrize(
        "text",
        [
            (ROOT / "results" / "records" / "demo" / "config.yaml").read_text(),
            "a: &x [1, 2]\nb: *x\n",
            "a:\n- 1\n- 2\nb: 'one\n\n  two'\n# note\nc: |\n  x: 1\n  y\n",
            "---\na: {b: null}\n",
            '"a": 1\n',
            "a: 1\na: 2\n",
            "just text\n",
            "",
        ],
    )
    def test_config_is_what_yaml_says(self, text):
        assert content.parse_config(text) == yaml.load(text, Loader=content._Loader)

    def test_incomplete_runs_are_counted_and_left_out(self, tmp_path, caplog):
        make_run(tmp_path, "whole")
        (make_run(tmp_path, "cut") / "metrics.json").unlink()
        make_run(tmp_path, "staged").rename(tmp_path / "staged.partial")
        (tmp_path / "wandb" / "offline" / "files").mkdir(parents=True)
        (tmp_path / "wandb" / "offline" / "files" / "config.yaml").write_text("")
        with caplog.at_level(logging.WARNING):
            runs = records.load_runs(tmp_path)
        assert runs["run"].tolist() == ["whole"]
        assert runs.attrs["incomplete"] == 2
        (said,) = [record.getMessage() for record in caplog.records]
        assert said.startswith("2 incomplete runs skipped: in progress, stopped or never begun; ")
        assert said.endswith("removes its .partial folder")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("metrics.json", "{"),
            ("metrics.json", "[]"),
            ("config.yaml", "a: ["),
            ("config.yaml", ""),
            ("provenance.json", None),
            ("metrics.json", '{"accuracy": "high"}'),
            ("metrics.json", "[" * 100_000),
            ("config.yaml", "policy: full"),
            ("requests.parquet", None),
            ("requests.parquet", ""),
        ],
    )
    def test_corrupt_record_costs_one_line(self, tmp_path, caplog, name, content):
        make_run(tmp_path, "good")
        path = make_run(tmp_path, "bad") / name
        path.unlink() if content is None else path.write_text(content)
        with caplog.at_level(logging.WARNING):
            runs = records.load_runs(tmp_path)
        assert runs["run"].tolist() == ["good"]
        assert len(caplog.records) == 1
        line = caplog.records[0].getMessage()
        assert line.startswith(f"{path.parent}: skipped")
        assert "\n" not in line

    @pytest.mark.parametrize("name", ["metrics.json", "config.yaml", "provenance.json", "requests.parquet"])
    def test_damage_is_known_wherever_it_is(self, tmp_path, name):
        path = make_run(tmp_path, "run") / name
        assert records.damage(path.parent) is None
        content = path.read_bytes()
        for at in (10, len(content) // 2, len(content) - 2):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert records.damage(path.parent), f"a flipped bit at {at}"
        path.write_bytes(content[:-100])
        assert records.damage(path.parent)

    def test_damage_of_a_record_without_hashes_is_what_cannot_be_read(self, tmp_path):
        run = made_runs.make_run(tmp_path, "run")
        assert records.HASHES not in json.loads((run / "metrics.json").read_text())
        assert records.damage(run) is None
        content = (run / "requests.parquet").read_bytes()
        (run / "requests.parquet").write_bytes(content[: len(content) // 2])
        assert records.damage(run)
        assert records.load_runs(tmp_path).empty

    def test_committed_records_are_whole(self):
        assert {run.name: records.damage(run) for run in COMMITTED if records.damage(run)} == {}

    def test_folders_and_runs_can_be_given(self, tmp_path):
        a, b = make_run(tmp_path / "x" / "deep", "a"), make_run(tmp_path / "y", "b")
        assert records.load_runs([a, b])["run"].tolist() == ["a", "b"]
        assert records.load_runs([tmp_path, a])["run"].tolist() == ["a", "b"]

    def test_record_without_events_has_none(self, tmp_path):
        columns = [f.name if f.name != "request_id" else "prompt_id" for f in fields(EventStats)]
        events = records.load_events(make_run(tmp_path, "old"))
        assert events.empty
        assert list(events.columns) == [*columns, "kept_shape"]

    def test_events_come_back_as_they_were(self, tmp_path):
        kept = [np.arange(24, dtype=np.int32).reshape(2, 3, 4), None, np.arange(6, dtype=np.int32).reshape(1, 2, 3)]
        counts = dict.fromkeys(("step", "round", "num_tokens", "entries_before", "entries_after"), 3)
        sizes = {"request_id": "p", "sample_index": 1, "blocks_before": 2, "blocks_after": 1, "seconds": 0.5}
        kinds = ("compress", "pause", "compress")
        events = [
            EventStats(kind=kind, time=10.0 + i, kept_positions=positions, **counts, **sizes)
            for i, (kind, positions) in enumerate(zip(kinds, kept, strict=True))
        ] * schemas._ROW_GROUP
        run = make_run(tmp_path, "run")
        schemas.write_rows(run / records.EVENTS, outcomes.event_rows(events, start=10.0), schemas.EVENT_SCHEMA)
        frame = records.load_events(records.load_runs(tmp_path).iloc[0])
        assert frame["kind"].tolist() == [*kinds] * schemas._ROW_GROUP
        assert frame["time"].tolist() == [0.0, 1.0, 2.0] * schemas._ROW_GROUP
        assert set(frame["prompt_id"]) == {"p"}
        for positions, expected in zip(frame["kept_positions"], kept * schemas._ROW_GROUP, strict=True):
            if expected is None:
                assert positions is None
            else:
                assert positions.dtype == np.int32
                assert np.array_equal(positions, expected)
        assert pq.ParquetFile(run / records.EVENTS).metadata.row_group(0).column(0).compression == "ZSTD"

    def test_missing_folder_is_named(self, tmp_path):
        with pytest.raises(UsageError, match="no such folder of runs"):
            records.load_runs(tmp_path / "nothing")

    def test_no_runs_give_an_empty_frame(self, tmp_path):
        assert records.load_runs(tmp_path).empty


# What a run's numbers mean


def test_inter_token_latency_weighs_steps_by_the_samples_that_decode():
    steps = [{"time": t, "num_decode": n} for t, n in ((0.0, 5), (1.0, 0), (3.0, 1), (3.5, 8), (4.0, 1))]
    found = inter_token_latency(steps)
    assert found["mean"] == pytest.approx((2.0 * 1 + 0.5 * 8 + 0.5 * 1) / 10)
    assert (found["p50"], found["p90"], found["p99"], found["max"]) == (0.5, 0.5, 2.0, 2.0)
    assert inter_token_latency(steps[:2]) == dict.fromkeys(("mean", "p50", "p90", "p99", "max"))


def test_bytes_of_a_cache_are_those_of_the_blocks_it_held():
    plan = {"block_size": 16, "block_bytes": 100, "max_blocks_per_request": 5, "query_slot_bytes": 7}
    row = {"prompt_tokens": 16, "output_tokens": 1000, "peak_blocks": 22, "query_slot": True, "error": None}
    assert cache_bytes(row, plan) == 2207
    assert cache_bytes(row | {"query_slot": False}, plan) == 2200
    sliding = cache_bytes(row | {"peak_sliding_blocks": 3}, plan | {"sliding_block_bytes": 20})
    assert sliding == 2267
    assert cache_bytes(row | {"peak_blocks": None}, plan) is None, "an engine that does not tell"
    assert cache_bytes(row, None) is cache_bytes(row, {"planned_by": "another"}) is None


def test_committed_records_name_no_folder_of_a_machine():
    """But temporary ones, in commands of old records."""
    found = {}
    for path in (ROOT / "results").rglob("*"):
        if path.suffix in (".json", ".yaml", ".md"):
            folders = [
                name for name in FOLDERS.findall(path.read_text(encoding="utf-8")) if not name.startswith("/tmp/")
            ]
            if folders:
                found[path.name] = folders
    assert not found
