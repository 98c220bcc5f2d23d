"""Where the arms of a sweep are run: on this machine, on a Ray cluster, or as jobs of Slurm.

Whichever it is, what is done is known by run ids in one folder, and whoever runs an arm has the claim on its run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from experiments.config.schema import Experiment, LauncherConfig
from experiments.errors import UsageError
from experiments.launchers.local import Local, visible_gpus
from experiments.launchers.task import Commands, Launcher, gpus_of


@contextlib.contextmanager
def open_launcher(config: LauncherConfig, commands: Commands, arms: Sequence[Experiment]) -> Iterator[Launcher]:
    """The launcher for the arms of a sweep.

    Raises:
        UsageError: it can't be had, or an arm can't run there.
    """
    yield _local(config, commands, arms)


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
