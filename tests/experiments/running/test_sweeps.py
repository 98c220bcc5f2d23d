"""Sweeps on the fake engine: what is run, what is said, and every way an arm or the sweep can end."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from experiments import report, run
from experiments.config.arms import expand
from experiments.config.compose import load_experiment
from experiments.records import load_runs
from experiments.running import job
from experiments.running.child import reason_of, run_child
from experiments.running.plan_text import arm_names, plan_lines
from experiments.running.progress import Progress
from experiments.running.sweep import Sweep
from tests.experiments.fake_engine import fake_backend
from tests.experiments.running.test_run import ROOT, wait_for

SMALL = """
axes: {engine.block_size: 16}
arms:
  - policy: full
  - {policy: [zipage, random], policy.budget_tokens: [48, 64]}
"""
SIX = """
axes: {engine.block_size: 16, policy.budget_tokens: 64, policy: [full, zipage, random], seed: [0, 1]}
"""
TIMES = ("seconds", "ttft", "tpot", "itl", "e2e", "time", "_per_second", "provenance.", "path")
"""Parts of the names of columns that differ from run to run."""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return f"+sweep={path}"


@pytest.fixture
def six(tmp_path):
    path = tmp_path / "six.yaml"
    path.write_text(SIX)
    return f"+sweep={path}"


@pytest.fixture
def launch_sweep(arguments, monkeypatch):
    """A sweep whose arms run in this process; `behave(overrides)` says how the fake engine of an arm behaves."""

    def launch_sweep(*more: str, behave=lambda overrides: {}) -> int:
        def run_child(command, progress) -> tuple[int, str]:
            launch_sweep.ran.append(command[1:])
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                code = run.exit_code(lambda: job.run(load_experiment(command[1:]), fake_backend(**behave(command))))
                return code, output.getvalue()

        launch_sweep.ran = []
        monkeypatch.setattr("experiments.running.sweep.run_child", run_child)
        monkeypatch.setattr(sys, "argv", ["run", *arguments, *more])
        return run.main(fake_backend(), child=["run"])

    return launch_sweep


@pytest.fixture
def start_sweep(arguments, tmp_path):
    """A sweep in a process of its own, which forks its arms."""

    def start_sweep(*more: str, step_seconds: float = 0.0) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "tests.experiments.running.sweep_process",
            str(step_seconds),
            str(tmp_path / "loads"),
        ]
        return subprocess.Popen(
            [*command, *arguments, *more],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )

    return start_sweep


def deterministic(runs):
    """Every column that does not depend on the clock or the machine."""
    kept = [name for name in runs.columns if not any(part in name for part in TIMES)]
    assert {"run", "accuracy", "output_tokens", "compressions", "steps", "peak_blocks", "policy.name"} <= set(kept)
    return runs[kept]


def sweep_file(results: Path) -> Path:
    (path,) = (results / "sweeps").glob("*.json")
    return path


def test_plan_then_arms_then_table(launch_sweep, small, results, capsys):
    assert launch_sweep(small, "limit=3") == 0
    out = capsys.readouterr().out
    plan, rest = out.split("arm 1 of 5", 1)
    lines = plan.splitlines()
    assert lines[0] == "sweep small: 5 arms, 0 done, 5 to go"
    assert " ".join(plan.split()).partition("all arms: ")[2].startswith("block_size=16 model=hf path=")
    assert [" ".join(line.split()) for line in lines[-5:]] == [
        "1 full",
        "2 zipage budget=48",
        "3 zipage budget=64",
        "4 random budget=48",
        "5 random budget=64",
    ]
    runs = load_runs(sweep_file(results))
    arms = [line for line in out.splitlines() if line.startswith("arm ")]
    assert len(arms) == 5
    for number, (line, (_, row)) in enumerate(zip(arms, runs.iterrows(), strict=True), 1):
        assert line.startswith(f"arm {number} of 5: ")
        assert f": {row['accuracy']:.1%} right, {row['output_tokens_per_second']:,.1f} tokens/s; 0:00:0" in line
        assert line.endswith("nothing to go") if number == 5 else f"{5 - number} to go, about 0:00:0" in line
    assert list(runs["policy.name"]) == ["full", "zipage", "zipage", "random", "random"]
    assert set(runs["limit"]) == {3}, "the command line holds for every arm and wins"
    below = rest[rest.index("\n\n") + 2 :].splitlines()
    assert below[0] == f"sweep: {sweep_file(results)}"
    rows = [line for line in below if line.startswith("|")][2:]
    assert {row.split("|")[1].strip() for row in rows} == {run.rpartition("-")[2][:8] for run in runs["run"]}
    assert below[-1].startswith("|"), "no conclusion where full KV has no right answer"
    assert max(len(line) for line in lines) <= 100
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out), "a file has no control characters"


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
        stdout.flush()
        shown.append(os.read(parent, 1 << 16).decode())
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
    assert any("..., 0:00:59 left |" in part for part in parts), "the time is not cut off"


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
    for once in ("steps=12", "protection=prompt", "pool=16", "workload"):
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
    arm = SimpleNamespace(kind="a", folder=Path("r/x"), overrides=())
    sweep = Sweep("s", [arm], [])
    assert sweep._seconds_left([arm], arm, 3.0) is None
    sweep.seconds = {"a": [10.0]}
    assert [sweep._seconds_left([arm], arm, spent) for spent in (0, 3, 30)] == [20, 17, 10]


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


def test_finished_arms_are_not_repeated(launch_sweep, small, results, capsys):
    launch_sweep(small)
    before = load_runs(sweep_file(results))
    capsys.readouterr()
    assert launch_sweep(small, "policy.budget_tokens=32,48,64") == 0
    assert [overrides[2] for overrides in launch_sweep.ran] == ["policy.budget_tokens=32"] * 2
    assert "7 arms, 5 done, 2 to go, about 0:0" in capsys.readouterr().out
    assert len(list((results / "sweeps").glob("*.json"))) == 2
    assert launch_sweep(small) == 0
    assert launch_sweep.ran == []
    assert "5 arms, 5 done, nothing to go" in capsys.readouterr().out
    assert load_runs(results).set_index("run")["seconds"][before["run"]].tolist() == before["seconds"].tolist()
    assert launch_sweep(small, "force=true") == 0
    assert len(launch_sweep.ran) == 5
    assert len(load_runs(results)) == 7


def test_arm_that_was_run_by_itself_is_known(launch, launch_sweep, small):
    launch("policy=zipage", "policy.budget_tokens=48", "engine.block_size=16")
    launch_sweep(small)
    assert len(launch_sweep.ran) == 4


def test_arms_that_mean_the_same_run_are_one(launch_sweep, tmp_path):
    path = tmp_path / "same.yaml"
    path.write_text("arms: [{policy: random_attention}, {policy: random, policy.protection: prompt}, {policy: full}]")
    assert launch_sweep(f"+sweep={path}", "policy.budget_tokens=512") == 0
    assert len(launch_sweep.ran) == 2


def table_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("|")]


def test_report_renders_a_sweep(launch_sweep, tmp_path, results, capsys):
    (tmp_path / "two.yaml").write_text("axes: {policy: [full, zipage], policy.budget_tokens: 256}")
    launch_sweep(f"+sweep={tmp_path}/two.yaml", "seed=0,1", "engine.max_num_seqs=4,8")
    capsys.readouterr()
    path = sweep_file(results)
    assert report.main([str(path)]) == 0
    headings, _, *rows = table_of(capsys.readouterr().out)
    assert len(rows) == 8
    columns = list(zip(*([cell.strip() for cell in row.split("|")] for row in rows), strict=True))
    places = [columns.index(column) for column in columns if set(column) in ({"4", "8"}, {"0", "1"})][:2]
    assert "seed" in headings
    assert {tuple(row.split("|")[place].strip() for place in places) for row in rows} == {
        ("4", "0"),
        ("4", "1"),
        ("8", "0"),
        ("8", "1"),
    }
    assert report.main([str(results)]) == 0
    assert len(table_of(capsys.readouterr().out)) == 10, "the folder of runs has no more than the runs"
    moved = tmp_path / "moved"
    results.rename(moved)
    assert report.main([str(moved / "sweeps" / path.name)]) == 0
    assert len(table_of(capsys.readouterr().out)) == 10


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"arms": [{"run": 3}]}', '{"arms": 3}'])
def test_file_that_is_no_sweep_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert report.main([str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{path}: is not the record of a sweep (")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["limt=3"], "limt: unknown option; did you mean limit?"),
        (["model.path=no/such/folder"], "model.path=no/such/folder: no such file or folder"),
        (["workload.options.kount=1"], "workload.options.kount: unknown option of word_problems"),
        (["policy.budget_tokens=16"], "engine: "),
    ],
)
def test_wrong_arm_is_named_before_anything_runs(launch_sweep, small, results, capsys, more, line):
    assert launch_sweep(small, *more) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: sweep {small.removeprefix('+sweep=')}: arm ")
    assert f"): {line}" in err
    assert err.count("\n") == 1
    assert launch_sweep.ran == []
    assert not list(results.glob("sweeps/*"))


def test_unknown_option_in_a_file_names_file_and_key(launch_sweep, tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("axes: {engine.blok_size: [16, 32]}")
    assert launch_sweep(f"+sweep={path}") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: sweep {path}: arm 1 (engine.blok_size=16 ")
    assert err.endswith("): engine.blok_size: unknown option; did you mean engine.block_size?\n")


@pytest.mark.parametrize("wrong", ["+sweep=bugdet", "+sweep=a,b", "+sweep=[demo,bugdet]"])
def test_wrong_sweep_is_one_line(launch_sweep, capsys, wrong):
    assert launch_sweep(wrong) == 2
    err = capsys.readouterr().err
    assert "sweep=" in err
    assert err.count("\n") == 1


def test_failed_arms_cost_themselves_only(launch_sweep, small, results, capsys):
    def behave(overrides):
        if "policy=zipage" not in overrides:
            return {}
        memory = MemoryError("CUDA out of memory:\n tried to allocate 2 GiB")
        return {"fail_at": 2} | ({"error": memory} if "policy.budget_tokens=48" in overrides else {})

    assert launch_sweep(small, behave=behave) == 1
    captured = capsys.readouterr()
    memory, device = captured.err.splitlines()
    assert memory.startswith(
        "error: arm 2 of 5: zipage budget=48: the engine failed after 2 steps: "
        "MemoryError: CUDA out of memory: tried to allocate 2 GiB"
    )
    assert device.startswith("error: arm 3 of 5: zipage budget=64: the engine failed after")
    assert len(launch_sweep.ran) == 5
    assert list(load_runs(sweep_file(results))["policy.name"]) == ["full", "random", "random"]
    assert captured.out.count("out of memory") == 0, "what went wrong is said once"
    assert "2 of 5 arms failed: see the errors above" in captured.out
    assert len(list((results / "sweeps").glob("*.log"))) == 2
    assert launch_sweep(small) == 0
    assert len(launch_sweep.ran) == 2
    assert list(load_runs(sweep_file(results))["policy.name"]) == ["full", "zipage", "zipage", "random", "random"]
    assert not list((results / "sweeps").glob("*.log"))


def test_full_disk_costs_what_could_not_be_written(launch_sweep, small, results, capsys, monkeypatch):
    from experiments.records import schemas

    write = schemas.write_rows

    def full(path, *more):
        if "random" in str(path):
            raise OSError(28, "No space left on device")
        write(path, *more)

    monkeypatch.setattr(schemas, "write_rows", full)
    assert launch_sweep(small) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("can't be written: No space left on device") for line in lines)
    assert len(load_runs(sweep_file(results))) == 3


def test_folders_that_cannot_be_written_are_one_line(launch_sweep, small, tmp_path, results, capsys):
    (tmp_path / "file").write_text("")
    assert launch_sweep(small, f"results_dir={tmp_path}/file/runs") == 2
    assert f": results_dir={tmp_path}/file/runs: can't be written" in capsys.readouterr().err
    results.mkdir(exist_ok=True)
    (results / "sweeps").write_text("")
    assert launch_sweep(small) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {results}/sweeps/small-")
    assert err.count("\n") == 1
    assert launch_sweep.ran == []


@pytest.mark.parametrize(("name", "content"), [("metrics.json", b"{"), ("requests.parquet", b"PAR1")])
def test_damaged_record_costs_itself_only(launch_sweep, small, results, capsys, name, content):
    launch_sweep(small)
    broken = Path(load_runs(sweep_file(results))["path"][1])
    whole = (broken / name).read_bytes()
    (broken / name).write_bytes(content)
    capsys.readouterr()
    assert launch_sweep(small) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: arm 2 of 5: zipage budget=48: ")
    assert f"{broken}: its record is damaged (" in line
    assert line.endswith("); force=stale replaces it")
    assert "5 arms, 4 done, 1 to go" in captured.out
    assert len(launch_sweep.ran) == 1
    assert len(load_runs(sweep_file(results))) == 4
    assert launch_sweep(small, "force=stale") == 0
    assert len(launch_sweep.ran) == 1
    assert len(load_runs(sweep_file(results))) == 5
    assert len((broken / name).read_bytes()) == pytest.approx(len(whole), rel=0.1)


def test_arms_that_other_code_made_are_stale(launch_sweep, small, results, capsys, other_code):
    launch_sweep(small)
    path = sweep_file(results)
    seconds = load_runs(path)["seconds"]
    other_code("zipage/eviction/policies/zipage.py")
    capsys.readouterr()
    assert launch_sweep(small) == 0
    plan = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    first = plan.index("1 done full")
    assert plan[first : first + 6] == [
        "1 done full",
        "2 stale zipage budget=48",
        "3 stale zipage budget=64",
        "4 done random budget=48",
        "5 done random budget=64",
        "2 stale: the policy has changed since; force=stale runs such arms again",
    ]
    assert launch_sweep.ran == []
    assert launch_sweep(small, "policy.budget_tokens=48", "force=stale") == 0
    assert len(launch_sweep.ran) == 1
    assert launch_sweep(small) == 0
    assert "note: these rows were made by 2 versions of the policy zipage" in " ".join(capsys.readouterr().out.split())
    assert launch_sweep(small, "force=stale") == 0
    assert len(launch_sweep.ran) == 1
    out = capsys.readouterr().out
    assert "4 done, 1 to go" in out
    assert "note:" not in out
    after = load_runs(path)["seconds"]
    assert (after == seconds).tolist() == [True, False, False, True, True]


CRASHES = """
import os, signal, sys
from pathlib import Path

seed = next(argument for argument in sys.argv if argument.startswith("seed="))
if seed in ("seed=1", "seed=2"):
    print("working")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL if seed == "seed=1" else signal.SIGSEGV)
if seed == "seed=3":
    sys.exit(9)
if seed == "seed=4":
    sys.exit(0)
if seed == "seed=5":
    raise ValueError("what is\\nthis")
from experiments.run import main
from tests.experiments.fake_engine import fake_backend

sys.exit(main(fake_backend()))
"""


def test_children_that_die_are_one_line_each(arguments, tmp_path, results, capsys, monkeypatch):
    path = tmp_path / "crashes.yaml"
    path.write_text("axes: {seed: [1, 2, 3, 4, 5, 6]}")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["run", *arguments, f"+sweep={path}"])
    assert run.main(fake_backend(), child=[sys.executable, "-c", CRASHES]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: arm 1 of 6: seed=1: killed by SIGKILL (did the memory run out?)",
        "error: arm 2 of 6: seed=2: killed by SIGSEGV",
        "error: arm 3 of 6: seed=3: ended with exit code 9 and no output",
        "error: arm 4 of 6: seed=4: ended without the record that it was to make: "
        "did what it reads change since the sweep began?",
        "error: arm 5 of 6: seed=5: this",
    ]
    assert list(load_runs(sweep_file(results))["seed"]) == [6]
    logs = {path.read_text() for path in (results / "sweeps").glob("*.log")}
    assert len(logs) == 3
    assert "working\n" in logs


def test_command_that_is_none_is_one_line(arguments, small, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", *arguments, small])
    assert run.main(fake_backend(), child=["/no/such/python"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("error: arm 1 of 5: full: FileNotFoundError: ")


def test_reason_is_the_last_error_line():
    assert reason_of(1, "warning\nerror: first\nerror: no budget\nmore\n") == "no budget"
    assert reason_of(1, "Traceback:\n  file\nValueError: x\n") == "ValueError: x"
    engine = "(EngineCore pid=8) ERROR 11-25 [core.py:9] ValueError: Free memory (75 GiB) is less than desired\n"
    assert reason_of(1, engine + "error: RuntimeError: it failed. See root cause above.") == (
        "ValueError: Free memory (75 GiB) is less than desired"
    )
    assert reason_of(1, "error: E: See root cause above.") == "E: See root cause above."
    assert reason_of(-signal.SIGTERM, "error: x") == "killed by SIGTERM"
    assert reason_of(1, "\x1b[1;31merror: no\x07 budget\x1b[0m\r\n") == r"no\x07 budget"
    assert reason_of(-40, "") == "killed by signal 40"


def test_child_is_not_in_the_way_of_the_terminal():
    code = "import os, sys; print(os.getpgrp() == os.getpid(), sys.stdin.read() == '')"
    assert run_child([sys.executable, "-c", code], lambda: "") == (0, "True True\n")


PARENT = """
import sys
from experiments.run import main
from tests.experiments.fake_engine import fake_backend
from tests.experiments.running.test_run import CHILD

sys.exit(main(fake_backend(), child=[sys.executable, "-c", CHILD, "10"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_stops_child_and_sweep(arguments, small, results, number):
    command = [sys.executable, "-c", PARENT, *arguments, small]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(results.glob("*.partial/config.yaml")))
    (child,) = map(int, Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
    parent.send_signal(number)
    err = parent.communicate(timeout=20)[1]
    assert parent.returncode == 130
    assert err == "\nerror: interrupted: 0 of 5 arms recorded, and the same command goes on\n"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert sorted(path.name for path in results.iterdir()) == [".locks", "sweeps"], "the child cleaned up"


def test_kill_at_any_moment_then_start_again(launch_sweep, start_sweep, six, results, tmp_path):
    def finished() -> dict[str, int]:
        return {path.parent.name: path.stat().st_mtime_ns for path in results.glob("*[!l]/metrics.json")}

    def under_way() -> bool:
        return bool(list(results.glob("*.partial/config.yaml")))

    kept: dict[str, int] = {}
    moments = [
        (os.kill, lambda: list(results.glob("sweeps/*.json"))),
        (os.killpg, lambda: len(finished()) >= 2 and under_way()),
        (os.kill, lambda: len(finished()) >= 4),
    ]
    for kill, moment in moments:
        sweep = start_sweep(six, step_seconds=0.01)
        wait_for(moment)
        kill(sweep.pid, signal.SIGKILL)
        sweep.wait()
        assert finished().items() >= kept.items()
        kept = finished()
    assert 4 <= len(kept) < 6
    sweep = start_sweep(six)
    output = sweep.communicate(timeout=120)[0]
    assert sweep.returncode == 0, output
    assert f"6 arms, {len(kept)} done, {6 - len(kept)} to go" in output
    assert finished().items() >= kept.items(), "a finished arm was repeated"
    assert len((tmp_path / "loads").read_text().split()) <= 6 + len(moments), "each kill costs one arm at most"

    assert launch_sweep(six, f"results_dir={tmp_path}/whole") == 0
    whole = load_runs(sweep_file(tmp_path / "whole"))
    resumed = load_runs(sweep_file(results))
    assert len(whole) == 6
    assert load_runs(results).attrs["incomplete"] == 0
    pd.testing.assert_frame_equal(deterministic(resumed), deterministic(whole))


def test_two_sweeps_at_once_share_the_work(start_sweep, six, results, tmp_path):
    both = [start_sweep(six, step_seconds=0.002) for _ in range(2)]
    outputs = [sweep.communicate(timeout=120)[0] for sweep in both]
    assert [sweep.returncode for sweep in both] == [0, 0], outputs
    runs = load_runs(results)
    assert len(runs) == 6
    assert runs.attrs["incomplete"] == 0
    assert len((tmp_path / "loads").read_text().split()) == 6, "no arm was run twice"
    assert len(json.loads(sweep_file(results).read_text())["arms"]) == 6
    assert list(load_runs(sweep_file(results))["run"].sort_values()) == list(runs["run"].sort_values())


def test_name_of_many_joined_sweeps_is_short_enough_for_wandb(launch_sweep, tmp_path, results):
    names = [f"sweep_of_a_long_name_{number}" for number in range(20)]
    for name in names:
        (tmp_path / f"{name}.yaml").write_text("axes: {engine.block_size: 16}")
    paths = ",".join(f"{tmp_path}/{name}.yaml" for name in names)
    assert launch_sweep(f"+sweep=[{paths}]", "limit=1") == 0
    assert sweep_file(results).stem.startswith("sweep_of_a_long_name_0+")
    assert len(sweep_file(results).stem) <= 128


@pytest.mark.parametrize(
    ("more", "group"),
    [
        (["tracking=wandb_offline"], "own-"),
        (["tracking=wandb_offline", "tracking.group=mine"], "mine"),
        ([], None),
    ],
)
def test_runs_in_wandb_are_grouped_by_their_sweep(launch_sweep, tmp_path, results, more, group, monkeypatch):
    monkeypatch.setattr("experiments.running.tracking.pictures", dict)
    (tmp_path / "own.yaml").write_text("axes: {seed: [0, 1]}")
    assert launch_sweep(f"+sweep={tmp_path}/own.yaml", "limit=2", *more) == 0
    assert len(load_runs(results)) == 2
    groups = load_runs(results)["tracking.group"].unique().tolist()
    assert len(groups) == 1
    assert groups[0] is None if group is None else groups[0].startswith(group)
