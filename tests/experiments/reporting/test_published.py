"""Published figures beside ours: marked, matched by what is meant, never mixed."""

from __future__ import annotations

import pandas as pd
import pytest

from experiments.backends import BACKENDS
from experiments.config.compose import load_experiment
from experiments.config.schema import to_dict
from experiments.errors import UsageError
from experiments.paths import CONF
from experiments.records import flatten
from experiments.reporting.published import FOLDER, beside, read_published
from tests.calibrations import CALIBRATED


def runs_and_compared():
    runs = pd.DataFrame(
        {
            "policy.name": ["full", "zipage", "zipage", "r_kv"],
            "policy.protection": ["none", "none", "prompt", "none"],
            "backend": ["zipage"] * 4,
            "model.name": "m",
            "workload.name": "w",
            "run": ["f", "z", "p", "r"],
            "output_tokens": [700, 700, 700, 700],
            "steps": [200, 100, 100, None],
        },
        index=[4, 5, 6, 7],
    )
    compared = pd.DataFrame(
        {
            "model.name": "m",
            "workload.name": "w",
            "policy.budget_tokens": [None, 64, 64, 128],
            "accuracy": [0.9, 0.5, 0.75, float("nan")],
            "accuracy.low": [0.8, 0.4, 0.7, float("nan")],
            "accuracy.high": [0.95, 0.6, 0.8, float("nan")],
            "output_tokens_per_second": [1000.0, 2000.0, 2100.0, 50.0],
            "full.run": [None, "f", "f", None],
        },
        index=runs.index,
    )
    return runs, compared


def test_rows_hold_published_figures_and_the_runs_that_are_meant():
    table = beside(*runs_and_compared(), read_published("zipage_table1")).set_index("row")
    assert table.loc["Zipage"].tolist() == [*("2,557", "87.0", "50.0 [40.0, 60.0]", "2,000", "200", "7.0", "m, w, 64")]
    assert table.loc["R-KV"].tolist() == ["246", "84.4", "-", "50", "-", "-", "m, w, 128"]
    assert table.loc["MorphKV"].tolist() == ["256", "68.4", *["-"] * 5]
    assert table.loc["Nano-vLLM"].tolist()[2:] == ["-"] * 5
    full = table.loc["full KV here"].tolist()
    assert full == ["-", "-", "90.0 [80.0, 95.0]", "1,000", "-", "3.5", "m, w, full KV"]
    assert [name.partition(":")[0] for name in table.columns] == ["published"] * 2 + ["ours"] * 5


FILE = ["policy.options.calibration=file"]
CHOICES = [f"policy={path.stem}" for path in (CONF / "policy").glob("*.yaml")]
CHOICES += [f"backend={backend}" for backend in BACKENDS]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_row_of_ours_can_be_filled(path):
    """What a row means is what some run of the shipped configs records."""
    common = ["model=hf", "model.path=m", "engine.block_size=256"]
    options = [
        flatten(to_dict(load_experiment([*common, choice, *FILE * (choice.removeprefix("policy=") in CALIBRATED)])))
        for choice in CHOICES
    ]
    runs = pd.DataFrame(options).assign(**{"model.name": "m"})
    compared = runs.assign(accuracy=None, output_tokens_per_second=1.0)
    table = beside(runs, compared, read_published(path.stem)).set_index("row")["ours: tokens/s"]
    rows = [row["name"] for row in read_published(path.stem)["rows"] if row["ours"]]
    assert rows
    assert [name for name in rows if "-" in set(table.loc[[name]])] == []


def test_runs_of_a_row_are_told_apart():
    runs, compared = runs_and_compared()
    runs["policy.protection"], runs["policy.trigger"] = "none", ["block_full", "block_full", "pressure", "block_full"]
    table = beside(runs, compared, read_published("zipage_table1")).set_index("row")
    assert table.loc["Zipage", "ours: model, workload, budget"].tolist() == [
        "m, w, 64, policy.trigger block_full",
        "m, w, 64, policy.trigger pressure",
    ]


def test_several_runs_of_ours_have_a_row_each():
    runs, compared = runs_and_compared()
    published = read_published("zipage_table1")
    published["rows"] = [{"name": "z", "ours": {"policy.name": "zipage"}, "figures": [1, 2]}]
    assert beside(runs, compared, published)["ours: tokens/s"].tolist() == ["2,000", "2,100"]
    published["rows"][0]["ours"] = {"no.such": "column"}
    assert beside(runs, compared, published)["ours: tokens/s"].tolist() == ["-"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_table_names_its_source(path):
    table = read_published(path.stem)
    assert "arXiv" in table["source"]
    assert table["rows"]


def test_wrong_tables_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="nothing: no such table; there are zipage_speed, zipage_table1"):
        read_published("nothing")
    path = tmp_path / "own.yaml"
    for text, line in (
        ("title: x\n", r"own\.yaml: must hold"),
        (
            "{title: a, source: b, setting: c, columns: [x], rows: [{name: r, ours: {}, figures: [1, 2]}]}",
            "r: must hold",
        ),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=line):
            read_published(str(path))
