"""The report as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.analysis.comparison import compare
from experiments.analysis.frontier import frontier
from experiments.config.notes import notes_on
from experiments.config.options import budget_texts, in_order
from experiments.reporting.conclusion import conclusions
from experiments.reporting.frontier_table import frontier_table
from experiments.reporting.pictures import DPI, drawn
from experiments.reporting.plots.style import run_names
from experiments.reporting.published import beside
from experiments.reporting.tables import by_load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem }
body { color: #1a1a1a; background: #fff; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2rem 0 .3rem }
h3 { font-size: 1rem; margin: 1rem 0 .3rem } p { max-width: 46rem }
.conclusion { font-size: 1.2rem; font-weight: 600; margin: .6rem 0 }
.note { border-left: 4px solid #D55E00; padding: .2rem .8rem; margin: .5rem 0; background: #fdf3ec; font-size: .9rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
th { background: #f4f4f4; vertical-align: bottom; overflow-wrap: normal; max-width: 7rem } td { white-space: nowrap }
td.text, th.text { text-align: left } img { max-width: 100%; height: auto }
details p { margin: .3rem 0 } .left { color: #666 }
@media (max-width: 48rem) {
  .wide img { max-width: none }
  table, tbody, tr { display: block } thead { display: none }
  tr { border: 1px solid #ccc; border-radius: .4rem; margin: 0 0 .8rem; padding: .3rem .6rem }
  td, td.text { display: flex; justify-content: space-between; gap: 1rem; white-space: normal; text-align: right }
  td { border-bottom: 1px solid #eee; padding: .15rem 0 } td:last-child { border-bottom: 0 }
  td::before { content: attr(data-label); color: #555; text-align: left; flex: none }
}
"""

TEXTS = ("row", "model", "workload", "policy", "verdict", "run", "commit", "diff", "device", "versions", "command")

KEPT = (
    "Speeds are over those of full KV in the same pool, of one run each. The share of full KV's accuracy has a 95 % "
    "interval that resamples problems, each with both grades. That 95 % are kept holds where the whole interval is at "
    "or above them, fails where all of it is below, and is open otherwise."
)


def page(
    runs: pd.DataFrame,
    margin: float = 0.02,
    title: str = "Runs compared",
    published: Mapping[str, Any] | None = None,
    slo: Mapping[str, float] | None = None,
) -> str:
    """The page for rows of `load_runs()`.

    Args:
        margin: of non-inferiority, fixed before the runs.
        published: figures to set beside ours, of `read_published`.
        slo: limits on times in seconds, as `compare` takes them.
    """
    compared = compare(runs, margin, **(slo or {}))
    parts = [f"<h1>{escape(title)}</h1>", *_summary(runs, compared)]
    parts.append("<h2>Comparison</h2>")
    loads = by_load(compared)
    for name, table in loads:
        parts += [f"<h3>{escape(name)}</h3>"] * (len(loads) > 1) + [_table(table)]
    parts.append(_explained(margin))
    if len(kept := frontier(runs, compared)):
        parts += ["<h2>Accuracy kept in the same memory</h2>", f"<p>{escape(KEPT)}</p>", _table(frontier_table(kept))]
    if published is not None:
        parts.append(f"<h2>Beside published figures: {escape(published['title'])}</h2>")
        parts.append(
            f"<p>Published in {escape(published['source'])} for {escape(published['setting'])}; other machines, models "
            "or problems than ours unless the row says the same. Not measured here.</p>"
        )
        parts.append(_table(beside(runs, compared, published)))
    left_out = []
    for heading, help_text, figure, lacking in drawn(runs, compared):
        if figure is None:
            left_out.append(f"{heading}: {lacking}")
            continue
        parts += [f"<h2>{escape(heading)}</h2>", f"<p>{escape(help_text)}</p>", _image(figure, heading)]
    if left_out:
        items = "".join(f"<li>{escape(line)}</li>" for line in left_out)
        parts.append(f'<h2>Left out</h2><ul class="left">{items}</ul>')
    parts += ["<h2>Where the numbers come from</h2>", _table(provenance_table(in_order(runs)))]
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{view}<title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n' + (
        "\n".join(parts) + "\n</body></html>\n"
    )


def _summary(runs: pd.DataFrame, compared: pd.DataFrame) -> Iterator[str]:
    models, workloads, devices = (
        ", ".join(sorted(map(str, frame.dropna().unique())))
        for frame in (runs["model.name"], runs["workload.name"], compared["device"])
    )
    yield f"<p>{len(runs)} runs: {escape(models)} on {escape(workloads)}; {escape(devices)}.</p>"
    for line in conclusions(runs, compared):
        yield f'<p class="conclusion">{escape(line)}.</p>'
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
        "<details open><summary>How to read the table</summary><p>Accuracy is the mean over samples with a 95 % "
        "interval that resamples problems. Differences are paired by problem. KV MiB is the most that a sample's cache "
        "held, scores, positions and query slot included, the mean over samples. Random + prompt is the control of the "
        "same budget, or, beside it, of as many bytes: within 5 %, and no fewer where there is such a one. The verdict "
        f"is about non-inferiority to full KV at a margin of {100 * margin:g} points. Right answers per GPU-hour leave "
        "loading out. Pool is engine.num_blocks, batch is engine.max_num_seqs.</p></details>"
    )


def _table(table: pd.DataFrame) -> str:
    def cell(tag: str, name: str, text: object) -> str:
        kind = ' class="text"' if name in TEXTS else ""
        kind += f' data-label="{escape(name)}"' if tag == "td" else ""
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
