"""The plan of a sweep and its progress: what is said before and while arms run, and how it fits a terminal."""

# ruff: noqa: F811

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.config.arms import expand
from experiments.records import load_runs
from experiments.running.plan_text import arm_names, plan_lines
from experiments.running.progress import Progress
from experiments.running.sweep import Sweep
from tests.experiments.running.run_process import ROOT
from tests.experiments.running.sweep_helpers import launch_sweep, small, sweep_file  # noqa: F401


def test_dry_run_prints_the_plan_and_stops(launch_sweep, small, results, capsys):
    assert launch_sweep(small, "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.startswith("sweep small: 5 arms, 0 done, 5 to go\n")
    assert "zipage budget=48" in out
    assert launch_sweep.ran == []
    assert not list(results.glob("sweeps/*"))
    launch_sweep(small)
    capsys.readouterr()
    assert launch_sweep(small, "--dry-run", "policy.budget_tokens=32,48,64") == 0
    assert "7 arms, 5 done, 2 to go, about 0:00:0" in capsys.readouterr().out


@pytest.mark.parametrize("written", ["+arms=[1,4]", "arms=4,1", "+arms=[ 4, 1, 4 ]"])
def test_chosen_arms_alone_are_run_by_their_numbers_in_the_plan(launch_sweep, small, results, capsys, written):
    assert launch_sweep(small, written, "--dry-run") == 0
    assert capsys.readouterr().out.startswith("sweep small: 2 arms, 0 done, 2 to go\n")
    assert launch_sweep(small, written) == 0
    assert [arm.partition("=")[2] for ran in launch_sweep.ran for arm in ran if arm.startswith("policy=")] == [
        "full",
        "random",
    ]
    assert "policy.budget_tokens=48" in launch_sweep.ran[1]
    assert len(load_runs(sweep_file(results))) == 2
    capsys.readouterr()
    assert launch_sweep(small, "--dry-run") == 0
    assert capsys.readouterr().out.startswith("sweep small: 5 arms, 2 done, 3 to go"), "they are the whole sweep's"


def test_chosen_arms_keep_their_numbers(launch_sweep, small, capsys):
    """In the plan, beside their ends and in errors, so that a number means one arm of the sweep."""
    assert launch_sweep(small, "+arms=[2,5]") == 0
    out = capsys.readouterr().out
    assert re.findall(r"^ +(\d+) ", out.partition("arm ")[0], flags=re.MULTILINE) == ["2", "5"]
    assert re.findall(r"^arm (\d+ of \d+): ", out, flags=re.MULTILINE) == ["2 of 5", "5 of 5"]
    assert launch_sweep(small, "+arms=[4]", "--dry-run") == 0
    assert re.search(r"^ +4 ", capsys.readouterr().out, flags=re.MULTILINE)


def test_numbers_count_arms_that_mean_the_same_run_once_as_the_plan_does(launch_sweep, small, capsys):
    twice = "sampling.temperature=0,0.0"
    assert launch_sweep(small, twice, "+arms=5", "--dry-run") == 0
    assert "  all arms: random block_size=16 budget=64 " in capsys.readouterr().out
    assert launch_sweep(small, twice, "+arms=6", "--dry-run") == 2


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("+arms=[1,6]", "+arms: no arm 6: sweep small has 5; --dry-run shows them"),
        ("+arms=0", "+arms: no arm 0: sweep small has 5; --dry-run shows them"),
        ("+arms=[]", "+arms=[]: must be numbers of arms, such as +arms=[1,3]; --dry-run shows them"),
        ("+arms=random", "+arms=random: must be numbers of arms, such as +arms=[1,3]; --dry-run shows them"),
        ("+arms=1-3", "+arms=1-3: must be numbers of arms, such as +arms=[1,3]; --dry-run shows them"),
    ],
)
def test_an_arm_that_is_not_there_is_refused(launch_sweep, tmp_path, small, capsys, written, said):
    assert launch_sweep(small, written) == 2
    assert capsys.readouterr().err.replace(f"{tmp_path}/", "").replace(".yaml", "") == f"error: {said}\n"
    assert launch_sweep.ran == []


def test_dry_run_of_a_single_run_is_refused(launch_sweep, capsys):
    assert launch_sweep("--dry-run") == 2
    assert capsys.readouterr().err.startswith("error: --dry-run: ")


@pytest.mark.parametrize("width", [100, 60])
@pytest.mark.parametrize("count", [1, 200])
def test_a_plan_of_any_size_fits(width, count):
    arms = [("model.path=/a/long/path" + "/x" * 90, f"seed={n}", "sampling.stop=['\n\x1b[31m']") for n in range(count)]
    lines = plan_lines(arms, ["stale"] * count, width)
    assert max(map(len, lines)) <= width
    text = "".join(lines)
    assert text.isprintable(), "no control characters"
    assert "\\n\\x1b" in text
    assert all(name.isprintable() for name in arm_names(arms))
    assert sum(line.split()[1:2] == ["stale"] for line in lines) == count


@contextlib.contextmanager
def terminal(monkeypatch, width):
    """The output of this process on a terminal; gives what was shown."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    shown = []
    with os.fdopen(child, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        yield shown
    text = b""
    with contextlib.suppress(OSError):  # the other side is closed: this is its end
        while part := os.read(parent, 1 << 16):  # one read may bring a part of what was written
            text += part
    shown.append(text.decode())
    os.close(parent)


@pytest.mark.parametrize("width", [100, 60])
def test_a_plan_and_its_progress_fit_the_terminal(launch_sweep, small, monkeypatch, width):
    with terminal(monkeypatch, width) as shown:
        assert launch_sweep(small, "--dry-run", "tracking.tags=[" + ",".join(f"tag{n}" for n in range(40)) + "]") == 0
        progress = Progress(5)
        progress.show("arm 1 of 5: /a/long/path" + "/x" * 40, 0, 5, 1.0, 59.0)
        progress.close()
    parts = [part for part in re.split(r"[\r\n]+", re.sub(r"\x1b\[\w", "", shown[0])) if part]
    assert max(map(len, parts)) <= width
    assert any(re.search(r"\.\.\., 0:00:59 left \|", part) for part in parts), "the time is not cut off"


@pytest.mark.parametrize("sweep", ["demo", "reasoner", "granularity", "budget", "paper_table1", "concurrency"])
def test_plans_of_shipped_sweeps_fit_and_tell_arms_apart(sweep):
    arms = expand([sweep], ["results_dir=" + "/a/long/path" * 10, "model.path=" + "x" * 150])
    lines = plan_lines(arms, ["done"] * len(arms))
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    assert text.count("results_dir") == 1, "what all share is said once"
    numbers = [line.split()[0] for line in lines if re.match(r" +\d+ done ", line)]
    assert sorted(map(int, numbers)) == list(range(1, len(arms) + 1))
    assert len(set(arm_names(arms))) == len(arms)


def test_what_a_group_of_arms_shares_is_said_once():
    chains = ("policy=full", "workload=a", "workload.options.steps=12")
    arms = [
        chains,
        *(("policy=x", *chains[1:], "policy.protection=prompt", f"policy.budget_tokens={n}") for n in (1, 2)),
    ]
    arms += [("policy=full", "workload=b", "engine.num_blocks=16")]
    text = "\n".join(plan_lines(arms, [""] * 4))
    for once in ("steps=12", "protection=prompt", "num_blocks=16", "workload"):
        assert text.count(once) == (once != "workload"), once
    assert [line.split() for line in text.splitlines() if "budget" in line] == [
        ["2", "x", "budget=1"],
        ["3", "x", "budget=2"],
    ]


def test_time_left_counts_the_running_arm_down(launch_sweep, small, monkeypatch):
    seen = []
    monkeypatch.setattr(Progress, "show", lambda self, *told: seen.append(told))
    launch_sweep(small)
    assert seen == [], "no arm took a second"
    arms = [SimpleNamespace(number=n, kind="a", folder=Path("r/x"), overrides=()) for n in range(5)]
    sweep = Sweep("s", arms, of=5)

    def left(running: dict[int, float]) -> float | None:
        """With so many seconds spent on each that runs."""
        sweep._running = {number: time.monotonic() - spent for number, spent in running.items()}
        return pytest.approx(sweep._seconds_left(), abs=0.5) if sweep._seconds else sweep._seconds_left()

    sweep._waiting = [1]
    assert left({0: 3.0}) is None
    sweep._seconds = {"a": [10.0]}
    assert [left({0: spent}) for spent in (0, 3, 30)] == [20, 17, 10]
    sweep._waiting = [2, 3, 4]
    assert left({0: 0.0, 1: 0.0}) == 25, "two share what is to go"
    sweep._waiting = []
    assert left({0: 0.0, 1: 8.0}) == 10, "the longest lasts"


TERMINAL = """
import sys, time
from experiments.running.progress import Progress

progress = Progress(3)
for second in range(3):
    progress.show("arm 1 of 3: zipage budget=48", 0, 3, second, None if second == 0 else 60 - second)
progress.say("arm 1 of 3: done")
progress.close()
"""


def test_progress_is_one_line_of_a_terminal_and_nothing_in_a_file():
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", TERMINAL], cwd=ROOT, stdout=child)
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):
        while data := os.read(parent, 4096):
            shown += data
    assert process.wait() == 0
    text = shown.decode()
    assert "arm 1 of 3: zipage budget=48, 0:00:00, time left unknown" in text
    assert text.index("0:00:59 left") < text.index("0:00:58 left")
    assert text.count("\n") == 1, "the bar never scrolls"
    assert max(len(part) for part in re.split(r"[\r\n]", re.sub(r"\x1b\[\w", "", text))) <= 100
    whole = subprocess.run([sys.executable, "-c", TERMINAL], cwd=ROOT, capture_output=True, text=True, check=True)
    assert whole.stdout == "arm 1 of 3: done\n"


def test_what_is_hardly_meant_is_said_in_the_plan_and_below_the_table(launch_sweep, tmp_path, capsys):
    path = tmp_path / "budgets.yaml"
    path.write_text("axes: {policy: streaming, policy.budget_tokens: [100, 240, 256], sampling.n: [2, 3]}")
    assert launch_sweep(f"+sweep={path}") == 0
    plan, _, table = capsys.readouterr().out.partition("\n\n")
    table = " ".join(table.split())
    notes = [line for line in plan.splitlines() if line.startswith("note: ")]
    assert [note.partition(":")[2].partition("=")[0] for note in notes] == [" policy.budget_tokens"] + [
        " sampling.n"
    ] * 2 + [" policy.budget_tokens"]
    assert "256 (for 100)" in table
    assert "note: whole blocks made the budget of 4 runs more than 5 % larger" in table
    assert "note: 6 runs drew several samples a problem at temperature 0" in table
