"""Where the arms of a sweep are run: on this machine, on a Ray cluster, or as jobs of Slurm.

Whichever it is, what is done is known by run ids in one folder, and whoever runs an arm has the claim on its run.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

from experiments.config.schema import Experiment, LauncherConfig
from experiments.errors import UsageError
from experiments.launchers.local import Local, visible_gpus
from experiments.launchers.task import Commands, Launcher, gpus_of
from experiments.records import SWEEPS


@contextlib.contextmanager
def open_launcher(
    config: LauncherConfig, commands: Commands, arms: Sequence[Experiment], shares: bool = False
) -> Iterator[Launcher]:
    """The launcher for the arms of a sweep.

    Args:
        shares: whether arms share a loaded model.

    Raises:
        UsageError: it can't be had, or an arm can't run there.
    """
    if config.name == "local":
        yield _local(config, commands, arms)
        return
    if config.name == "ray" and shares:
        raise UsageError("+share_model=true: tasks of launcher=ray share nothing; leave it out")
    remote = importlib.import_module(f"experiments.launchers.{config.name}")
    folder = Path(arms[0].results_dir).expanduser().resolve() / SWEEPS / f"launch-{uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{folder}: can't be written: {error.strerror or error}") from error
    with contextlib.ExitStack() as stack:
        try:
            launcher = stack.enter_context(remote.connected(config, commands, arms, folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        yield launcher


def _local(config: LauncherConfig, commands: Commands, arms: Sequence[Experiment]) -> Local:
    """As many workers at once as there are GPUs, if nothing else is asked for; one where there are none.

    An arm that names its GPU itself, as `hardware.device=cuda:1`, is no other's neighbour.
    """
    gpus = visible_gpus() if any(map(gpus_of, arms)) else []
    named = sorted({arm.hardware.device for arm in arms if ":" in arm.hardware.device})
    workers = config.workers or (1 if named else max(1, len(gpus)))
    needed = max(map(gpus_of, arms))
    if gpus and needed > len(gpus):
        raise UsageError(
            f"an arm takes {needed} GPUs (engine.tensor_parallel_size times engine.data_parallel_size); "
            f"{len(gpus)} can be seen here"
        )
    if named and workers > 1:
        raise UsageError(
            f"launcher.workers={workers}: beside others each worker has GPUs of its own: hardware.device={named[0]} "
            "must be cuda, or launcher.workers=1"
        )
    if gpus and workers > len(gpus):
        raise UsageError(f"launcher.workers={workers}: must be at most {len(gpus)}, the GPUs that can be seen here")
    return Local(commands, gpus, workers)
