"""Heat maps: where eviction pays, and what each head kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from experiments.plots.style import label, panels, require

if TYPE_CHECKING:
    import pandas as pd

LOAD, POOL = "engine.max_num_seqs", "engine.num_blocks"


def crossover_map(runs: pd.DataFrame, load: str = LOAD, pool: str = POOL) -> Figure:
    """Throughput of each evicting policy over that of full KV, for every load and pool that both ran with.

    Args:
        load, pool: the columns that make the axes.
    """
    table = ratios(runs, load, pool)
    names = list(table)
    figure, axes = panels(names, (4.8, 3.8))
    for axis, name in zip(axes, names, strict=True):
        grid = table[name]
        values = grid.to_numpy(float)
        spread = max(1.05, np.nanmax(values), 1 / max(np.nanmin(values), 1e-9))
        image = axis.imshow(
            values, cmap="PuOr_r", norm=TwoSlopeNorm(1, 1 / spread, spread), aspect="auto", origin="lower"
        )
        axis.grid(False)
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                dark = value > spread**0.6 or value < spread**-0.6
                axis.text(
                    j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color="white" if dark else "black"
                )
        axis.set_xticks(range(grid.shape[1]), [f"{int(x):,}" for x in grid.columns])
        axis.set_yticks(range(grid.shape[0]), [f"{int(y):,}" for y in grid.index])
        axis.set_xlabel(f"blocks in the pool ({pool})", fontsize=9)
        axis.set_ylabel(f"requests at once ({load})", fontsize=9)
        bar = figure.colorbar(image, ax=axis)
        bar.set_label("tokens/s over full KV", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    return figure


def ratios(runs: pd.DataFrame, load: str, pool: str) -> dict[str, pd.DataFrame]:
    """For each evicting label, throughput over that of full KV: a frame with loads as rows and pools as columns."""
    lacking = [column for column in (load, pool) if column not in runs or runs[column].isna().all()]
    require(not lacking, f"values of {', '.join(lacking)}")
    full = runs[runs["policy.name"] == "full"]
    require(len(full), "run of full KV")
    keys = ["model.name", "workload.name", load, pool]
    base = full.groupby(keys)["output_tokens_per_second"].mean()
    found = {}
    evicting = runs[runs["policy.name"] != "full"]
    for name, part in evicting.groupby(evicting.apply(label, axis=1) if len(evicting) else []):
        rates = part.groupby(keys)["output_tokens_per_second"].mean()
        grid = (rates / base).dropna().groupby([load, pool]).mean().unstack()
        if grid.size > 1:
            found[str(name)] = grid
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
        kept: positions [L, H, entries] that each compression kept.
    """
    layers, heads = kept[0].shape[:2]
    survived = np.zeros((layers, heads, length), dtype=int)
    for positions in kept:
        once = np.zeros_like(survived)
        np.put_along_axis(once, positions.astype(int), 1, axis=2)
        survived += once
    return survived
