"""Records of runs beside their simulation."""

import json

import pytest
import yaml

from experiments import simulate
from experiments.config.compose import load_experiment
from experiments.running import job
from tests.experiments.simulation.test_simulated_runs import BOUNDED, LOAD


@pytest.fixture(scope="module", name="records")
def runs_that_pass_for_measured(tmp_path_factory):
    """Of full KV and of zipage, simulated on an H200, whose configs are those of runs on a GPU."""
    folder = tmp_path_factory.mktemp("runs")
    for policy in ([], BOUNDED):
        options = [*LOAD, f"results_dir={folder}", "scenario=simulate", "scenario.machine=h200", *policy]
        made = job.run(load_experiment(options), shows=False)
        config = yaml.safe_load((made / "config.yaml").read_text())
        config["scenario"] |= {"kind": "serve", "name": "all_at_once", "machine": None}
        (made / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_run_is_simulated_as_its_record_says(records, tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert simulate.main([str(records), "--machine", "h200", "--out", str(out)]) == 0
    assert "TTFT p99" in capsys.readouterr().out
    rows = json.loads(out.read_text())["runs"]
    assert {row["policy"] for row in rows} == {"full", "zipage"}
    for row in rows:
        assert row["refused"] is None
        for name in ("tokens_per_second", "steps", "ttft.p50", "ttft.p99", "e2e.p50", "e2e.p99"):
            assert row[name]["off"] == pytest.approx(0, abs=1e-9)
        assert row["compressions"]["simulated"] == row["compressions"]["measured"]


def test_the_paper_s_options_on_another_machine(records, tmp_path, capsys):
    out = tmp_path / "paper.json"
    assert simulate.main(["paper", str(records), "--ingredients", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Simulated on A100-80GB; the paper: 249 to 277 % (published)")
    (row,) = json.loads(out.read_text())["rows"]
    rates = row["simulated"]
    assert set(rates) == {"full KV", "zipage", "without hybrid", "without async", "without graphs"}
    assert rates["full KV"] < row["measured"]["full KV"]
    assert rates["without graphs"] < rates["zipage"]
