"""Claims: which process makes a run, where several processes or machines share a folder of results.

A claim is a file in `.locks/`. Its owner creates it whole, by a hard link, which network file systems make atomic too,
and touches it every `BEAT` seconds. An owner is lost whose process on this machine has ended, or that was silent for
`LOST` seconds and stayed so for `WATCH` seconds more under this process's eyes: after a machine was asleep, or the file
system did not answer, all owners look silent until they get to touch their claims again.

A claim ends once: with the creation of the file named after its token. The owner creates it to give the claim back, or
one other process to take it over; that file is the new claim then. So no two processes take over the same claim, and an
owner that was taken for lost and wakes up can't give back what is another's by now.

How long an owner was silent, is told by two times of the same file system: the claim's, and that of a file just made
beside it. Clocks of machines do not matter, but where clients write their own time into files, as on Lustre: there they
must agree within half a minute.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from experiments.errors import RunError

FOLDER = ".locks"
BEAT, LOST, WATCH = 10.0, 90.0, 30.0
"""Seconds. NFS may show a time of up to a minute ago."""
PAUSE = 0.01
"""Seconds between two tries where claims come and go."""
VARIABLE = "ZIPAGE_CLAIM"
"""Token of the claim under which a process works that another claimed the run for."""

Link = tuple[Path, str]
"""The file of a claim, and its token."""

_silent: dict[Path, tuple[str, float, float]] = {}
"""Claims that look lost: token, last sign of life, and since when this process has seen that (its monotonic clock)."""


class Claim:
    """The right to make a run, until `release`. A thread of its own keeps it alive.

    Attributes:
        token: names this claim, and no other ever.
    """

    def __init__(self, run: Path, chain: list[Link]) -> None:
        """
        Args:
            chain: the claims that were lost, and this one.
        """
        self._run, self._chain = run, chain
        self._path, self.token = chain[-1]
        self._file = os.open(self._path, os.O_RDONLY)
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"claim {run.name}", daemon=True)
        self._heart.start()

    @property
    def is_lost(self) -> bool:
        """Whether another process took it over, since this one was silent for too long."""
        try:
            ask_again(self._path.parent)
            return not _stands(self._chain) or _after(self._run, self.token).exists()
        except OSError:  # the file system does not answer, and may again
            return False

    def release(self) -> None:
        """Give the run free. Does nothing where the claim was lost."""
        self._over.set()
        self._heart.join()
        os.close(self._file)
        with contextlib.suppress(OSError), _draft(self._run, "") as (draft, token):  # else it is lost before long
            end = _after(self._run, self.token)
            if not _link(draft, end, token):
                return
            if not _stands(self._chain):  # it was lost, and who took it over is done already
                end.unlink(missing_ok=True)
            else:  # from here no one can take it over
                left = sorted(self._run.parent.glob(f"{FOLDER}/{glob.escape(self._run.name)}.{'[0-9a-f]' * 12}*"))
                # The first of the chain goes first: without it, what follows it means nothing.
                for path in (self._chain[0][0], *(path for path in left if path != end), end):
                    path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def take(run: Path, worker: str = "") -> Claim | None:
    """Claim the run whose folder is `run`; None where another process has it.

    Args:
        worker: the owner's name beside host and process, for whoever asks.

    Raises:
        OSError: the claim can't be written.
    """
    first = run.parent / FOLDER / run.name
    first.parent.mkdir(parents=True, exist_ok=True)
    with _draft(run, worker) as (draft, token):
        path, chain = first, []
        while True:
            if _link(draft, path, token):
                chain.append((path, token))
                if _stands(chain):
                    return Claim(run, chain)
                path.unlink(missing_ok=True)  # what it was to follow was given back meanwhile
            elif (owner := _read(path)) is not None:
                if _is_alive(run, path, owner, _now(draft)):
                    return None
                chain.append((path, owner["token"]))
                path = _after(run, owner["token"])
                continue
            path, chain = first, []
            time.sleep(PAUSE)


@contextlib.contextmanager
def hold(run: Path) -> Iterator[str]:
    """Have the claim on a run, for which this waits; it is there already where this process works for its owner.

    Then the owner is not lost before this process has ended too.

    Yields:
        The claim's token.

    Raises:
        RunError: the claim can't be written.
        OSError: its folder can't be made.
    """
    given = os.environ.get(VARIABLE)
    if given is not None and is_mine(run, given):
        with _draft(run, "") as (draft, token):
            helper = _after(run, f"{given}-{os.getpid()}")
            _link(draft, helper, token)
        try:
            yield given
        finally:
            helper.unlink(missing_ok=True)
        return
    (run.parent / FOLDER).mkdir(parents=True, exist_ok=True)
    pause = 0.05
    while (claim := _try(run)) is None:
        if pause == 0.05:
            print(f"another process is making {run.name}: waiting for it", flush=True)
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    try:
        yield claim.token
    finally:
        claim.release()


def _try(run: Path) -> Claim | None:
    try:
        return take(run)
    except OSError as error:
        raise RunError(f"the claim on {run} can't be written: {error.strerror or error}") from error


def holder(run: Path) -> dict[str, Any] | None:
    """What the claim on a run says of its owner, alive or lost ("token", "host", "pid", "worker"); None: free."""
    found, path = None, run.parent / FOLDER / run.name
    with contextlib.suppress(FileNotFoundError):
        ask_again(path.parent)
    while (owner := _read(path)) is not None:
        found, path = owner, _after(run, owner["token"])
    return found


def is_mine(run: Path, token: str) -> bool:
    """Whether no one has taken over the claim of that token."""
    return (owner := holder(run)) is not None and owner["token"] == token


def ask_again(folder: Path) -> None:
    """Make a network file system see what other machines have put into a folder.

    NFS remembers for up to a minute that a name was not there, but asks the server when the folder is opened.
    """
    os.close(os.open(folder, os.O_RDONLY))


def _after(run: Path, token: str) -> Path:
    return run.parent / FOLDER / f"{run.name}.{token}"


@contextlib.contextmanager
def _draft(run: Path, worker: str) -> Iterator[tuple[Path, str]]:
    """A claim that nobody sees yet, and its token."""
    token = uuid4().hex[:12]
    path = run.parent / FOLDER / f".{token}"
    owner = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "begun": _begun(os.getpid())}
    text = json.dumps({"token": token} | owner | {"worker": worker, "since": time.time()})
    try:
        path.write_text(text + "\n", encoding="utf-8")
        yield path, token
    finally:
        path.unlink(missing_ok=True)


def _link(draft: Path, path: Path, token: str) -> bool:
    """Make the draft the claim `path`; False where there is one."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return _token(path) == token  # the answer to a first try may have been lost on the way
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """The claim, with its last sign of life as "beat"; None where there is none."""
    try:
        with path.open(encoding="utf-8") as file:  # NFS asks the server at each opening
            found, text = os.fstat(file.fileno()), file.read()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise
    try:
        owner = json.loads(text)
    except ValueError:  # the machine crashed while it was written
        nobody = {"host": "?", "machine": None, "pid": 0, "begun": 0, "worker": ""}
        owner = {"token": f"{found.st_ino:012x}"[-12:]} | nobody
    return owner | {"beat": found.st_mtime}


def _stands(chain: list[Link]) -> bool:
    """Whether each claim of a chain is still there, so that what follows the last one means something."""
    return all(_token(path) == token for path, token in chain)


def _token(path: Path) -> str | None:
    owner = _read(path)
    return None if owner is None else owner["token"]


def _now(draft: Path) -> float:
    """The file system's time."""
    os.utime(draft)
    return draft.stat().st_mtime


def _is_alive(run: Path, path: Path, owner: dict[str, Any], now: float) -> bool:
    """Whether the owner of the claim `path` is not lost."""
    if owner["machine"] is not None and owner["machine"] == _machine():
        helpers = run.parent.glob(f"{FOLDER}/{glob.escape(run.name)}.{owner['token']}-*")
        if not any(one is not None and _begun(one["pid"]) == one["begun"] for one in (owner, *map(_read, helpers))):
            return False
    if now - owner["beat"] <= LOST:
        _silent.pop(path, None)
        return True
    this, seen = (owner["token"], owner["beat"]), _silent.get(path)
    if seen is None or seen[:2] != this:
        seen = _silent[path] = (*this, time.monotonic())
    return time.monotonic() - seen[2] < WATCH


def _machine() -> str | None:
    """Equal where process numbers mean the same: a boot, and a namespace; None where the system tells neither."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _begun(pid: int) -> int | None:
    """When a process of this machine began, in the kernel's ticks; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
