"""The page and the tables: all that applies, nothing from elsewhere, no text taken for markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import report
from experiments.analysis.comparison import compare
from experiments.paths import ROOT
from experiments.records import load_runs
from experiments.reporting.conclusion import conclusions
from experiments.reporting.page import page, warnings
from experiments.reporting.tables import by_load, comparison_table, to_latex, to_markdown, write_tables
from tests.experiments.made_runs import make_run
from tests.page_in_browser import chromium, faults

RECORDS = ROOT / "results" / "records"
HOSTILE = "<script>alert('a')</script> & 100% of a_b"
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """The tags of a page with their attributes, its text, and whether every tag was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def cells(text: str) -> list[list[str]]:
    """The first table of a page."""
    table = text[text.index("<table>") : text.index("</table>")]
    return [re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", row) for row in table.split("</tr>")]


def make_runs(folder: Path) -> Path:
    """Full KV and two policies with everything that a picture can show, but a map of loads and pools."""
    facts = [([50, 200], [True, i % 3 == 0]) for i in range(20)]
    kept = np.arange(12).reshape(1, 2, 6)
    events = [{"round": 0, "num_tokens": 20, "kept_positions": kept}]
    make_run(folder, "a-full", facts=facts)
    make_run(folder, "b-zipage", "zipage", 64, facts=facts, events=events)
    grades = [1.0, 0, 0, 0] * 5
    make_run(folder, "c-random", "random_attention", 64, "prompt", grades=grades, facts=facts, lengths=[120] * 20)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_runs(tmp_path / "runs")


@pytest.fixture(autouse=True, scope="module")
def _few_dots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as context:
        context.setattr("experiments.reporting.page.DPI", 30)
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[pd.DataFrame, str]:
    """The runs, and their page at a margin of 2.5 points."""
    runs = load_runs(make_runs(tmp_path_factory.mktemp("drawn") / "runs"))
    return runs, page(runs, 0.025)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """The page without its pictures, for what is not about them."""
    monkeypatch.setattr("experiments.reporting.pictures.pictures", lambda runs, compared: iter(()))


class TestPage:
    def test_every_picture_that_applies_is_there_and_the_others_are_named(self, drawn):
        read = Reader(drawn[1])
        pictures = read.attributes("img")
        assert [picture["alt"] for picture in pictures] == [
            "Accuracy against budget",
            "Accuracy by policy",
            "Facts against distance",
            "Accuracy against throughput",
            "Accuracy against speed in the same memory",
            "Throughput over time",
            "Concurrency over time",
            "Blocks over time",
            "Latency",
            "Output length",
            "What each head kept",
        ]
        assert "Where eviction pays: the runs hold no values of engine.num_blocks" in read.text
        assert not read.open, "every tag is closed"

    def test_it_needs_nothing_beside_itself(self, drawn):
        text = drawn[1]
        read = Reader(text)
        loads = [value for _, attributes in read.tags for name, value in attributes.items() if name in ("src", "href")]
        assert loads
        assert all(value.startswith("data:image/png;base64,") for value in loads)
        assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in read.tags}
        assert "url(" not in text
        assert "@import" not in text

    def test_it_fits_a_phone(self, drawn):
        text = drawn[1]
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in Reader(text).attributes("meta")
        assert text.count("<table>") + text.count("<img") == text.count('<div class="wide">')

    def test_names_and_commands_are_text(self, tmp_path):
        make_run(tmp_path, "a", options={"workload.name": HOSTILE})
        other = {"workload.name": HOSTILE, "model.name": "<b>m</b>"}
        make_run(tmp_path, "b", "zipage", 64, options=other, origin={"command": HOSTILE})
        text = page(load_runs(tmp_path), title=HOSTILE)
        assert "<script" not in text
        assert "<b>" not in text
        read = Reader(text)
        assert read.text.count(HOSTILE) >= 4, "in the title, the heading, the table and the provenance"

    def test_the_table_holds_intervals_and_verdicts(self, drawn):
        runs, text = drawn
        heading, *rows = cells(text)
        rows = [dict(zip(heading, row, strict=True)) for row in rows if row]
        compared = compare(runs, margin=0.025).set_index("run")
        assert [row["policy"] for row in rows] == ["full KV", "random + prompt", "zipage"]
        low, high = 100 * compared.loc["c-random", ["accuracy.low", "accuracy.high"]].astype(float)
        assert rows[1]["accuracy (%) [95 %]"] == f"25.0 [{low:.1f}, {high:.1f}]"
        assert rows[1]["verdict"] == compared.loc["c-random", "full.verdict"]
        assert rows[2]["less full KV"].startswith("+0.0 [")
        assert rows[0]["verdict"] == "-"

    def test_old_records_without_facts_events_and_parts_of_the_provenance(self, folder):
        runs = load_runs(folder)
        gone = ["provenance.versions.torch", "provenance.command", "provenance.started", "budget_never_bound"]
        (folder / "b-zipage" / "events.parquet").unlink()
        text = page(runs.drop(columns=gone))
        assert "What each head kept: the runs hold no traced positions" in text

    @pytest.mark.usefixtures("undrawn")
    def test_one_plain_conclusion_stands_before_the_warnings(self, folder):
        runs = load_runs(folder)
        text = page(runs)
        (line,) = conclusions(runs)
        assert text.count('class="conclusion"') == 1
        assert text.index(escape(line)) < text.index('class="note"') < text.index("<table>")

    @pytest.mark.usefixtures("undrawn")
    def test_no_conclusion_without_a_baseline(self, folder):
        assert 'class="conclusion"' not in page(load_runs([folder / "b-zipage"]))

    def test_cells_carry_their_headings_for_cards(self, drawn):
        text = drawn[1]
        headings = cells(text)[0]
        labels = [attributes["data-label"] for attributes in Reader(text).attributes("td")]
        assert labels[: len(headings)] == headings
        assert "<script" not in text

    def test_a_load_without_accuracy_says_what_differs_and_has_no_empty_column(self):
        runs = load_runs(RECORDS / "demo_reasoner")
        tables = dict(by_load(compare(runs)))
        assert list(tables) == ["lengths", "program_trace"]
        lengths = tables["lengths"]
        assert {"num_blocks", "max_num_seqs", "tokens/s"} <= set(lengths)
        assert not any("accuracy" in name or "verdict" in name for name in lengths)
        assert not lengths.duplicated(["policy", "num_blocks", "max_num_seqs"]).any()
        assert not {"num_blocks", "max_num_seqs"} & set(tables["program_trace"]), "they are the same in all its rows"
        for table in tables.values():
            assert table["policy"].tolist() == sorted(table["policy"], key=lambda name: (name != "full KV", name))
            assert list(table).index("tokens/s") <= 5

    def test_chains_and_conversations_have_columns_of_their_own(self, tmp_path):
        make_run(tmp_path, "a", places=[[1.0, 0.0, 1.0]] * 20, recalls=[[1.0, 1.0, 0.0]] * 20)
        make_run(tmp_path, "b", "zipage", 64)
        for table in (comparison_table(compare(load_runs(tmp_path))), by_load(compare(load_runs(tmp_path)))[0][1]):
            assert table["by place (%)"].tolist() == ["100 0 100", "-"]
            assert table["recall (%)"].tolist() == ["66.7", "-"]
        make_run(tmp_path / "single", "c")
        table = comparison_table(compare(load_runs(tmp_path / "single")))
        assert not {"by place (%)", "recall (%)"} & set(table)

    def test_rows_are_ordered_full_first_then_by_policy_and_budget(self):
        runs = load_runs(RECORDS / "demo_reasoner").sample(frac=1, random_state=2)
        rows = [(row["policy"], row["budget"]) for _, row in dict(by_load(compare(runs)))["program_trace"].iterrows()]
        assert rows[0] == ("full KV", "-")
        assert [budget for _, budget in rows[1:]] == ["320", "448"] * 3
        assert [name.partition(" ")[0] for name, _ in rows[1::2]] == ["r_kv", "random", "zipage"]

    @pytest.mark.skipif(chromium() is None, reason="no Chromium in PATH")
    def test_it_is_laid_out_for_a_desk_and_a_phone(self, drawn):
        assert faults(drawn[1], chromium()) == []
        assert faults(page(load_runs(RECORDS / "demo_reasoner")), chromium()) == []

    @pytest.mark.skipif(chromium() is None, reason="no Chromium in PATH")
    def test_the_browser_sees_what_is_wrong(self):
        table = (
            "<table><thead><tr><th>tokens/s</th></tr></thead><tbody><tr><td data-label=x>1</td></tr></tbody></table>"
        )
        text = f'<body><p style="width:2000px">wide</p><div class="wide">{table}</div></body>'
        assert len(faults(text, chromium())) >= 5


class TestWarnings:
    def said(self, folder: Path) -> str:
        runs = load_runs(folder)
        return "\n".join(warnings(runs, compare(runs)))

    def test_runs_alike_get_only_what_their_number_calls_for(self, folder):
        assert "commits" not in self.said(folder)
        assert "devices" not in self.said(folder)
        assert "20 problems can't carry a margin of 2.0%" in self.said(folder)

    def test_each_is_said(self, tmp_path):
        make_run(tmp_path, "a")
        make_run(tmp_path, "b", "zipage", 64, origin={"code.commit": "d" * 40, "hardware.gpus": ["NVIDIA H200"]})
        make_run(tmp_path, "c", "zipage", 64, origin={"code.diff": "e" * 64})
        (make_run(tmp_path, "d") / "metrics.json").unlink()
        said = self.said(tmp_path)
        assert "1 incomplete" in said
        assert "2 commits: cccccccccc, dddddddddd" in said
        assert "several devices" in said
        assert "code that differs from its commit" in said

    def test_a_budget_that_never_bound(self, folder):
        runs = load_runs(folder)
        runs["budget_never_bound"] = [False, True, None]
        assert "The budget never bound in 1 evicting run" in "\n".join(warnings(runs, compare(runs)))


class TestTables:
    TABLE = pd.DataFrame({"policy": ["a_b | c", "50% & more"], "tokens/s": ["1,000", r"<\x> $5 #1 {y} ~^"]})

    def test_latex_escapes_what_it_would_act_on(self):
        lines = to_latex(self.TABLE).splitlines()
        assert lines[0] == r"\begin{tabular}{lr}"
        assert lines[1] == r"\toprule"
        assert lines[4] == r"a\_b | c & 1,000 \\"
        special = r"\textless{}\textbackslash{}x\textgreater{} \$5 \#1 \{y\} \textasciitilde{}\textasciicircum{}"
        assert lines[5] == rf"50\% \& more & {special} \\"
        assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]

    def test_markdown_keeps_its_columns(self):
        lines = to_markdown(self.TABLE).splitlines()
        assert len({len(line) for line in lines}) == 1
        assert lines[2].startswith(r"| a_b \| c ")

    def test_files_hold_the_table_and_the_csv_its_numbers(self, folder, tmp_path):
        compared = compare(load_runs(folder))
        paths = write_tables(comparison_table(compared), tmp_path / "new" / "folder", numbers=compared)
        assert [path.name for path in paths] == ["comparison.md", "comparison.tex", "comparison.csv"]
        numbers = pd.read_csv(paths[2])
        assert numbers["run"].tolist() == ["a-full", "b-zipage", "c-random"]
        assert numbers["accuracy.low"].tolist() == pytest.approx(compared["accuracy.low"].tolist())
        assert r"\toprule" in paths[1].read_text()
        assert "| random + prompt |" in paths[0].read_text()


class TestCommandLine:
    @pytest.mark.usefixtures("undrawn")
    def test_files_are_written_beside_the_table(self, folder, tmp_path, capsys):
        html, tables = tmp_path / "out" / "page.html", tmp_path / "tables"
        assert report.main([str(folder), "--html", str(html), "--tables", str(tables), "--title", "Mine & yours"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert any(line.startswith("| run ") for line in out)
        assert out[-1] == f"page: {html}"
        assert "<h1>Mine &amp; yours</h1>" in html.read_text()
        assert sorted(path.name for path in tables.iterdir()) == ["comparison.csv", "comparison.md", "comparison.tex"]
        assert pd.read_csv(tables / "comparison.csv")["accuracy"].tolist() == [0.5, 0.5, 0.25]

    def test_nothing_is_written_unasked(self, folder, tmp_path, capsys):
        before = sorted(tmp_path.rglob("*"))
        assert report.main([str(folder)]) == 0
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.usefixtures("undrawn")
    @pytest.mark.parametrize("option", ["--html", "--tables", "--pictures"])
    def test_an_unwritable_place_costs_one_line(self, option, folder, tmp_path, capsys):
        (tmp_path / "file").write_text("kept")
        assert report.main([str(folder), option, str(tmp_path / "file" / "below")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith(f"{tmp_path / 'file'}")
        assert "can't be written: " in error
        assert (tmp_path / "file").read_text() == "kept"

    @pytest.mark.usefixtures("undrawn")
    def test_a_folder_in_the_place_of_the_page(self, folder, tmp_path, capsys):
        assert report.main([str(folder), "--html", str(tmp_path)]) == 2
        assert capsys.readouterr().err == f"{tmp_path}: can't be written: Is a directory\n"


def test_the_margin_is_told_as_given(drawn):
    assert "at a margin of 2.5 points" in drawn[1]


def test_a_record_without_its_samples_costs_the_pictures_that_need_them(folder):
    runs = load_runs(folder)
    (Path(runs["path"].iloc[0]) / "requests.parquet").unlink()
    text = page(runs)
    assert "Left out" in text
    assert "requests.parquet" in text
