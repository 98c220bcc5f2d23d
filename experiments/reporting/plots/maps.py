"""Heat maps: where eviction pays, and what each head kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize

from experiments.config.options import held_budgets
from experiments.reporting.plots.style import by_workload, evicts, panels, rank, require, run_names

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LOAD, POOL = "engine.max_num_seqs", "engine.num_blocks"
RATE, ACCURACY = "output_tokens_per_second", "accuracy"
_AXES = {LOAD: "requests at once, at most", POOL: "blocks in the pool"}


def crossover_map(runs: pd.DataFrame, load: str = LOAD, pool: str = POOL, value: str = RATE) -> Figure:
    """Evicting runs against full KV, for every load and pool that both ran with; a panel for each policy and budget.

    All panels share one scale, which is white where both are equal. A setting that one of the two lacks stays grey.

    Args:
        load, pool: the columns that make the axes.
        value: "output_tokens_per_second", whose ratio is shown, or "accuracy", whose difference is, in points.
    """
    table = against_full(runs, load, pool, value)
    every = np.concatenate([grid.to_numpy(float).ravel() for grid in table.values()])
    if value == ACCURACY:
        far = max(1.0, np.nanmax(np.abs(every)))
        norm, template, what = Normalize(-far, far), "{:+.1f}", "accuracy less that of full KV (points)"
    else:
        far = max(1.05, np.nanmax(every), 1 / np.nanmin(every))
        norm, template, what = LogNorm(1 / far, far), "{:.2f}", "tokens/s over full KV"
    colours = colormaps["PuOr_r"].with_extremes(bad="#E0E0E0")
    figure, axes = panels(list(table), (4.6, 3.6), columns=2)
    for axis, grid in zip(axes, table.values(), strict=True):
        values = grid.to_numpy(float)
        image = axis.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto", origin="lower")
        axis.grid(False)
        for (i, j), cell in np.ndenumerate(values):
            text, dark = "not run", False
            if not np.isnan(cell):
                text, dark = template.format(cell), abs(norm(cell) - 0.5) > 0.3
            axis.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
        axis.set_xticks(range(grid.shape[1]), [f"{x:,.0f}" for x in grid.columns])
        axis.set_yticks(range(grid.shape[0]), [f"{y:,.0f}" for y in grid.index])
        axis.set_xlabel(_AXES.get(pool, pool), fontsize=9)
        axis.set_ylabel(_AXES.get(load, load), fontsize=9)
    bar = figure.colorbar(image, ax=axes, format=template.format if value == ACCURACY else "{x:.2g}")
    bar.ax.minorticks_off()
    if value != ACCURACY:
        bar.set_ticks(np.geomspace(1 / far, far, 5))
    bar.set_label(what, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def against_full(runs: pd.DataFrame, load: str = LOAD, pool: str = POOL, value: str = RATE) -> dict[str, pd.DataFrame]:
    """For each evicting policy, budget and workload, a frame with loads as rows and pools as columns.

    It holds the ratio of throughputs or the difference of accuracies in points; means where seeds repeat a setting.
    """
    require(len(runs), "run")
    lacking = [column for column in (load, pool, value) if column not in runs or runs[column].isna().all()]
    require(not lacking, f"values of {', '.join(lacking)}")
    full, evicting = runs[~evicts(runs)], runs[evicts(runs)]
    require(len(full), "run of full KV")
    require(len(evicting), "evicting run")
    labels, budgets = run_names(evicting, budget=False, apart=(load, pool)), held_budgets(evicting).fillna(0)
    many = (budgets.groupby(labels).nunique() > 1).any()
    found, workloads = {}, by_workload(runs)
    for title, part in workloads:
        base = part[~evicts(part)].groupby([load, pool])[value].mean().astype(float)
        mine = part[evicts(part)]
        groups = mine.groupby([labels[mine.index], budgets[mine.index]])
        for (name, budget), same in sorted(groups, key=lambda group: (rank(group[0][0]), group[0][1])):
            ours = same.groupby([load, pool])[value].mean().astype(float)
            grid = (100 * (ours - base) if value == ACCURACY else ours / base).dropna().unstack()
            if grid.size > 1:
                name = f"{name}, {budget:.0f}" if many else name
                found[f"{title}: {name}" if len(workloads) > 1 else name] = grid
    require(found, f"two settings of {load} and {pool} that both full KV and an evicting policy ran with")
    return found


def kept_positions(events: pd.DataFrame, prompt_id: str, sample_index: int = 0, marks: Sequence[int] = ()) -> Figure:
    """Which token positions each layer and KV head of a sample kept: a row a head, shaded by how long they stayed.

    Args:
        events: of `load_events(run)`, from a run with `engine.trace_positions=true`.
        prompt_id, sample_index: which sample.
        marks: token positions that a triangle above the picture points to.
    """
    mine = events[(events["prompt_id"] == prompt_id) & (events["sample_index"] == sample_index)]
    traced = mine[(mine["kind"] == "compress") & mine["kept_positions"].notna()].sort_values("round")
    require(len(traced), f"compression of {prompt_id} with positions (run it with engine.trace_positions=true)")
    survived = survival(list(traced["kept_positions"]), int(traced["num_tokens"].max()))
    layers, heads, length = survived.shape
    figure, (axis,) = panels(
        [f"{prompt_id}: what was kept through {len(traced)} compressions"], (7.5, 1.4 + 0.16 * layers * heads)
    )
    image = axis.imshow(
        survived.reshape(layers * heads, length), aspect="auto", cmap="cividis", interpolation="nearest",
        vmin=0, vmax=len(traced),
    )  # fmt: skip
    axis.grid(False)
    axis.set_yticks(np.arange(layers) * heads + (heads - 1) / 2, [f"layer {i}" for i in range(layers)], fontsize=8)
    for border in range(1, layers):
        axis.axhline(border * heads - 0.5, color="white", linewidth=0.5)
    axis.set_xlabel("token position", fontsize=9)
    if len(marks):
        axis.plot(
            marks, [1.03] * len(marks), "v", color="#D55E00", markersize=6, clip_on=False,
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip
        axis.set_title(axis.get_title(), fontsize=10, pad=14)
    bar = figure.colorbar(image, ax=axis)
    bar.set_label("compressions survived", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def survival(kept: list[np.ndarray], length: int) -> np.ndarray:
    """How many compressions each position survived, int [L, H, length].

    Args:
        kept: positions [L, H, entries] that each compression kept, -1 where a head kept fewer.
    """
    layers, heads = kept[0].shape[:2]
    survived = np.zeros((layers, heads, length), dtype=int)
    for positions in kept:
        once = np.zeros((layers, heads, length + 1), dtype=int)
        np.put_along_axis(once, positions.astype(int), 1, axis=2)
        survived += once[..., :length]
    return survived
