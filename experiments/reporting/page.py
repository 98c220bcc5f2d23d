"""The report as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.analysis.comparison import compare
from experiments.config.notes import notes_on
from experiments.config.options import budget_texts, held_budgets
from experiments.records import EVENTS, load_events
from experiments.reporting import plots
from experiments.reporting.plots.style import MOST_LINES, label, run_names
from experiments.reporting.published import beside
from experiments.reporting.tables import comparison_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 160

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem }
body { color: #1a1a1a; background: #fff }
h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2rem 0 .3rem }
p { max-width: 46rem } .note { border-left: 4px solid #D55E00; padding: .2rem .8rem; background: #fdf3ec }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; white-space: nowrap }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right } th { background: #f4f4f4 }
td.text, th.text { text-align: left } img { max-width: 100%; height: auto }
@media (max-width: 48rem) { .wide img { max-width: none } }
.left { color: #666 }
"""

TEXTS = ("row", "model", "workload", "policy", "verdict", "run", "commit", "diff", "device", "versions", "command")


def page(
    runs: pd.DataFrame,
    margin: float = 0.02,
    title: str = "Runs compared",
    published: Mapping[str, Any] | None = None,
) -> str:
    """The page for rows of `load_runs()`.

    Args:
        margin: of non-inferiority, fixed before the runs.
        published: figures to set beside ours, of `read_published`.
    """
    compared = compare(runs, margin)
    parts = [f"<h1>{escape(title)}</h1>", *_summary(runs, compared)]
    parts += ["<h2>Comparison</h2>", _explained(margin), _table(comparison_table(compared))]
    if published is not None:
        parts.append(f"<h2>Beside published figures: {escape(published['title'])}</h2>")
        parts.append(
            f"<p>Published in {escape(published['source'])} for {escape(published['setting'])}; other machines, models "
            "or problems than ours unless the row says the same. Not measured here.</p>"
        )
        parts.append(_table(beside(runs, compared, published)))
    left_out = []
    for heading, help_text, draw in _pictures(runs, compared):
        try:
            figure = draw()
        except (ValueError, OSError) as error:  # OSError: a record without one of its files
            left_out.append(f"{heading}: {error}")
            continue
        parts += [f"<h2>{escape(heading)}</h2>", f"<p>{escape(help_text)}</p>", _image(figure, heading)]
    if left_out:
        items = "".join(f"<li>{escape(line)}</li>" for line in left_out)
        parts.append(f'<h2>Left out</h2><ul class="left">{items}</ul>')
    parts += ["<h2>Where the numbers come from</h2>", _table(provenance_table(runs))]
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{view}<title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n' + (
        "\n".join(parts) + "\n</body></html>\n"
    )


def _pictures(runs: pd.DataFrame, compared: pd.DataFrame) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """Heading, how to read it, and the picture."""
    yield (
        "Accuracy against budget",
        "Bars are 95 % intervals over problems. The black line is full KV with its interval; whole lines protect the "
        "prompt, broken ones do not. Where intervals of two policies overlap, look at the paired differences above.",
        lambda: plots.accuracy_by_budget(runs, compared),
    )
    labels, budgets = runs.apply(label, axis=1), held_budgets(runs)
    if labels.nunique() > MOST_LINES or budgets.nunique() == 1:
        yield (
            "Accuracy by policy",
            "A row a policy, a point with its 95 % interval a run; the point is filled where the prompt is protected. "
            "The black line is full KV with its interval.",
            lambda: plots.accuracy_by_policy(runs, compared),
        )
    yield (
        "Facts against distance",
        "What answers still knew of the values that their thoughts needed late, by how far back each was stated. A "
        "policy that keeps what it needs stays level; one that forgets with time falls.",
        lambda: plots.facts_by_distance(runs),
    )
    yield (
        "Accuracy against throughput",
        "Up and to the right is better; a line joins the runs of a policy that no other of it beats in both. Runs of "
        "different machines, or beside other load, can't be compared here.",
        lambda: plots.accuracy_by_throughput(runs, compared),
    )
    yield (
        "Throughput over time",
        "Full KV comes in waves where memory is short; a bounded cache holds its level. Of one policy, the darker line "
        "has the greater budget.",
        lambda: plots.throughput_over_time(runs),
    )
    yield (
        "Concurrency over time",
        "Requests that decode together, and those that wait for room.",
        lambda: plots.concurrency_over_time(runs),
    )
    yield ("Blocks over time", "How full the pool was.", lambda: plots.blocks_over_time(runs))
    yield (
        "Latency",
        "Share of the samples that had reached each point within a time.",
        lambda: plots.latency_cdfs(runs),
    )
    yield (
        "Output length",
        "Evicted thoughts that lose their way grow longer, which flatters tokens per second. Boxes are quartiles over "
        "problems, whiskers 5 and 95 %.",
        lambda: plots.length_inflation(runs, compared),
    )
    yield (
        "Where eviction pays",
        "Throughput over that of full KV for each load and pool; above 1 eviction is faster.",
        lambda: plots.crossover_map(runs),
    )
    yield (
        "What each head kept",
        "Each row is a KV head, each column a token of the prompt and the thought; bright tokens survived many "
        "compressions.",
        lambda: _first_trace(runs),
    )


def _first_trace(runs: pd.DataFrame) -> Figure:
    """The sample with the most compressions in the first run that traced positions."""
    from pathlib import Path

    for _, run in runs.iterrows():
        if (Path(run["path"]) / EVENTS).exists():
            events = load_events(run)
            traced = events[events["kept_positions"].notna()]
            if len(traced):
                counts = traced.groupby(["prompt_id", "sample_index"]).size()
                figure = plots.kept_positions(events, *counts.idxmax())
                figure.suptitle(label(run), fontsize=10)
                return figure
    raise ValueError("the runs hold no traced positions (run one with engine.trace_positions=true)")


def _summary(runs: pd.DataFrame, compared: pd.DataFrame) -> Iterator[str]:
    models, workloads, devices = (
        ", ".join(sorted(map(str, frame.dropna().unique())))
        for frame in (runs["model.name"], runs["workload.name"], compared["device"])
    )
    yield f"<p>{len(runs)} runs: {escape(models)} on {escape(workloads)}; {escape(devices)}.</p>"
    for line in warnings(runs, compared):
        yield f'<p class="note">{escape(line)}</p>'


def warnings(runs: pd.DataFrame, compared: pd.DataFrame) -> list[str]:
    """What must be known to read the table, a line each."""
    lines = []
    if incomplete := runs.attrs.get("incomplete", 0):
        lines.append(f"{incomplete} incomplete runs were left out.")
    commits = runs["provenance.code.commit"].dropna().unique()
    if len(commits) > 1:
        lines.append(f"The runs come from {len(commits)} commits: {', '.join(str(c)[:10] for c in sorted(commits))}.")
    if (~runs["provenance.code.diff"].isin(["none"])).any():
        lines.append("Some runs were made with code that differs from its commit, or where git could not tell.")
    if compared["device"].nunique() > 1:
        lines.append("The runs come from several devices: compare accuracies, not times.")
    unbound = runs.get("budget_never_bound", pd.Series(dtype=bool)).fillna(False).astype(bool)
    if unbound.any():
        lines.append(f"The budget never bound in {int(unbound.sum())} evicting runs: these equal full KV.")
    if (faults := int(runs["errors"].fillna(0).sum())) > 0:
        lines.append(f"{faults} samples were refused; they count as wrong.")
    lines += [f"{line[0].upper()}{line[1:]}." for line in notes_on(runs)]
    for baseline, name in (
        ("full", "full KV"),
        ("random", "random + prompt"),
        ("bytes", "random + prompt of as many bytes"),
    ):
        said = compared[f"{baseline}.power_warning"].dropna().unique()
        if len(said):
            lines.append(f"Against {name}, in {compared[f'{baseline}.power_warning'].notna().sum()} runs: {said[0]}.")
    return lines


def provenance_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Which run is which: its id, commit, device, versions, time and command."""

    def recorded(name: str) -> pd.Series:
        return runs.reindex(columns=[f"provenance.{name}"]).iloc[:, 0].astype(object).fillna("-").astype(str)

    return pd.DataFrame(
        {
            "run": runs["run"],
            "policy": run_names(runs, budget=False),
            "budget": budget_texts(runs),
            "commit": recorded("code.commit").str[:10],
            "diff": recorded("code.diff").str[:10],
            "versions": "torch " + recorded("versions.torch"),
            "started": recorded("started"),
            "command": recorded("command"),
        }
    )


def _explained(margin: float) -> str:
    return (
        "<p>Accuracy is the mean over samples with a 95 % interval that resamples problems. Differences are paired by "
        "problem. KV MiB is the most that one sample's cache held, scores, positions and query slot included. "
        "Random + prompt is the control of the same budget, or, beside it, of as many bytes and up to 5 % more. The "
        f"verdict is about non-inferiority to full KV at a margin of {100 * margin:g} points. Right answers per "
        "GPU-hour leave loading out.</p>"
    )


def _table(table: pd.DataFrame) -> str:
    def cell(tag: str, name: str, text: object) -> str:
        kind = ' class="text"' if name in TEXTS else ""
        return f"<{tag}{kind}>{escape(str(text))}</{tag}>"

    head = "".join(cell("th", name, name) for name in table.columns)
    rows = ("".join(cell("td", n, v) for n, v in zip(table.columns, row, strict=True)) for row in table.values.tolist())
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _image(figure: Figure, heading: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    width = round(figure.get_figwidth() * 96)
    encoded = base64.b64encode(data.getvalue()).decode()
    image = f'<img width="{width}" alt="{escape(heading)}" src="data:image/png;base64,{encoded}">'
    return f'<div class="wide">{image}</div>'
