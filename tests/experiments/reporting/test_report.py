"""Numbers of a run, and the table of runs."""

from __future__ import annotations

import json

import pytest

from experiments import report
from experiments.analysis.metrics import spread, summarise
from experiments.config.options import told_apart
from experiments.records import HASHES, load_runs
from experiments.records.provenance import code_state, collect, device_name
from experiments.reporting.runs_table import WIDTH, mixture
from tests.experiments import made_runs
from tests.experiments.made_runs import make_run


def test_accuracy_is_the_mean_over_samples_refused_ones_included():
    answered = {"error": None, "finish_reason": "stop", "prompt_tokens": 10, "ttft": 0.5, "tpot": 0.1, "e2e": 2.0}
    rows = [
        answered | {"prompt_id": "a", "sample_index": 0, "grade": 1.0, "output_tokens": 4},
        answered | {"prompt_id": "a", "sample_index": 1, "grade": 0.0, "output_tokens": 6},
        answered | {"prompt_id": "b", "sample_index": 0, "grade": 1.0, "output_tokens": 8, "ttft": 1.5},
        {"prompt_id": "c", "sample_index": 0, "grade": 0.0, "output_tokens": 0, "prompt_tokens": 99}
        | {"finish_reason": "error", "error": "too long"},
    ]
    steps = [
        {"blocks_used": 3, "num_running": 2, "query_slots_used": 1},
        {"blocks_used": 7, "num_running": 1, "query_slots_used": 0},
    ]
    steps = [step | {"time": float(i), "num_decode": 1} for i, step in enumerate(steps)]
    metrics = summarise(rows, steps, [], seconds=2.0, evicts=False)
    assert metrics["kv_bytes"]["max"] is None, "no plan"
    assert metrics["accuracy"] == 0.5
    assert (metrics["prompts"], metrics["samples"], metrics["errors"]) == (3, 4, 1)
    assert metrics["finish_reasons"] == {"stop": 3, "error": 1}
    assert metrics["output_tokens"] == 18
    assert metrics["output_tokens_per_second"] == 9
    assert metrics["prompt_tokens"] == 119, "a prompt counts once, however many samples it has"
    assert metrics["output_length"]["mean"] == 6
    assert metrics["ttft"]["mean"] == pytest.approx(2.5 / 3)
    assert metrics["peak_blocks"] == 7
    assert metrics["peak_query_slots"] == 1
    assert metrics["budget_bound_share"] is None
    assert not metrics["budget_never_bound"]


def test_what_replicas_hold_counts_at_once_and_their_steps_apart():
    told = [(0, 0.0, 5, 2), (1, 0.9, 3, 1), (0, 1.0, 6, 2), (1, 1.1, 4, 1), (0, 2.0, 0, 0), (1, 2.1, 7, 3)]
    steps = [
        {"replica": r, "time": t, "blocks_used": used, "num_running": running, "query_slots_used": 1, "num_decode": 1}
        for r, t, used, running in told
    ]
    row = {"prompt_id": "a", "sample_index": 0, "grade": 1.0, "output_tokens": 4, "prompt_tokens": 1}
    metrics = summarise([row | {"finish_reason": "stop"}], steps, [], seconds=2.0, evicts=False)
    assert (metrics["peak_blocks"], metrics["peak_running"], metrics["peak_query_slots"]) == (10, 3, 2)
    assert metrics["itl"]["mean"] == pytest.approx((1.0 + 1.0 + 0.2 + 1.0) / 4)


def test_how_far_the_budget_bound():
    def sample(compressions: int, **more) -> dict:
        row = {"prompt_id": "a", "sample_index": 0, "grade": 1.0, "output_tokens": 4, "prompt_tokens": 2, "error": None}
        return row | {"finish_reason": "stop", "compressions": compressions, "pauses": 1} | more

    rows = [sample(3), sample(0), sample(1), sample(0), sample(0, error="too long")]
    compress, pause = ({"kind": kind, "entries_before": 80, "entries_after": 64} for kind in ("compress", "pause"))
    metrics = summarise(rows, [], [compress, pause, compress], seconds=1.0, evicts=True)
    assert (metrics["compressions"], metrics["pauses"], metrics["entries_evicted"]) == (4, 5, 32)
    assert metrics["budget_bound_share"] == 0.5, "of the answered samples"
    assert metrics["budget_never_bound"] is False
    idle = summarise([sample(0), sample(0)], [], [pause], seconds=1.0, evicts=True)
    assert (idle["budget_bound_share"], idle["budget_never_bound"], idle["entries_evicted"]) == (0, True, 0)


def test_spread_of_nothing_is_none():
    assert set(spread([None, None]).values()) == {None}
    assert spread([1.0, None, 3.0]) == pytest.approx({"mean": 2, "p50": 2, "p90": 2.8, "p99": 2.98, "max": 3})


def test_table_of_runs(launch, results, capsys):
    launch()
    launch("seed=1")
    capsys.readouterr()
    assert report.main([str(results), "--wide"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("|")[1].strip() == "run"
    assert {line.split("|")[1].strip() for line in lines[2:]} == set(load_runs(results)["run"])


def test_table_shows_budgets_and_compressions(launch, results, capsys):
    launch("policy.budget_tokens=64")
    launch("policy=zipage", "policy.budget_tokens=64", "engine.block_size=16")
    launch("policy=snapkv", "policy.budget_tokens=4000")
    launch("policy=random_attention")
    capsys.readouterr()
    assert report.main([str(results), "--wide"]) == 0
    headings, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|")
    )
    cells = {row["policy"]: row for row in (dict(zip(headings, cells, strict=True)) for cells in rows)}
    assert {name: row["budget"] for name, row in cells.items()} == {
        "full": "-",
        "zipage": "64",
        "snapkv": "4,096 (for 4,000) (never bound)",
        "random + prompt": "512 (never bound)",
    }
    assert int(cells["zipage"]["compressions"]) > 0
    assert cells["full"]["compressions"] == cells["snapkv"]["compressions"] == "0"


def test_options_that_differ_are_columns_and_budgets_are_those_that_held(tmp_path, capsys):
    block = {"engine.block_size": 256}
    make_run(tmp_path, "a", "zipage", 100, options=block | {"policy.options": {"power": 2}})
    make_run(tmp_path, "b", "zipage", 272, options=block)
    make_run(tmp_path, "c", "zipage", 512, options=block | {"backend": "vllm"})
    make_run(tmp_path, "d", "zipage", 512, options=block | {"engine.dtype": "float32", "sampling.n": 32})
    make_run(tmp_path, "e", options=block | {"policy.trigger": "pressure", "policy.interval": 300})
    make_run(tmp_path, "f", options=block | {"model.name": "other"})
    assert report.main([str(tmp_path), "--wide"]) == 0
    headings, _, *rows = capsys.readouterr().out.splitlines()
    names = [cell.strip() for cell in headings.split("|")[1:-1]]
    cells = [dict(zip(names, (c.strip() for c in row.split("|")[1:-1]), strict=True)) for row in rows[:6]]
    assert names[:5] == ["run", "model", "workload", "policy", "budget"]
    assert set(names[5:9]) == {"engine.dtype", "policy.options.power", "sampling.n", "backend"}
    budgets = ["-", "-", "256 (for 100)", "512", "512", "512 (for 272)"]
    assert sorted(row["budget"] for row in cells) == sorted(budgets)
    assert {row["budget"]: row["policy.options.power"] for row in cells} == dict.fromkeys(budgets, "-") | {
        "256 (for 100)": "2"
    }
    said = " ".join(line.strip() for line in rows[6:])
    assert "note: whole blocks made the budget of 2 runs more than 5 % larger than was asked for" in said
    assert "note: 1 run drew several samples a problem at temperature 0: unless a policy draws at random" in said
    assert max(map(len, rows[6:])) <= WIDTH


def test_an_interval_is_a_column_and_its_rounding_is_said(tmp_path, capsys):
    for name, interval in (("a", None), ("b", 128), ("c", 300)):
        make_run(tmp_path, name, "zipage", 512, options={"engine.block_size": 64, "policy.interval": interval})
    assert report.main([str(tmp_path), "--wide"]) == 0
    said = capsys.readouterr().out
    headings, _, *rows = said.splitlines()
    place = [cell.strip() for cell in headings.split("|")].index("policy.interval")
    assert [row.split("|")[place].strip() for row in rows[:3]] == ["128", "300", "-"]
    assert "note: whole blocks made policy.interval of 1 run more than 5 % larger" in " ".join(said.split())


def test_records_from_before_an_option_have_its_default(tmp_path):
    make_run(tmp_path, "old")
    make_run(tmp_path, "new")
    runs = load_runs(tmp_path).astype(dict.fromkeys(("engine.enforce_eager", "policy.recent_tokens"), object))
    runs.loc[0, ["engine.enforce_eager", "policy.recent_tokens", "workload.grader"]] = None
    assert told_apart(runs) == []
    assert told_apart(runs.iloc[:1]) == told_apart(runs.iloc[:0]) == []


def test_answers_that_could_not_be_graded_are_said(launch, results, tmp_path, capsys):
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "1+1", "answer": "2"}\n{"question": "2+2", "answer": "four"}\n')
    launch("workload=jsonl", f"workload.path={data}")
    capsys.readouterr()
    report.main([str(results)])
    assert "note: 1 sample could not be graded and counts as wrong\n" in capsys.readouterr().out


def test_published_figures_stand_beside_ours_without_a_page_too(tmp_path, capsys):
    make_run(tmp_path / "runs", "a", "random", 512, "prompt")
    arguments = [str(tmp_path / "runs"), "--published", "zipage_table1"]
    assert report.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tiny, sums, 512" in next(line for line in lines if line.startswith("| random + prompt"))
    assert report.main([*arguments, "--tables", str(tmp_path / "tables")]) == 0
    assert "tiny, sums, 512" in (tmp_path / "tables" / "published.md").read_text()
    capsys.readouterr()
    assert report.main([*arguments[:-1], "nothing"]) == 2
    assert "nothing: no such table" in capsys.readouterr().err


def test_records_from_before_there_was_eviction_are_in_the_table(launch, results, capsys):
    launch()
    path = next(results.glob("*/metrics.json"))
    metrics = json.loads(path.read_text())
    for name in ("compressions", "budget_never_bound", "facts_known", HASHES):
        del metrics[name]
    path.write_text(json.dumps(metrics))
    capsys.readouterr()
    assert report.main([str(results), "--wide"]) == 0
    assert capsys.readouterr().out.splitlines()[2].count(" - ") == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("requests.parquet", ""),
        ("metrics.json", '{"accuracy": "high", "tpot": {"p50": "fast"}}'),
        ("metrics.json", "[" * 100_000),
        ("config.yaml", "policy: full"),
        ("provenance.json", "\udcff"),
    ],
)
def test_damaged_record_costs_the_table_a_line(tmp_path, capsys, caplog, monkeypatch, name, content):
    if name != "requests.parquet":  # which pictures read; what they make of a damaged record is the same in all
        monkeypatch.setattr("experiments.reporting.pictures.pictures", lambda runs, compared: iter(()))
    made_runs.make_run(tmp_path, "good")
    damaged = made_runs.make_run(tmp_path, "bad")
    (damaged / name).write_text(content, errors="surrogateescape")
    assert (
        report.main([str(tmp_path), "--tables", str(tmp_path / "tables"), "--html", str(tmp_path / "page.html")]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| good")] == ["good"]
    assert [line for line in caplog.messages if line.startswith(f"{damaged}: skipped, its record is damaged (")]


def test_table_says_where_its_rows_are_of_different_code(tmp_path, capsys):
    def make(name: str, policy: str, engine: str, own: str) -> None:
        hashes = {"engine": engine, "policy": own, "grader": "g"}
        made_runs.make_run(tmp_path, name, policy, 64, origin={"sources": hashes})

    def printed() -> str:
        assert report.main([str(tmp_path)]) == 0
        return " ".join(capsys.readouterr().out.split())

    make("a", "full", "e", "f")
    make("b", "zipage", "e", "z")
    for base in ("snapkv", "h2o"):
        origin = {"sources": {"engine": "e", "policy": f"critical and {base}", "grader": "g"}}
        made_runs.make_run(tmp_path, base, "critical", 64, origin=origin, options={"policy.options.base": base})
    assert "note:" not in printed()
    make("c", "zipage", "e", "z, edited")
    assert "note: these rows were made by 2 versions of the policy zipage: the code is a part of what" in printed()
    make("d", "h2o", "e, edited", "h")
    assert "2 versions of the engine zipage, 2 versions of the policy zipage: " in printed()
    assert "versions" in mixture(load_runs([tmp_path / "a", made_runs.make_run(tmp_path, "old")]))


def test_table_of_nothing_says_so(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == "no finished run\n"
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder of runs" in capsys.readouterr().err


def test_code_state_follows_the_files(tmp_path, monkeypatch):
    import subprocess

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t", *arguments], check=True)

    monkeypatch.setattr("experiments.records.provenance.ROOT", tmp_path)
    monkeypatch.delenv("ZIPAGE_COMMIT", raising=False)
    assert code_state() == {"commit": "unknown", "diff": "unknown"}
    monkeypatch.setenv("ZIPAGE_COMMIT", "f" * 40)
    assert code_state() == {"commit": "f" * 40, "diff": "unknown"}, "a copy without its history"
    git("init", "-q")
    assert code_state() == {"commit": "f" * 40, "diff": "unknown"}, "a history without a commit"
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "first")
    clean = code_state()
    assert len(clean["commit"]) == 40
    assert clean["commit"] != "f" * 40, "git knows better"
    assert clean["diff"] == "none"
    (tmp_path / "a").write_text("2")
    changed = code_state()
    assert changed["commit"] == clean["commit"]
    assert len(changed["diff"]) == 64
    (tmp_path / "b").write_text("new")
    assert code_state()["diff"] != changed["diff"]


def test_provenance_is_plain_and_complete():
    from experiments.records import content_hash

    origin = collect()
    content_hash(origin)
    assert origin["command"]
    assert origin["hardware"]["cpu"]
    assert origin["hardware"]["cpus"] >= 1
    assert device_name("cpu") == "cpu"


def test_runs_of_different_engine_code_are_compared_when_asked_for(tmp_path, capsys):
    make_run(tmp_path, "a", origin={"sources": {"engine": "before"}})
    make_run(tmp_path, "b", "r_kv", 64, origin={"sources": {"engine": "after"}})
    seen = []
    for more in ([], ["--any-engine"]):
        assert report.main([str(tmp_path), "--ranking", *more]) == 0
        seen.append("less full KV" in capsys.readouterr().out)
    assert seen == [False, True]
