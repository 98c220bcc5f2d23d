"""Reports a run to Weights & Biases, or nowhere."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from experiments.config.schema import TrackingConfig
from experiments.errors import one_line
from experiments.records import flatten, load_rows
from zipage import StepStats

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL import Image

ANSWER_COLUMNS = (
    "prompt_id", "sample_index", "kind", "difficulty", "grade", "extracted", "gold", "finish_reason", "output_tokens",
    "compressions", "output", "error",
)  # fmt: skip
MOST_ANSWERS = 256
"""Samples in the table `answers`; the artifact holds all."""


def pictures() -> Mapping[str, Callable[[pd.DataFrame], Any]]:
    """What is drawn of a single run."""
    from experiments.reporting import plots

    return {
        "throughput": plots.throughput_over_time,
        "concurrency": plots.concurrency_over_time,
        "blocks": plots.blocks_over_time,
        "latency": plots.latency_cdfs,
    }


class Tracker(Protocol):
    """Hears of a run as it goes. It never raises: the run does not depend on it."""

    def log_step(self, step: StepStats) -> None: ...

    def log_record(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """The run is done: its record lies in `folder`, all but the metrics, and `rows` are its samples."""

    def log_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A benchmark has these rows by now; those that it had before are not told again."""

    def log_benchmark(self, folder: Path, draw: Callable[[], Figure]) -> None:
        """The benchmark is done: its record lies in `folder`, all but the metrics, and this draws it."""

    def finish(self, metrics: Mapping[str, Any] | None) -> None:
        """The run is over; `metrics` is None where it failed."""


class NullTracker:
    """Reports nowhere."""

    def log_step(self, step: StepStats) -> None:
        return

    def log_record(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        return

    def log_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        return

    def log_benchmark(self, folder: Path, draw: Callable[[], Figure]) -> None:
        return

    def finish(self, metrics: Mapping[str, Any] | None) -> None:
        return


class WandbTracker:
    """Tells wandb, offline or online. Its first fault is printed in one line and ends the telling, never the run; what
    wandb knows of the run by then is closed with the metrics all the same.

    Online without a key goes offline; `wandb sync` sends it later.

    Args:
        config: mode, project, group and tags.
        run_id: the run's id is wandb's too, so that a repeated run goes on under it.
        options: the run's options.
        folder: files go to `folder/wandb`.
    """

    def __init__(self, config: TrackingConfig, run_id: str, options: Mapping[str, Any], folder: Path) -> None:
        self._run: Any = None
        self._failed = False
        self._rows_told = 0
        self._options = options
        self._attempt(lambda: self._start(config, run_id, options, folder))

    def _start(self, config: TrackingConfig, run_id: str, options: Mapping[str, Any], folder: Path) -> None:
        import wandb

        mode = config.mode
        if mode == "online" and not wandb.api.api_key:
            print("tracking: wandb has no key here: offline (`wandb login`, then `wandb sync`, sends it)", flush=True)
            mode = "offline"
        # What an offline run keeps for later lies beside the records too, not in the home folder.
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))
        silent = os.environ.get("WANDB_SILENT", "true").lower() == "true"
        self._run = wandb.init(
            id=run_id,
            name=run_id,
            project=config.project,
            group=config.group,
            tags=list(config.tags),
            config=dict(options),
            dir=str(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=silent, console="off"),
        )
        self._run.define_metric("step/time")
        self._run.define_metric("step/*", step_metric="step/time")

    def log_step(self, step: StepStats) -> None:
        if self._tells:
            self._attempt(lambda: self._run.log({f"step/{key}": value for key, value in asdict(step).items()}))

    def log_record(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._tells:
            self._attempt(lambda: self._send_record(folder, rows))

    def _send_record(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        table = wandb.Table(columns=list(ANSWER_COLUMNS), allow_mixed_types=True)
        for row in rows[:MOST_ANSWERS]:
            table.add_data(*(row.get(column) for column in ANSWER_COLUMNS))
        self._run.log({"answers": table})
        for name, draw in pictures().items():
            self._run.log({f"pictures/{name}": wandb.Image(_drawn(draw(self._as_row(folder))))})
        self._send_files(folder)

    def log_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        new, self._rows_told = rows[self._rows_told :], len(rows)
        for row in new if self._tells else ():
            self._attempt(lambda row=row: self._run.log({f"row/{key}": value for key, value in flatten(row).items()}))

    def log_benchmark(self, folder: Path, draw: Callable[[], Figure]) -> None:
        if self._tells:
            self._attempt(lambda: self._send_benchmark(folder, draw))

    def _send_benchmark(self, folder: Path, draw: Callable[[], Figure]) -> None:
        import wandb

        rows = [flatten(row) for row in load_rows(folder).to_dict("records")]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = wandb.Table(columns=columns, allow_mixed_types=True)
        for row in rows:
            table.add_data(*(row.get(column) for column in columns))
        self._run.log({"rows": table})
        with contextlib.suppress(ValueError):  # nothing there to draw, such as a roofline on a CPU
            self._run.log({"pictures/benchmark": wandb.Image(_drawn(draw()))})
        self._send_files(folder)

    def _send_files(self, folder: Path) -> None:
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", f"record-{self._run.id}", flags=re.ASCII), type="record")
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in (".yaml", ".json", ".parquet"):
                artifact.add_file(str(path), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact)

    def _as_row(self, folder: Path) -> pd.DataFrame:
        """The run as `load_runs` will read it, as far as pictures ask."""
        import pandas as pd

        return pd.DataFrame([flatten(self._options) | {"run": self._run.id, "path": str(folder)}])

    def finish(self, metrics: Mapping[str, Any] | None) -> None:
        if self._run is not None:
            self._attempt(lambda: self._run.summary.update(flatten(metrics or {})))
        if self._run is not None:
            self._attempt(lambda: self._run.finish(exit_code=0 if metrics is not None else 1))

    @property
    def _tells(self) -> bool:
        return self._run is not None and not self._failed

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if not self._failed:
                print(f"tracking: wandb failed and is left out from here on ({one_line(error)})", flush=True)
            self._failed = True


def _drawn(figure: Figure) -> Image.Image:
    from PIL import Image

    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return Image.open(png)


def open_tracker(config: TrackingConfig, run_id: str, options: Mapping[str, Any], folder: Path) -> Tracker:
    return NullTracker() if config.backend == "none" else WandbTracker(config, run_id, options, folder)
