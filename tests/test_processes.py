"""Children answer, and none outlives its parent."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.child_processes import is_alive, wait_for_end
from zipage.processes import Child, close_all, unpacked

ROOT = Path(__file__).parents[1]
TARGETS = "tests.child_processes"


def test_a_child_answers_with_our_path_and_ends_when_it_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "path", ["", *sys.path, "/nowhere/at all"])
    child = Child("echo 0", f"{TARGETS}:echo", {"ZIPAGE_TEST": "yes"})
    for message in ("x", b"y" * 3_000_000, {"z": [1, None]}):
        child.channel.send(message)
        assert child.channel.receive() == message
    child.channel.send("environment")
    value, path = child.channel.receive()
    assert value == "yes"
    ours = list(dict.fromkeys([os.getcwd(), *sys.path[1:]]))
    assert [place for place in path if place in ours] == ours
    os.kill(child.pid, signal.SIGINT)
    child.channel.send("still here")
    assert child.channel.receive() == "still here"
    begin = time.monotonic()
    child.close()
    assert time.monotonic() - begin < 5
    assert child.death() == "echo 0 died (exit code 0)"


def test_errors_cross_and_the_end_of_a_child_is_named():
    failing, killed = Child("rank 0", f"{TARGETS}:fail"), Child("rank 1", f"{TARGETS}:sleep")
    missing, bad, odd = (unpacked(failing.channel.receive()) for _ in range(3))
    assert isinstance(missing, FileNotFoundError)
    assert str(missing) == "[Errno 2] no such thing: 'here'"
    assert isinstance(bad, ValueError)
    assert isinstance(odd, RuntimeError)
    assert str(odd).endswith("_Odd: odd 1 2")
    assert "_Odd: odd 1 2" in str(odd.__cause__)
    with pytest.raises(EOFError):
        failing.channel.receive()
    assert failing.death() == "rank 0 died (exit code 3)"
    os.kill(killed.channel.receive(), signal.SIGKILL)
    with pytest.raises((EOFError, OSError)):
        killed.channel.receive()
    assert killed.death() == "rank 1 died (signal 9)"
    close_all([failing, killed])


def test_log_records_cross(caplog):
    child = Child("rank 1", f"{TARGETS}:log")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            child.channel.receive().repeat(child.name)
    plain, fault = caplog.records
    assert (plain.name, plain.levelname, plain.message, plain.exc_info) == ("some.part", "INFO", "rank 1: one 1", None)
    assert (fault.name, fault.levelname, fault.message, fault.in_output) == ("some", "ERROR", "rank 1: bad", True)
    assert "in log\n" in str(fault.exc_info[1])
    assert child.channel.receive() == "that is all", "nothing below the level, nothing of other loggers"
    child.close()


def test_a_deaf_child_is_killed_and_a_forgotten_one_too():
    deaf, forgotten = (Child(name, f"{TARGETS}:sleep") for name in ("deaf", "forgotten"))
    pids = [child.channel.receive() for child in (deaf, forgotten)]
    deaf.close(grace=0.2)
    del forgotten
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, "thread", "exit"])
def test_no_process_outlives_its_parent(how):
    """The program is read from stdin and has no guard."""
    code = f"""
import os, signal, threading, time
from tests.child_processes import is_alive, wait_for_end
from zipage.processes import Child
def start():
    global child
    child = Child("middle", "{TARGETS}:with_grandchild")
    print(*child.channel.receive(), flush=True)
thread = threading.Thread(target=start)
thread.start()
thread.join()  # a child outlives the thread that made it
if {how == "thread"}:
    time.sleep(1)
    assert child._process.poll() is None
elif {how != "exit"}:
    os.kill(os.getpid(), {int(how) if isinstance(how, signal.Signals) else 0})
"""
    done = subprocess.run(
        [sys.executable, "-"], input=code, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    assert how not in ("thread", "exit") or done.returncode == 0, done.stderr
    wait_for_end(pids)
