"""Control groups bound the memory of all processes of a program together, and what the kernel holds for them.

Where they can be had: in version 1, below the harness's own group; in version 2, where groups with processes have no
children, beside it. Either folder must be writable, as it is for root outside of most containers, and for a user below
a service manager that delegates.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Groups:
    """Where control groups can be made.

    Attributes:
        folder: that is to hold them.
        memory: the file of each that bounds its memory in bytes.
        swap: a file that is to hold `swap_bytes(memory)`, where the kernel has it.
        version: of control groups, 1 or 2.
    """

    folder: Path
    memory: str
    swap: str | None
    version: int

    def limits(self, memory: int) -> dict[str, int]:
        """What is to be written, in order, to which files of a group that may take `memory` bytes and no swap."""
        limits = {self.memory: memory}
        if self.swap is not None:
            limits[self.swap] = memory if self.version == 1 else 0  # memory and swap together; swap
        return limits


@cache
def find_groups(process: Path = Path("/proc/self")) -> Groups | None:
    """Where this process can make groups that bound memory; None where it can't. Removes any that were left."""
    try:
        groups = _probe(*_locate(process))
    except (OSError, LookupError, ValueError):
        return None
    for group in groups.folder.glob("sandbox-*"):
        if not Path("/proc", group.name.rpartition("-")[2]).exists():  # who made it was killed
            with contextlib.suppress(OSError):
                group.rmdir()
    return groups


def _locate(process: Path) -> tuple[Path, int]:
    """The folder in which groups may be made, and the version. OSError where there is none."""
    own = {}
    for line in (process / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)  # version 2 has no name
    for line in (process / "mountinfo").read_text().splitlines():
        fields, _, file_system = line.partition(" - ")
        _, _, _, root, mounted, *_ = (re.sub(r"\\([0-7]{3})", lambda c: chr(int(c[1], 8)), f) for f in fields.split())
        kind, _, options = file_system.split(" ", 2)
        if kind == "cgroup" and "memory" in options.split(","):
            return _below(mounted, root, own["memory"]), 1
        if kind == "cgroup2" and "memory" not in own:
            group = _below(mounted, root, own[""])
            return group if group == Path(mounted) else group.parent, 2
    raise FileNotFoundError("no control groups")


def _below(mounted: str, root: str, group: str) -> Path:
    relative = os.path.relpath(group, root)
    if relative.startswith(".."):
        raise FileNotFoundError(f"{group} lies outside of what is mounted")
    return Path(mounted, relative)


def _probe(folder: Path, version: int) -> Groups:
    """Make a group and see what it offers. OSError where that fails."""
    memory, swap = [("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), ("memory.max", "memory.swap.max")][
        version - 1
    ]
    if not os.access(folder / "cgroup.procs", os.W_OK):
        raise PermissionError("no process may be moved here")
    group = folder / f"sandbox-probe-{os.getpid()}"
    group.mkdir(exist_ok=True)
    try:
        (group / memory).stat()
        return Groups(folder, memory, swap if (group / swap).exists() else None, version)
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()
