"""A policy of one's own that is broken: one line that names its file and line, and the traceback once, in a file."""

from __future__ import annotations

import logging
import sys
import zlib
from pathlib import Path

import pytest

from experiments import run
from experiments.records import load_requests, load_runs
from tests.experiments.running.run_process import ROOT

SOURCE = (ROOT / "examples" / "my_policy.py").read_text(encoding="utf-8")
RANK = "return attention * event.values().norm(dim=-1) ** self.power"
TENSOR = "from torch import Tensor"
METHOD = "    def rank"


def line_of(text: str) -> int:
    return SOURCE[: SOURCE.index(text)].count("\n") + 1


SMALL = [
    *("model=reasoner", "workload=chained_arithmetic", "workload.options.steps=8", "workload.options.recalls=1"),
    *("workload.options.distance=[64,96]", "limit=2", "engine.block_size=16", "engine.num_blocks=120"),
    *("hardware=cpu", "hardware.threads=1", "policy.budget_tokens=64"),
]


@pytest.fixture
def run_policy(tmp_path, results, monkeypatch, capsys):
    """Run the example with a change, as the policy NAME; returns exit code, output and errors."""

    def run_policy(old: str, new: str) -> tuple[int, str, str]:
        assert old in SOURCE
        name = f"broken_{zlib.crc32(new.encode())}"
        (tmp_path / f"{name}.py").write_text(SOURCE.replace(old, new).replace("my_policy", name))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        options = [f"policy.name={name}:MyPolicy", "workload.max_tokens=64", f"results_dir={results}"]
        monkeypatch.setattr(sys, "argv", ["run", *SMALL, *options])
        code = run.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err.replace(name, "NAME")

    return run_policy


@pytest.mark.parametrize(
    ("new", "said", "offset"),
    [
        ("return helper()\n\n\ndef helper():\n    return 1 / 0", "ZeroDivisionError: division by zero", 4),
        ("return event.nokeys()", "AttributeError: 'PagedEvent' object has no attribute 'nokeys'", 0),
        ("return attention @ attention", "RuntimeError: ", 0),
        ("return attention.sum(-1)", "ValueError: NAME: rank must return a real tensor [L, R, H, N] = ", -2),
    ],
    ids=["deep", "name", "torch", "shape"],
)
def test_fault_in_rank(run_policy, results, caplog, new, said, offset):
    with caplog.at_level(logging.ERROR):
        code, _, err = run_policy(RANK, new)
    assert code == 1
    assert err.count("\n") == 1
    assert err.startswith("error: 2 of 2 samples could not be answered; the first is ")
    assert f": a compression under policy 'NAME' failed: {said}" in err
    (trace,) = results.glob("*.partial/traceback.txt")
    place, _, rest = err.rpartition(" (nothing was recorded; traceback: ")
    assert place.endswith(f" (NAME.py, line {line_of(RANK) + offset})")
    assert rest.endswith("/traceback.txt)\n")
    assert trace.read_text().count("Traceback (most recent call last)") == 1, "two requests, one fault"
    assert not caplog.records, "what the error of a request tells is said once"


def test_attention_without_queries_says_how_to_ask_for_them(run_policy):
    code, _, err = run_policy("    window: ClassVar[int] = 16", "    windows: ClassVar[int] = 16")
    assert code == 1
    assert "ValueError: event.attention needs queries, and the policy asked for none: set num_queries or window" in err
    assert f"(NAME.py, line {line_of('attention = event')})" in err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (RANK, "return attention * * 2", f"loaded: SyntaxError: invalid syntax (NAME.py, line {line_of(RANK)})"),
        (TENSOR, "import nosuch",
         f"loaded: ModuleNotFoundError: No module named 'nosuch' (NAME.py, line {line_of(TENSOR)})"),
        (TENSOR, "raise SystemExit(3)", f"loaded: SystemExit: 3 (NAME.py, line {line_of(TENSOR)})"),
        (METHOD, f"    def __post_init__(self):\n        1 / 0\n\n{METHOD}",
         f"built: ZeroDivisionError: division by zero (NAME.py, line {line_of(METHOD) + 1})"),
        (METHOD, f"    def __post_init__(self):\n        raise ValueError('no')\n\n{METHOD}",
         f"built: ValueError: no (NAME.py, line {line_of(METHOD) + 1})"),
        ("int] = 16", 'int] = "x"', "used: TypeError: '>' not supported between instances of 'str' and 'int'"),
    ],
    ids=["syntax", "import", "exit", "built", "refused", "used"],
)  # fmt: skip
def test_fault_before_the_run(run_policy, old, new, said):
    code, out, err = run_policy(old, new)
    assert (code, out) == (2, "")
    assert err == f"error: engine: policy 'NAME:MyPolicy' cannot be {said}\n"


def test_module_that_is_broken_and_not_imported_is_no_fault(run_policy, tmp_path):
    (tmp_path / "unready.py").write_text("def (")
    code, _, err = run_policy(RANK, f"{RANK}\n        import unready")
    assert (code, err) == (0, "")


def test_fault_of_some_requests_keeps_its_traceback_with_the_record(run_policy, results):
    fails = "FAILS or FAILS.append(event.seeds[0])\n        assert FAILS[0] not in event.seeds"
    code, out, err = run_policy(RANK, f"{fails}\n        {RANK}\n\n\nFAILS = []")
    assert (code, err) == (0, "")
    (path,) = load_runs(results)["path"]
    assert load_requests(path)["error"].notna().sum() == 1
    assert f"(traceback: {path}/traceback.txt)" in out
    assert (Path(path) / "traceback.txt").read_text().count("Traceback (most recent call last)") == 1


def test_options_without_effect_are_said_once(results, monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["run", *SMALL, "workload.max_tokens=4", f"results_dir={results}"])
    assert run.main() == 0
    assert caplog.text.count("never evicts") == 1
