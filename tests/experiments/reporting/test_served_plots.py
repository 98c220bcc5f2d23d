"""The picture of servers under load shows the numbers of the rows."""

import pandas as pd
import pytest

from experiments.bench.pictures import picture
from experiments.bench.tables import markdown
from tests.experiments.reporting.pictures import axes_of, legend_of, lines_of


def row(arm: str, rate: float | None, p99: float = 0.1, **more) -> dict:
    times = {"p50": p99 / 2, "p90": p99, "p99": p99}
    return {
        "load": "trace", "arm": arm, "backend": "vllm" if arm == "vllm" else "zipage", "gpus": 2, "refused": None,
        "policy": "zipage" if arm == "zipage" else "full", "slo": {"ttft": 2.0, "itl": 0.05}, "rate": rate,
        "ttft": times, "itl": times, "tpot": times, "e2e": times, "goodput": 0.9 * (rate or 0), "slo_holds": True,
        "tokens_per_second": 1000.0 * (rate or 0), "tokens_per_second_user": 2 / p99, "broken": False,
    } | more  # fmt: skip


ROWS = pd.DataFrame(
    [
        *(row("full", rate, 0.1 * rate) for rate in (4.0, 1.0, 2.0)),
        *(row("vllm", rate, 0.3 * rate) for rate in (1.0, 2.0)),
        row("full", None, streams=256, offline=100.0),
        {"load": "trace", "arm": "zipage", "slo": {}, "refused": "it died", "rate": None},
    ]
)


def test_lines_are_those_of_the_rows():
    figure = picture(ROWS)
    panels = axes_of(figure)
    assert list(panels) == [f"trace: {name}" for name in ("TTFT", "ITL", "E2E", "goodput", "throughput")]
    axes = list(panels.values())
    assert lines_of(axes[0])["full"] == ([1, 2, 4], pytest.approx([0.1, 0.2, 0.4]))
    assert lines_of(axes[0])["vllm"] == ([1, 2], pytest.approx([0.3, 0.6]))
    beside = {line.get_label(): list(line.get_ydata()) for axis in axes[:2] for line in axis.lines}
    assert beside["_full p50"] == pytest.approx([0.05, 0.1, 0.2])
    assert beside["_limit"] == [0.05, 0.05]
    assert lines_of(axes[3])["full"] == ([1, 2, 4], pytest.approx([0.9, 1.8, 3.6]))
    across, up = lines_of(axes[4])["full"]
    assert across == pytest.approx([20, 10, 5])
    assert up == pytest.approx([500, 1000, 2000]), "of each of two GPUs"
    assert legend_of(figure) == ["full", "vllm"]


def test_what_was_not_measured_is_not_drawn():
    with pytest.raises(ValueError, match="rate at which a server was measured"):
        picture(ROWS[ROWS["rate"].isna()])


def test_the_table_names_what_each_row_was():
    text = markdown(ROWS)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    head = lines[0]
    assert lines[2][head.index("TTFT ms p50 / p90 / p99")] == "200 / 400 / 400"
    assert lines[7][head.index("streams")] == "256"
    assert lines[8][head.index("refused")] == "it died"
    assert ["trace", "full", "4", ""] in lines


@pytest.mark.parametrize("scale", [0.01, 0.3, 10.0])
def test_seconds_are_plain_numbers(scale):
    rows = pd.DataFrame([row("full", rate, scale * (1 + rate / 10)) for rate in (1.0, 2.0, 4.0)])
    figure = picture(rows)
    figure.canvas.draw()
    for axis in figure.axes[:3]:
        labels = [label.get_text() for label in axis.get_yticklabels(which="both")]
        told = [label for label in labels if label]
        assert told
        assert all(0 < float(label) < 1000 for label in told), told
