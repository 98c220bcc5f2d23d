"""The table in a terminal: its width, its order, what it says once, and the sentence it ends with."""

from __future__ import annotations

import re

import pytest

from experiments import report
from experiments.analysis.comparison import compare
from experiments.analysis.ranking import ranking
from experiments.config.options import in_order, label, short_names
from experiments.paths import ROOT
from experiments.records import load_runs
from experiments.reporting.conclusion import conclusions
from experiments.reporting.markdown import markdown
from experiments.reporting.runs_table import WIDTH, runs_table, short_runs, with_notes
from tests.experiments.made_runs import make_run

RECORDS = ROOT / "results" / "records"
FIGURES = re.compile(
    r"(\S.*) at ([\d,]+) entries: (\d+) % of full KV's answers \[(\d+), (\d+)\] with (\d+) % of its memory"
)


@pytest.fixture(scope="module")
def demo():
    return load_runs(RECORDS / "demo_reasoner")


@pytest.fixture(scope="module")
def demo_compared(demo):
    return compare(demo)


def cells_of(text: str) -> list[dict[str, str]]:
    headings, _, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|")
    return [dict(zip(headings, row, strict=True)) for row in rows]


@pytest.mark.parametrize("name", ["demo", "demo_reasoner", "timeline", "reasoner/far_cpu", "reasoner/recent_cpu"])
def test_tables_of_committed_records_fit(name):
    text = with_notes(load_runs(RECORDS / name))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert {"run", "policy", "budget", "accuracy", "tokens/s"} <= set(cells_of(text)[0])


def test_names_and_options_of_any_length_fit(tmp_path):
    for number in range(2):
        options = {"model.name": f"m{number}" * 60, "workload.name": "w" * 90 + str(number)}
        options |= {"policy.options": {f"o{i}" * 10: number for i in range(9)}}
        make_run(tmp_path, f"run-{number}" * 12, "zipage", 4000, "prompt", options=options)
    runs = load_runs(tmp_path)
    assert max(map(len, with_notes(runs).splitlines())) <= WIDTH
    assert max(map(len, runs_table(runs, wide=True).splitlines())) > 400, "--wide shows all"


def test_wide_has_every_column_and_whole_names(demo, capsys):
    assert report.main([str(RECORDS / "demo_reasoner"), "--wide"]) == 0
    rows = cells_of(capsys.readouterr().out)
    assert {row["run"] for row in rows} == set(demo["run"])
    assert {"engine.num_blocks", "engine.max_num_seqs", "TTFT p50 (s)", "compressions", "errors"} <= set(rows[0])


def test_what_is_left_out_is_named(demo):
    text = runs_table(demo)
    said = re.search(r"--wide also shows (.*)", text)[1].split(", ")
    assert not set(said) & set(cells_of(text)[0])
    assert {"TPOT ms", "trace_positions"} <= set(said), "what decides no figure has no room"


def test_what_all_share_stands_above(tmp_path):
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", "zipage", 64)
    text = runs_table(load_runs(tmp_path))
    assert text.splitlines()[0] == "all runs: workload sums, samples 20"
    assert "workload" not in cells_of(text)[0]


def test_chains_and_conversations_have_their_figures_by_place(tmp_path):
    halves = [[1.0, 1.0, 0.0, float(i % 4 == 0)] for i in range(20)]
    make_run(tmp_path, "a", places=halves)
    table = runs_table(load_runs(tmp_path))
    assert cells_of(table)[0]["by place"] == "100 100 0 25"
    assert "recall" not in cells_of(table)[0]
    more = {"places": [[1.0] * 8] * 20, "recalls": [[1.0, 0.0, 0.0]] * 20}
    make_run(tmp_path, "b", "zipage", 64, "prompt", **more, options={"workload.turns": 8})
    table = with_notes(load_runs(tmp_path))
    assert max(map(len, table.splitlines())) <= WIDTH
    first, second = cells_of(table)
    assert (first["recall"], second["recall"]) == ("-", "33.3%")
    assert second["by place"] == " ".join(["100"] * 8), "never cut"
    assert "conversations outgrew the context before 1 of their turns" in " ".join(table.split())
    make_run(tmp_path, "c", "zipage", 64, "prompt", **more | {"places": [[1.0] * 40] * 20})
    table = runs_table(load_runs(tmp_path))
    assert max(map(len, table.splitlines())) <= WIDTH
    assert "by place" in table[table.index("--wide also shows") :], "what has no room is named"


def test_full_kv_is_first_then_policies_and_budgets(demo):
    rows = cells_of(runs_table(demo))
    loads = [(row["policy"], int(row["num_blocks"]), int(row["max_num_seqs"])) for row in rows[:8]]
    assert loads == sorted(loads)
    assert [(row["policy"], row["budget"]) for row in rows[8:]] == [
        ("full", "-"),
        *((f"{policy} + prompt", budget) for policy in ("r_kv", "random", "zipage") for budget in ("320", "448")),
    ]
    shuffled = demo.sample(frac=1, random_state=1)
    assert in_order(shuffled)["run"].tolist() == in_order(demo)["run"].tolist()


def test_short_run_names_are_told_apart():
    one, two, near = "x-full-ddd4a1ef1fd8", "x-zipage-1b5faf4dec18", "x-full-ddd4a1ef0000"
    assert short_runs([one, two]) == ["ddd4a1ef", "1b5faf4d"]
    assert short_runs([one, near]) == ["ddd4a1ef1fd8", "ddd4a1ef0000"]
    assert short_runs(["mine", one]) == ["mine", "ddd4a1ef"]


def test_short_names_of_options_are_told_apart():
    names = short_names(["seed", "workload.seed", "engine.num_blocks", "policy.options.alpha"])
    assert names["workload.seed"] == "workload.seed"
    assert (names["engine.num_blocks"], names["policy.options.alpha"]) == ("num_blocks", "alpha")
    assert len(set(names.values())) == 4


def test_a_markdown_cell_is_no_markup():
    lines = markdown(["a", "b"], [["x|y", "two\nlines"], ["", "z"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == r"| x\|y | two lines |"


class TestConclusion:
    def test_its_numbers_are_those_of_the_records(self, demo, demo_compared):
        (line,) = conclusions(demo, demo_compared)
        assert with_notes(demo).splitlines()[-1] == line, "a table ends with it"
        policy, budget, kept, low, high, memory = FIGURES.fullmatch(line).groups()
        graded = demo_compared[demo_compared["accuracy"].notna()]
        full = graded[graded["policy.name"] == "full"].iloc[0]
        evicting = graded[graded["policy.name"] != "full"]
        best = evicting.loc[evicting["accuracy"].idxmax()]
        assert (policy, budget) == (label(best), f"{best['budget']:.0f}")
        for said, name in (
            (kept, "accuracy"),
            (low, "accuracy.low"),
            (high, "accuracy.high"),
            (memory, "kv_bytes.mean"),
        ):
            assert float(said) == pytest.approx(100 * best[name] / full[name if "kv" in name else "accuracy"], abs=0.5)

    def test_its_memory_is_that_of_the_ranking(self, demo, demo_compared):
        """The mean: one request of full KV is a sixth larger."""
        (line,) = conclusions(demo, demo_compared)
        table = ranking(demo, demo_compared)
        named = table[demo["policy.name"][table.index].eq("r_kv") & table["value"].eq(1)].iloc[0]
        assert line.endswith(f"{100 * named['bytes_of_full']:.0f} % of its memory")

    def test_of_equal_answers_the_least_memory_wins(self, demo, demo_compared):
        table = demo_compared.copy()
        table.loc[(table["policy.name"] != "full") & table["accuracy"].notna(), "accuracy"] = 0.5
        least = table[table["accuracy"] == 0.5].sort_values("kv_bytes.mean").iloc[0]
        assert conclusions(demo, table)[0].startswith(f"{label(least)} at {least['budget']:.0f} entries: 50 %")

    def test_speed_where_nothing_is_graded(self, demo, demo_compared):
        lengths = demo["workload.name"] == "lengths"
        (line,) = conclusions(demo[lengths], demo_compared[lengths])
        speeds = demo[lengths].pivot_table(
            "output_tokens_per_second", ["engine.num_blocks", "engine.max_num_seqs"], "policy.name"
        )
        ratios = speeds["zipage"] / speeds["full"]
        pool, batch = ratios.idxmax()
        assert f": {ratios.max():.2f} x full KV's tokens/s" in line
        assert line.endswith(f"(num_blocks {pool}, max_num_seqs {batch})")

    def test_each_workload_has_its_own(self, tmp_path):
        for number, workload in enumerate(("sums", "traces")):
            options, grades = {"workload.name": workload}, [1.0] * (10 - number) + [0.0] * (10 + number)
            make_run(tmp_path, f"full-{number}", options=options)
            make_run(tmp_path, f"zip-{number}", "zipage", 64, options=options, grades=grades)
        lines = conclusions(load_runs(tmp_path))
        assert [line.partition(" % of")[0] for line in lines] == [
            "sums: zipage at 64 entries: 100",
            "traces: zipage at 64 entries: 90",
        ]

    def test_nothing_without_a_baseline(self, tmp_path):
        make_run(tmp_path, "a", "zipage", 64)
        assert conclusions(load_runs(tmp_path)) == []
        make_run(tmp_path, "b", options={"workload.name": "other"})
        assert conclusions(load_runs(tmp_path)) == []
        assert conclusions(load_runs(tmp_path).iloc[:0]) == []

    def test_nothing_where_full_kv_answered_nothing_right(self, tmp_path):
        make_run(tmp_path, "a", grades=[0.0] * 20)
        make_run(tmp_path, "b", "zipage", 64)
        assert conclusions(load_runs(tmp_path)) == []
