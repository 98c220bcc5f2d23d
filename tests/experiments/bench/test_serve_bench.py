"""`scenario=serve_bench`: its loads, its rows, and what becomes of servers that fail."""

# ruff: noqa: F811

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from experiments.backends import BACKENDS
from experiments.bench import __main__ as show
from experiments.bench import serve
from experiments.bench.serve_loads import LOADS, read_served_arms, shortened
from experiments.errors import UsageError
from experiments.paths import ROOT
from experiments.records import load_rows
from experiments.records.sources import of_benchmarks
from tests.child_processes import wait_for_end
from tests.experiments.bench.bench_runs import bench, record_of, tiny  # noqa: F401
from tests.experiments.running.test_tracking import no_key  # noqa: F401
from tests.experiments.serving.test_server import FAKE

LOAD = """
lengths: {count: 4, prompt_tokens: 20, output_tokens: 10}
rates: [10]
slo: {ttft: 0.5, itl: 0.2}
warmup: 0.1
seconds: 0.5
drain: 1
patience: 0.5
warmup_requests: 1
engine: {block_size: 16, num_blocks: 32, max_num_seqs: 4, max_model_len: 256}
arms:
  full: {}
"""
MORE = LOAD + "  zipage: {policy: zipage, budget_tokens: 32}\n"


def arms_of(path: Path | str, changes=None, trace=None, **given):
    return read_served_arms(
        [str(path)], model="m", load_format="dummy", has_tokenizer=False, given=given, changes=changes or {},
        trace=trace, seed=0, backends=BACKENDS,
    )  # fmt: skip


@pytest.fixture
def load(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "load.yaml"
        path.write_text(text)
        return path

    return write


# Loads


@pytest.mark.parametrize("path", sorted(LOADS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_loads_can_be_read(path):
    trace = str(ROOT / "examples" / "traffic.csv") if "trace" in path.stem else None
    arms = arms_of(path.stem, trace=trace, device="cuda")
    assert arms
    assert all(arm.requests for arm in arms)


def test_arrivals_of_a_trace_keep_their_shape_at_any_rate(load, tmp_path):
    (tmp_path / "t.csv").write_text("arrival,prompt_tokens,output_tokens\n5,10,3\n6,20,900\n9,30,5\n")
    text = LOAD.replace("{count: 4, prompt_tokens: 20, output_tokens: 10}", "{trace: null, longest: 100}")
    (arm,) = arms_of(load(text + "arrivals: trace\n"), trace=str(tmp_path / "t.csv"))
    assert [request.output_tokens for request in arm.requests] == [3, 100, 5]
    found = arm.arriving(3.0)
    # it goes round until the drain is over, at 1.6 s
    assert [round(request.due, 3) for request in found] == [0, 0.167, 0.667, 1, 1.167]
    assert [request.prompt_tokens for request in found[:4]] == [10, 20, 30, 10]
    assert [round(request.due, 3) for request in arm.arriving(6.0)[:3]] == [0, 0.083, 0.333]


def test_arrivals_of_a_poisson_process_are_the_same_at_any_rate_but_faster(load):
    (arm,) = arms_of(load(LOAD.replace("seconds: 0.5", "seconds: 100")))
    slow, fast = arm.arriving(5.0), arm.arriving(10.0)
    assert len(slow) / 101.1 == pytest.approx(5.0, rel=0.15)
    assert [2 * request.due for request in fast[:50]] == pytest.approx([request.due for request in slow[:50]])


def test_a_server_may_begin_as_full_as_the_rate_makes_it(load):
    text = MORE.replace("output_tokens: 10", "output_tokens: 100").replace("warmup: 0.1", "warmup: 10")
    full, zipage = arms_of(load(text), {"begun": 0.02})
    found = full.arriving(5.0)
    begun = [request for request in found if request.output_tokens < 100]
    assert len(begun) == 10, "five a second, two seconds each"
    assert [request.output_tokens for request in begun] == [95, 85, 75, 65, 55, 45, 35, 25, 15, 5]
    assert all(request.prompt_tokens + request.output_tokens == 120 for request in begun)
    assert [request.due for request in begun] == pytest.approx([0.7 * i for i in range(10)])
    assert found == sorted(found)
    bounded = [request for request in zipage.arriving(5.0) if request.output_tokens < 100]
    assert [request.output_tokens for request in bounded] == [request.output_tokens for request in begun]
    assert max(request.prompt_tokens for request in bounded) <= 32 + 16, "the entries that it would hold"


def test_the_warm_up_has_short_outputs(load):
    (arm,) = arms_of(load(LOAD + "warmup_tokens: 4\n"), {"warmup_requests": 2})
    assert [request.output_tokens for request in shortened(arm)] == [4, 4]


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        (LOAD + "rate: 3\n", {}, "unknown option rate; known: lengths"),
        (LOAD, {"rats": [1]}, "scenario.options: unknown option rats"),
        (LOAD, {"arms": {}}, "scenario.options.arms: give a YAML file"),
        (LOAD, {"rates": [0]}, r"rates=\[0\]: must be a list of requests a second"),
        (LOAD, {"rates": []}, "must be given, or `search` or `streams`"),
        (LOAD, {"search": {"low": 2, "high": 1, "steps": 3}}, "search=.*low below high"),
        (LOAD, {"search": {"low": 1}}, "search=.*must be {low"),
        (LOAD, {"slo": {"tttf": 1}}, "slo=.*seconds by name: ttft, itl"),
        (LOAD, {"seconds": 0}, "seconds=0: must be seconds, at least 0.1"),
        (LOAD, {"begun": 0}, "begun=0: must be seconds a token"),
        (LOAD, {"begun": 0.02, "warmup": 0}, "begun=0.02: must be seconds a token, beside a warmup"),
        (MORE.replace("32}", "32, protection: prompt}"), {"begun": 0.02}, "arms.zipage: protection=prompt"),
        (LOAD, {"patience": "long"}, "patience='long': must be seconds"),
        (LOAD, {"streams": 0}, "streams=0: must be a whole number from 1"),
        (LOAD, {"warmup_tokens": -1}, "warmup_tokens=-1: must be a whole number"),
        (LOAD, {"arrivals": "trace"}, "arrivals='trace': must be poisson"),
        (LOAD, {"arrivals": "soon"}, "must be trace or poisson"),
        (LOAD, {"at_break_of": "fall"}, "at_break_of='fall': must be an arm: full"),
        (LOAD, {"temperature": -1}, "temperature=-1"),
        (LOAD, {"lengths": {"trace": None}}, "lengths: unknown option output_tokens"),
        (LOAD.replace("full: {}", "full: {polcy: zipage}"), {}, "arms.full: LLM: unknown option"),
        (LOAD.replace("full: {}", "full: {seed: 3}"), {}, "arms.full: seed=3: leave it out"),
        (LOAD.replace("full: {}", "full: {backend: transformers}"), {}, "backend=transformers: has no server"),
        (LOAD.replace("full: {}", "full: {flags: 3}"), {}, "own flags must be a mapping, not 3"),
        (LOAD.replace("full: {}", "full: {backend: vllm}"), {}, "num_blocks=32: backend=vllm has blocks of its own"),
        ("lengths: {trace: null}\nrates: [1]\narms: {full: {}}", {}, "takes a trace: scenario.path=FILE"),
        ("arms: {}", {}, "must have a mapping `arms`"),
    ],
)  # fmt: skip
def test_what_a_load_cannot_be_is_refused(load, text, changes, reason):
    with pytest.raises(UsageError, match=reason):
        arms_of(load(text), changes)


def test_a_trace_that_nothing_takes_is_refused(load):
    with pytest.raises(UsageError, match="none of the loads takes a trace"):
        arms_of(load(LOAD), trace=str(ROOT / "examples" / "traffic.csv"))


def test_options_of_the_command_change_single_limits(load):
    (arm,) = arms_of(load(LOAD), {"slo": {"itl": 0.1}, "rates": [1, 2]})
    assert arm.spec.slo == {"ttft": 0.5, "itl": 0.1}
    assert arm.spec.rates == [1, 2]


# Runs, with a server of known delays in the place of real ones


@pytest.fixture
def faked(monkeypatch):
    """Each arm's server is a fake with the options that are given by the arm's policy."""

    def fake(**by_policy):
        def command(backend, options, port, flags):
            own = by_policy.get(options.get("policy", "full"), {})
            return [*FAKE, str(port), json.dumps(own)], {}

        monkeypatch.setattr(serve, "command", command)

    return fake


def run(bench, load, results, *arguments) -> tuple[int, pd.DataFrame]:
    code = bench("scenario=serve_bench", f"scenario.loads=[{load}]", "scenario.repeats=1", *arguments)
    return code, load_rows(record_of(results))


def test_rates_are_measured_and_recorded(bench, results, tiny, load, faked, tmp_path, capsys):
    faked(full={"slots": 3, "first": 0.05, "step": 0.02}, zipage={"first": 0.05, "step": 0.01})
    text = MORE.replace("ttft: 0.5", "ttft: 0.25") + "search: {low: 10, high: 40, steps: 1}\nat_break_of: full\n"
    code, rows = run(bench, load(text), results, f"model.path={tiny}")
    assert code == 0
    assert rows["refused"].isna().all()
    full = rows[rows["arm"] == "full"].set_index("rate")
    assert list(full.index) == [10, 40, 20]
    assert list(full["slo_holds"]) == [True, False, False], "three at a time, 0.25 s each: 12 a second"
    assert full["broken"][40]
    zipage = rows[rows["arm"] == "zipage"].set_index("rate")
    assert list(zipage.index) == [10, 40, 20], "also where full KV broke"
    assert zipage["slo_holds"].all()
    assert zipage["ttft"][10]["p50"] == pytest.approx(0.05, abs=0.04)
    out = capsys.readouterr().out
    assert "10 requests/s: " in out
    assert "limits hold" in out
    shown = [line.split() for line in out.splitlines()]
    assert ["|", "load", "|", "zipage", "|", "40", "|", "|"] in shown
    record = record_of(results)
    picture = tmp_path / "traffic.svg"
    assert show.main([str(record), "--against", "full", "--picture", str(picture)]) == 0
    assert "4.00" in capsys.readouterr().out
    assert picture.stat().st_size > 0
    provenance = json.loads((record / "provenance.json").read_text())
    assert {"code", "command", "versions", "hardware", "sources"} <= provenance.keys()
    assert bench("scenario=serve_bench", f"scenario.loads=[{load(text)}]", "scenario.repeats=1",
                 f"model.path={tiny}") == 0  # fmt: skip
    assert "already done" in capsys.readouterr().out


def test_wandb_has_the_rows_and_the_picture(bench, results, tiny, load, faked, no_key, capsys):
    faked()
    code, _ = run(bench, load(LOAD), results, f"model.path={tiny}", "tracking=wandb_offline")
    assert code == 0
    assert "tracking: wandb failed" not in capsys.readouterr().out
    (stored,) = (results / "wandb").glob("offline-run-*/*.wandb")
    for text in (b"row/goodput", b"row/ttft.p99", b"record-serve_bench", b"pictures/benchmark"):
        assert text in stored.read_bytes()
    assert list((results / "wandb").rglob("benchmark*.png"))


def test_arms_fail_alone(bench, results, tiny, load, faked):
    faked(full={"dies_after": 3}, zipage={"unready": True}, random={})
    text = MORE + "  last: {policy: random, budget_tokens: 32}\nstartup: 4.0\n"
    code, rows = run(bench, load(text), results, f"model.path={tiny}")
    assert code == 1
    reasons = rows.set_index("arm")["refused"]
    assert "the server ended (RuntimeError: the fake is dead); its last lines: listening on" in reasons["full"]
    assert "the server is not ready after 4 s" in reasons["zipage"]
    assert pd.isna(reasons["last"])
    assert rows.set_index("arm")["finished"]["last"] > 0


def test_a_server_that_answers_nothing_is_refused(bench, results, tiny, load, faked):
    faked(full={"status": 429})
    code, rows = run(bench, load(LOAD), results, f"model.path={tiny}")
    assert code == 1
    assert rows["refused"][0] == "the server answers no request: status 429: too many requests"


def test_ctrl_c_leaves_rows_and_no_process(results, tiny, load):
    """As a program: the rate that was done is recorded, and no server or client lives on."""
    path = load(MORE.replace("rates: [10]", "rates: [10, 11]").replace("seconds: 0.5", "seconds: 1"))
    program = (
        "import json, sys\nimport tests.experiments.running.no_torch\nfrom experiments.bench import serve\n"
        "from experiments.run import main\n"
        f"serve.command = lambda backend, options, port, flags: ([*{FAKE!r}, str(port), '{{}}'], {{}})\n"
        "sys.exit(main())"
    )
    arguments = ["scenario=serve_bench", "hardware=cpu", f"model.path={tiny}", f"scenario.loads=[{path}]"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, f"results_dir={results}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, process_group=0,
    )  # fmt: skip
    while "10 requests/s" not in (line := process.stdout.readline()):
        assert line, "it ended"
    time.sleep(0.5)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) == 2, "a server's guard and a client"
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert "interrupted: what was measured is recorded" in out
    wait_for_end(children)
    rows = load_rows(record_of(results))
    assert list(rows["refused"].fillna("")) == ["", "interrupted", "interrupted"]


def test_records_know_the_code_of_server_and_client(other_code):
    before = of_benchmarks("serve_bench")
    assert before.keys() == {"engine", "client"}
    other_code("experiments/serving/drive.py")
    assert of_benchmarks("serve_bench")["client"] != before["client"]
    assert of_benchmarks("engine_bench").keys() == {"engine"}


# The real thing


def test_our_server_under_load(bench, results, tiny, load):
    """A model of random weights on a CPU: rates, and streams beside the engine without HTTP."""
    text = LOAD.replace("full: {}", "zipage: {policy: zipage, budget_tokens: 32}").replace(
        "output_tokens: 10", "output_tokens: 60"
    )
    code, rows = run(bench, load(text + "streams: 4\nwarmup_tokens: 40\n"), results, f"model.path={tiny}")
    assert code == 0, rows.get("refused")
    streams, rate = rows.to_dict("records")
    assert (streams["streams"], rate["rate"]) == (4, 10)
    assert (streams["finished"], streams["short"], streams["failed"]) == (4, 0, 0)
    assert streams["of_offline"] == pytest.approx(streams["tokens_per_second"] / streams["offline"])
    assert rate["finished"] + rate["aborted"] == rate["sent"] > 0
    assert rate["left"] == 0
    assert streams["compressions"] > 0
