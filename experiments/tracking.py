"""Telling Weights & Biases about a run, or nobody."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from experiments.errors import one_line
from experiments.records import flatten
from experiments.schema import TrackingConfig
from zipage import StepStats


class Tracker(Protocol):
    """Hears of a run as it goes. It never raises: the run does not depend on it."""

    def log_step(self, step: StepStats) -> None: ...

    def finish(self, metrics: Mapping[str, Any] | None) -> None:
        """The run is over; `metrics` is None where it failed."""


class NullTracker:
    """Tells nobody."""

    def log_step(self, step: StepStats) -> None:
        return

    def finish(self, metrics: Mapping[str, Any] | None) -> None:
        return


class WandbTracker:
    """Tells wandb, offline or online. Its first fault is printed in one line and ends the telling, never the run.

    Online without a key goes offline; `wandb sync` sends it later.

    Args:
        config: mode, project, group and tags.
        run_id: the run's id is wandb's too, so that a repeated run goes on under it.
        options: the run's options.
        folder: files go to `folder/wandb`.
    """

    def __init__(self, config: TrackingConfig, run_id: str, options: Mapping[str, Any], folder: Path) -> None:
        self._run: Any = None
        self._attempt(lambda: self._start(config, run_id, options, folder))

    def _start(self, config: TrackingConfig, run_id: str, options: Mapping[str, Any], folder: Path) -> None:
        import wandb

        mode = config.mode
        if mode == "online" and not wandb.api.api_key:
            print("tracking: wandb has no key here: offline (`wandb login`, then `wandb sync`, sends it)", flush=True)
            mode = "offline"
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

    def log_step(self, step: StepStats) -> None:
        if self._run is not None:
            self._attempt(lambda: self._run.log({f"step/{key}": value for key, value in asdict(step).items()}))

    def finish(self, metrics: Mapping[str, Any] | None) -> None:
        if self._run is not None:
            self._attempt(lambda: self._run.summary.update(flatten(metrics or {})))
        if self._run is not None:
            self._attempt(lambda: self._run.finish(exit_code=0 if metrics is not None else 1))

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            print(f"tracking: wandb failed and is left out from here on ({one_line(error)})", flush=True)
            self._run = None


def open_tracker(config: TrackingConfig, run_id: str, options: Mapping[str, Any], folder: Path) -> Tracker:
    return NullTracker() if config.backend == "none" else WandbTracker(config, run_id, options, folder)
