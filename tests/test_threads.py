"""Threads that wait do not spin: in the engine, in every entry point of ours and in its children."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.compressed import make_llm
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[1]
WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
ENTRIES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("experiments", "docs", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8") and "sandbox" not in path.parts
)
AT_TORCH = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(entry, os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

import hydra, numpy, pandas, pyarrow.parquet  # what many share
assert "torch" not in sys.modules and "zipage" not in sys.modules
sys.meta_path.insert(0, Watch())
for entry in sys.argv[1:]:
    if pid := os.fork():
        os.waitpid(pid, 0)
        continue
    package, module = os.path.split(entry)
    if package.startswith(("experiments", "tests")):  # as `python -m` does
        name = entry.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        runpy.run_module(name, run_name="module", alter_sys=True)
    else:
        runpy.run_path(entry, run_name="module")
    print(entry, os.environ.get("OMP_WAIT_POLICY"), flush=True)
    os._exit(0)
"""


def run(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in (*WAITS, "OMP_NUM_THREADS")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=clean | variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_every_entry_point_says_it_before_torch_is_loaded():
    assert {"experiments/run.py", "experiments/running/worker.py", "experiments/bench/worker.py"} <= set(ENTRIES)
    said = dict(line.split() for line in run(AT_TORCH, *ENTRIES).stdout.splitlines())
    assert said == dict.fromkeys(ENTRIES, "passive")


def test_a_command_loads_no_torch_before_it_needs_it():
    """So that a wrong option or --help is answered at once."""
    heavy = ("torch", "transformers", "pandas", "datasets", "matplotlib", "scipy", "wandb", "math_verify")
    modules = "experiments.run, experiments.running.worker"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    assert run(code).stdout == "[]\n"


def test_openmp_has_heard_it():
    loaded = run("import zipage, torch; torch.ones(1 << 20).add(1)", OMP_DISPLAY_ENV="true").stderr
    if "OMP_WAIT_POLICY" not in loaded:
        pytest.skip("torch's OpenMP does not tell its settings")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in loaded


@pytest.fixture
def imported(monkeypatch):
    """`zipage.threads` as if it were imported now, in an environment that says `variables`."""

    def imported(*, torch_first: bool, **variables: str) -> dict[str, Any]:
        for name in WAITS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with monkeypatch.context() as context:
            if not torch_first:
                context.delitem(sys.modules, "torch")
            return runpy.run_path(str(ROOT / "zipage" / "threads.py"))

    return imported


@pytest.mark.parametrize(
    ("torch_first", "threads", "variables", "times"),
    [(True, 2, {}, 1), (True, 1, {}, 0), (False, 2, {}, 0), (True, 2, {"OMP_WAIT_POLICY": "active"}, 0)],
)
def test_torch_that_came_first_is_warned_of_once(imported, monkeypatch, caplog, torch_first, threads, variables, times):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    warn = imported(torch_first=torch_first, **variables)["warn_of_spinning"]
    warn()
    warn()
    assert len(caplog.messages) == times
    for line in caplog.messages:
        assert f"so its {threads} CPU threads spin while they wait" in line
        assert line.endswith("import zipage first, or set OMP_WAIT_POLICY=passive")


@pytest.mark.parametrize("variables", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}])
def test_what_the_user_chose_stays(imported, variables):
    imported(torch_first=False, **variables)
    expected = variables or {"OMP_WAIT_POLICY": "passive"}
    assert {name: os.environ[name] for name in WAITS if name in os.environ} == expected


def test_an_engine_on_a_cpu_warns(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr("zipage.worker.worker.warn_of_spinning", lambda: called.append(1))
    make_llm(save_tiny_model("llama", tmp_path), None)
    assert called == [1]


def test_children_inherit_it():
    from experiments.running.child import run_child

    code, output = run_child([sys.executable, "-c", "import os; print(os.environ['OMP_WAIT_POLICY'])"], str)
    assert (code, output.strip()) == (0, os.environ["OMP_WAIT_POLICY"])
