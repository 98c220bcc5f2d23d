"""The pictures of the page, each with how to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from experiments.config.options import held_budgets, label, simulated
from experiments.records import EVENTS, load_events
from experiments.reporting import plots
from experiments.reporting.plots.style import MOST_LINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 160


def pictures(runs: pd.DataFrame, compared: pd.DataFrame) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
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
        "Accuracy by place",
        "Of the questions of a chain or conversation, with 95 % intervals over problems. A policy that loses its way "
        "falls below full KV, the black line.",
        lambda: plots.accuracy_by_place(runs),
    )
    yield (
        "Recall by distance",
        "Questions for what was said earlier, by how many tokens ago that was, with 95 % intervals over conversations.",
        lambda: plots.recall_by_distance(runs),
    )
    yield (
        "Accuracy against fidelity",
        "A point for each policy and budget whose divergence from full KV was measured by a run of its own. The "
        "further the rank correlation is from 0, the better fidelity predicts which policy is right more often.",
        lambda: plots.accuracy_by_fidelity(runs, runs),
    )
    yield (
        "Accuracy against throughput",
        "Up and to the right is better; a line joins the runs of a policy that no other of it beats in both. Runs of "
        "different machines, or beside other load, can't be compared here.",
        lambda: plots.accuracy_by_throughput(runs, compared),
    )
    yield (
        "Accuracy against speed in the same memory",
        "Tokens a second over those of full KV in the same pool. A line joins the budgets of a policy, which stand "
        "above the points. Which runs keep 95 % of full KV's accuracy is in the table above. Each speed is of one run, "
        "and means something only where nothing else ran and memory was short for full KV.",
        lambda: plots.accuracy_by_speed_up(runs, compared),
    )
    yield (
        "Throughput over time",
        "Full KV comes in waves where memory is short; a bounded cache holds its level. Of one policy, the darker line "
        "has the greater budget; markers tell them apart.",
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
        "Tails against rate",
        "Of requests that arrive over time, by how many a second do: p99 with markers, p50 dotted. Where the p99 "
        "leaves the p50, requests wait.",
        lambda: plots.tails_by_rate(runs),
    )
    yield (
        "Goodput against rate",
        "Requests a second that were answered within the limits of --slo, or at all where there are none. A line that "
        "leaves the diagonal has found its highest rate.",
        lambda: plots.goodput_by_rate(runs, compared),
    )
    yield (
        "Throughput against speed for a user",
        "Output tokens a second of each GPU against those that one user sees. A line joins the rates of a policy; up "
        "and to the right is better.",
        lambda: plots.throughput_by_user(runs),
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


def drawn(runs: pd.DataFrame, compared: pd.DataFrame) -> Iterator[tuple[str, str, Figure | None, str]]:
    """Heading, how to read it, and the picture, or None and what the runs lack."""
    for heading, help_text, draw in pictures(runs, compared):
        try:
            yield heading, help_text, _marked(draw(), runs), ""
        except (ValueError, OSError) as error:  # OSError: a record without one of its files
            yield heading, help_text, None, str(error)


def _marked(figure: Figure, runs: pd.DataFrame) -> Figure:
    """With a line that says so where runs in it are simulated."""
    count = simulated(runs).sum()
    if count:
        what = "simulated" if count == len(runs) else f"{count} of {len(runs)} runs simulated"
        figure.text(0.995, 0.005, what, ha="right", va="bottom", fontsize=8, color="firebrick")
    return figure


def write_pictures(runs: pd.DataFrame, compared: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the pictures that apply as PNG, named by their headings: `accuracy-by-place.png`.

    Raises:
        OSError: the folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for heading, _, figure, _ in drawn(runs, compared):
        if figure is not None:
            paths.append(folder / f"{heading.lower().replace(' ', '-')}.png")
            figure.savefig(paths[-1], dpi=DPI)
    return paths


def _first_trace(runs: pd.DataFrame) -> Figure:
    """The sample with the most compressions in the first run that traced positions."""
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
