"""A Slurm of one node on this machine, of Debian's packages slurmctld, slurmd, slurm-client and munge. Takes root."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CONFIG = """
ClusterName=zipage
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
# Debian's munge, on a socket of our own. A requeued job begins when its old credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SECONDS = 60.0
"""For a daemon to answer."""


class Absent(Exception):
    """There is no Slurm to be had here; the text says why."""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A Slurm that keeps all its files in `folder` and ends with this.

    Yields:
        What its commands need in the environment.

    Raises:
        Absent: a daemon is not installed, or does not start.
    """
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(program) is None:
            raise Absent(f"no {program}: apt-get install slurmctld slurmd slurm-client munge")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    config = folder / "slurm.conf"
    host, cpus = socket.gethostname().split(".")[0], os.cpu_count()
    config.write_text(CONFIG.format(host=host, cpus=cpus, ports=_free_ports(), folder=folder))
    environment = os.environ | {"SLURM_CONF": str(config)}
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_daemon(munge, environment, folder))
        _wait((folder / "munge.socket").exists, folder)
        stack.enter_context(_daemon(["slurmctld", "-D", "-f", str(config)], environment, folder))
        stack.enter_context(_daemon(["slurmd", "-D", "-f", str(config)], environment, folder))
        _wait(lambda: "idle" in _said(["sinfo", "--noheader", "--format=%T"], environment), folder)
        yield environment


def _free_ports() -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _daemon(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[None]:
    with (folder / "daemons.log").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _said(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def _wait(condition: Callable[[], bool], folder: Path) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > until:
            logs = [path.read_text(errors="replace") for path in sorted(folder.glob("*.log"))]
            raise Absent("Slurm does not start: " + " | ".join(line for log in logs for line in log.splitlines()[-3:]))
        time.sleep(0.5)
