"""Graders in a process of their own: an answer that hangs or explodes ends only that process.

The limits are the system's: it kills a process whose CPU time for an answer is spent, whatever library it hangs in. So
they hold in any thread, for any grader, and also when the caller is gone. CPU time, since a wall clock would let a
busy machine grade answers wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass

from experiments.errors import one_line
from experiments.graders.registry import GRADERS, Grader, Score
from experiments.paths import ROOT

SECONDS = 5.0
"""CPU time for an answer."""
MEMORY = 4 << 30
"""Bytes of address space of the process."""


class GradingError(Exception):
    """A grader failed on an answer; the text is the type and text of its fault."""


@dataclass(frozen=True)
class BoundedGrader:
    """The grader of that name in `experiments.graders.registry.GRADERS`, within limits of time and memory."""

    name: str

    def __call__(self, answer: str, gold: str) -> tuple[Score, str | None]:
        """Grade. Raises GradingError where the grader raises or reaches a limit."""
        score, extracted, fault = _PROCESS.ask(self.name, answer, gold)
        if fault is not None:
            raise GradingError(fault)
        return score, extracted


class _Process:
    """The process, started when first asked and again after one that died. One answer at a time, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, *question: str) -> tuple[Score, str | None, str | None]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            try:
                reply = self._exchange(self._process, json.dumps([SECONDS, MEMORY, *question]))
            except BaseException:  # interrupted: a late reply must not be taken for the next one's
                self._end()
                raise
            if reply:
                return tuple(json.loads(reply))
            return None, None, _cause(self._end())

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        serve = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from experiments.graders.bounded import serve; serve()"
        return subprocess.Popen(
            [sys.executable, "-c", serve],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="ascii",
            process_group=0,  # a terminal's Ctrl-C goes to the harness alone
        )

    @staticmethod
    def _exchange(process: subprocess.Popen[str], question: str) -> str:
        with contextlib.suppress(BrokenPipeError):  # it has died, which the other pipe tells
            process.stdin.write(question + "\n")
            process.stdin.flush()
        return process.stdout.readline()

    def _end(self) -> int:
        process, self._process = self._process, None
        process.kill()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        return process.wait()

    def close(self) -> None:
        if self._process is not None:
            self._end()


def _cause(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"TimeoutError: grading took longer than {SECONDS:g} s of CPU time"
    return f"RuntimeError: the grader's process ended with code {code}"


_PROCESS = _Process()
atexit.register(_PROCESS.close)
os.register_at_fork(after_in_child=_PROCESS.__init__)  # a fork shares no pipe with its parent


def serve() -> None:
    """Grade until the standard input ends. A question and its reply are a line of JSON each."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not a reply
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin:
        seconds, memory, name, answer, gold = json.loads(line)
        _limit_memory(memory)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = _grade(GRADERS[name], answer, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _limit_memory(size: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


def _grade(grader: Grader, answer: str, gold: str) -> tuple[Score, str | None, str | None]:
    try:
        return *grader(answer, gold), None
    except Exception as error:
        return None, None, one_line(error)
