"""Tracking: the real wandb offline, and its faults never reach the run."""

from __future__ import annotations

import pytest

from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.records import load_runs, read_config
from experiments.running.tracking import NullTracker, WandbTracker, open_tracker
from tests.experiments.made_runs import make_run
from zipage import StepStats

STEP = StepStats(**dict.fromkeys(StepStats.__slots__, 0))


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def tracking(*options: str):
    return load_experiment(options).tracking


def test_off_by_default(tmp_path):
    tracker = open_tracker(tracking(), "run", {}, tmp_path)
    assert isinstance(tracker, NullTracker)
    tracker.log_step(STEP)
    tracker.finish({})
    assert not list(tmp_path.iterdir())


def test_offline_run_is_kept_on_disk(launch, results, no_key):
    assert launch("tracking=wandb_offline", "limit=2", "sampling.max_tokens=3") == 0
    runs = load_runs(results)
    assert len(runs) == 1
    assert runs.attrs["incomplete"] == 0
    files = list((results / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    assert runs["run"][0] in files[0].name
    assert files[0].stat().st_size > 0
    stored = files[0].read_bytes()
    assert b"record-" in stored  # the artifact of the run's files
    assert b"answers" in stored
    assert b"step/time" in stored
    images = {path.name.partition("_")[0] for path in (results / "wandb").rglob("*.png")}
    assert images == {"throughput", "concurrency", "blocks", "latency"}


def test_long_names_lose_nothing(launch, results, no_key, capsys, monkeypatch):
    monkeypatch.setattr("experiments.running.tracking.pictures", dict)
    long = "x" * 200
    assert launch("tracking=wandb_offline", f"model.name={long}", "limit=2", "sampling.max_tokens=3") == 0
    assert "tracking: wandb failed" not in capsys.readouterr().out
    (stored,) = (results / "wandb").glob("offline-run-*/*.wandb")
    assert b"finish_reasons.length" in stored.read_bytes(), "the summary"


@pytest.mark.parametrize(
    ("option", "line"),
    [
        (f"tracking.group={'x' * 129}", "must be 1 to 128 characters, or null"),
        (f"tracking.project={'x' * 129}", "must be of wandb's form"),
        ("tracking.project=a/b", "must be of wandb's form"),
        (f"tracking.tags=[a,{'x' * 65}]", "must be tags of 1 to 64 characters"),
    ],
)
def test_names_that_wandb_refuses_are_refused_before_the_run(option, line):
    with pytest.raises(UsageError, match=f"{option.partition('=')[0]}=.*: {line}"):
        tracking(option)


def test_online_without_a_key_goes_offline(tmp_path, no_key, capsys):
    tracker = open_tracker(tracking("tracking=wandb_online"), "a-run", {"limit": 3}, tmp_path)
    tracker.log_step(STEP)
    tracker.finish({"accuracy": 0.5, "ttft": {"p50": 0.1}})
    assert "wandb has no key here: offline" in capsys.readouterr().out
    assert list((tmp_path / "wandb").glob("offline-run-*-a-run"))


@pytest.mark.parametrize("where", ["init", "log", "record", "finish"])
def test_a_fault_costs_one_line_and_the_run_goes_on(monkeypatch, tmp_path, capsys, where):
    import wandb

    runs = []

    class Run:
        def __init__(self):
            self.summary = {}
            self.id = "run"
            self.finished = 0
            runs.append(self)

        def define_metric(self, *name, **options):
            pass

        def log_artifact(self, artifact):
            if where == "record":
                raise RuntimeError("no\nroom")

        def log(self, values):
            if where == "log":
                raise RuntimeError("no\nroom")

        def finish(self, exit_code):
            self.finished += 1
            if where == "finish":
                raise RuntimeError("no\nroom")

    def init(**options):
        if where == "init":
            raise RuntimeError("no\nroom")
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr("experiments.running.tracking.pictures", dict)
    tracker = WandbTracker(tracking("tracking=wandb_offline"), "run", {}, tmp_path)
    for _ in range(3):
        tracker.log_step(STEP)
    (tmp_path / "metrics.json").write_text("{}")
    tracker.log_record(tmp_path, [{"prompt_id": "0", "grade": 1.0}])
    tracker.finish({"accuracy": 1.0})
    out = capsys.readouterr().out
    assert out == "tracking: wandb failed and is left out from here on (RuntimeError: no room)\n"
    # Else the next run of this process would go on in this one.
    assert [(run.finished, run.summary) for run in runs] == [(1, {"accuracy": 1.0})] * (where != "init")


def test_names_in_any_script_keep_their_record(tmp_path, no_key, capsys):
    run = make_run(tmp_path, "run")
    for name in ("日本語-sums-full-0123456789ab", "é-sums-full-0123456789ab"):
        tracker = open_tracker(tracking("tracking=wandb_offline"), name, read_config(run), tmp_path)
        tracker.log_record(run, [{"prompt_id": "0", "grade": 1.0}])
        tracker.finish({"accuracy": 1.0})
        assert list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))
    assert "wandb failed" not in capsys.readouterr().out


def test_missing_wandb_costs_one_line(monkeypatch, tmp_path, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = open_tracker(tracking("tracking=wandb_offline"), "run", {}, tmp_path)
    tracker.log_step(STEP)
    tracker.finish(None)
    assert capsys.readouterr().out.count("\n") == 1
