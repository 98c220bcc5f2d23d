"""Runs programs that no one has reviewed. Linux on x86_64 and aarch64 only.

Each program runs in namespaces of its own (mount, PID, network, IPC, host name; a user namespace too, unless this runs
as root, where it runs as a user number of its own instead):

* it sees a file system in memory with an empty /tmp (its folder and HOME), its own source, the Python installation,
  NumPy where the harness has it, and the system's libraries, all but the first read-only. No file of this machine
  beside those can be read or written;
* it sees no other process, so it can signal none, and no network at all, not even the loopback device of the host;
* its environment holds HOME and OMP_NUM_THREADS=1 alone, and Python starts as `python -I -S`: no site-packages;
* wall time, CPU time, address space, size of files and of output, files in memory, open files and processes are bounded
  (`Limits`); where a control group can be had (`control_groups`), the memory of all its processes together as well;
* a filter refuses system calls (`system_calls`): keys, memory that no limit counts (memfd, System V, message queues),
  io_uring, nested namespaces, other processes' memory, sockets other than Internet and Unix ones, the kernel's log. Its
  session keyring is new and empty;
* when its first process ends or is killed, the kernel kills every process it left behind. The same happens when the
  process that asked for it dies.

What this does not contain: faults of the kernel; where there is no control group, the sum of its processes' memory
(each has its own bound, and there are `processes` of them) and some 300 MiB in buffers of pipes and sockets; the share
of the CPU it takes while it runs. World-readable files below the Python installation, NumPy, /usr and /lib can be read,
and the kernel's version and the size of the machine. Where namespaces or the filter can't be had, `Sandbox.check` says
so and nothing runs.
"""

from __future__ import annotations

import importlib.util
import marshal
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from experiments.sandbox.control_groups import find_groups
from experiments.sandbox.system_calls import MACHINES, NUMBERS, call_filter

HERE = Path(__file__).parent
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")


class SandboxError(Exception):
    """A program could not be started, for a reason that is not its own."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: wall time of one case, and CPU time of each process in it.
        suite_seconds: of all cases of a suite.
        memory: bytes of address space of each process; where a control group can be had, all together may take as
            much, and `disk`.
        processes: processes and threads at once.
        handles: open files of each process.
        file_size: bytes of each file, and of the output.
        disk: bytes of all files, which lie in memory.
    """

    seconds: float = 10.0
    suite_seconds: float = 300.0
    memory: int = 1 << 30
    processes: int = 16
    handles: int = 64
    file_size: int = 4 << 20
    disk: int = 32 << 20


@dataclass(frozen=True)
class Sandbox:
    limits: Limits = Limits()

    def check(self) -> str | None:
        """Why nothing can run here; None where a trivial program does."""
        try:
            with tempfile.TemporaryFile() as output, self.start({"main.py": "print(6 * 7)"}, stdout=output) as program:
                program.wait()
                output.seek(0)
                return None if output.read() == b"42\n" else "a trivial program gave no output"
        except (SandboxError, OSError) as error:
            return str(error)

    @contextmanager
    def start(
        self,
        files: Mapping[str, str],
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] = subprocess.DEVNULL,
        seconds: float | None = None,
    ) -> Iterator[Program]:
        """Run `main.py` of `files`, which lie read-only in /box. It is dead when the context ends.

        Args:
            seconds: wall time, and CPU time of each process; those of one case unless given.

        Raises:
            SandboxError: it could not be started.
        """
        if platform.machine() not in MACHINES:
            raise SandboxError(f"no filter of system calls for {platform.machine()}, only for {', '.join(MACHINES)}")
        with (
            tempfile.TemporaryDirectory(prefix="sandbox-") as name,
            tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        ):
            folder = Path(name)
            (folder / "root").mkdir()
            (folder / "box" / "site").mkdir(parents=True)
            numpy = _numpy()
            for path in numpy:
                (folder / "box" / "site" / path.name).symlink_to(path)
            for path, text in files.items():
                (folder / "box" / path).write_text(text, encoding="utf-8", errors="replace")
                (folder / "box" / path).chmod(0o644)
            for path in (folder / "box", folder / "box" / "site"):
                path.chmod(0o755)
            config = self._config(folder, numpy, self.limits.seconds if seconds is None else seconds)
            ours, theirs = os.pipe()
            config["lifeline"] = ours
            command = [sys.executable, "-I", "-S", str(HERE / "jail.py"), marshal.dumps(config).hex()]
            try:
                process = subprocess.Popen(
                    command,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=errors,
                    env={},
                    cwd="/",
                    pass_fds=[ours],
                    start_new_session=True,
                )
            except OSError:
                os.close(theirs)
                raise
            finally:
                os.close(ours)
            try:
                yield Program(process, errors)
            finally:
                os.close(theirs)  # the lifeline: jail.py kills what still runs
                process.wait()

    def _config(self, folder: Path, numpy: list[Path], seconds: float) -> dict[str, Any]:
        python = os.path.realpath(sys.executable)
        prefix = os.path.realpath(sys.base_prefix)
        read_only = [path for path in SYSTEM if os.path.lexists(path)]
        for path in (prefix, python, *map(str, numpy)):
            if not any(path == known or path.startswith(f"{known}/") for known in read_only):
                read_only.append(path)
        machine = platform.machine()
        groups = find_groups()
        limits = {
            "RLIMIT_CPU": math.ceil(seconds),
            "RLIMIT_AS": self.limits.memory,
            "RLIMIT_NPROC": self.limits.processes,
            "RLIMIT_NOFILE": self.limits.handles,
            "RLIMIT_SIGPENDING": self.limits.handles,  # timers too
            "RLIMIT_FSIZE": self.limits.file_size,
            "RLIMIT_CORE": 0,
        }
        return {
            "folder": str(folder),
            "read_only": read_only,
            "command": [python, "-I", "-S", "-X", "utf8", "/box/main.py"],
            "environment": {"HOME": "/tmp", "OMP_NUM_THREADS": "1"},
            "seconds": seconds,
            "limits": limits,
            "disk": self.limits.disk,
            "group": groups
            and {"folder": str(groups.folder), "limits": groups.limits(self.limits.memory + self.limits.disk)},
            "keyctl": NUMBERS["keyctl"][list(MACHINES).index(machine)],
            "filter": call_filter(machine),
        }


@cache
def _numpy() -> list[Path]:
    """The folders of NumPy and of the libraries that its wheels bring; none where it is not installed."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        return []
    package = Path(spec.origin).resolve().parent
    return [path for path in (package, package.with_name("numpy.libs")) if path.is_dir()]


@dataclass(frozen=True)
class Program:
    """A program in the sandbox."""

    process: subprocess.Popen[bytes]
    errors: IO[str]

    def wait(self) -> int:
        """Its exit code, 0 where it ended by itself and in time.

        Raises:
            SandboxError: it was never started.
        """
        code = self.process.wait()
        self.require_started()
        return code

    def require_started(self) -> None:
        """Raises SandboxError where it is known by now that the program could not be started."""
        self.errors.seek(0)
        if faults := " ".join(self.errors.read().split()):
            raise SandboxError(faults)
