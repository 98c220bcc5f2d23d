"""What is mistyped: one line that names it and what was meant, whatever the command."""

from __future__ import annotations

import sys

import pytest

from experiments import archive, bench_transformers, regrade, report, run, train_reasoner
from experiments.bench import __main__ as bench

MISTYPED = {
    "--hepl": "--hepl: unknown flag; did you mean --help?",
    "--dry-rn +sweep=demo": "--dry-rn: unknown flag; did you mean --dry-run?",
    "--dry_run +sweep=demo": "--dry_run: unknown flag; did you mean --dry-run?",
    "--cgf job": "--cgf: unknown flag; did you mean --cfg?",
    "--cfg jb": "argument --cfg/-c: invalid choice: 'jb' (choose from",
    "--cfg": "argument --cfg/-c: expected one argument",
    "--limit=3": "--limit: options have no dashes: limit=3",
    "--limit 3": "--limit: options have no dashes: limit=VALUE",
    "-limit=3": "-limit: options have no dashes: limit=3",
    "--policy.budget-tokens 3": "--policy.budget-tokens: options have no dashes: policy.budget_tokens=VALUE",
    "--sweep=demo": "--sweep: options have no dashes: +sweep=demo",
    "--share-model +sweep=demo": "--share-model: options have no dashes: +share_model=true",
    "-limt": "unrecognized arguments: -limt; --help shows how",
    "--zzzzzz": "--zzzzzz: unknown flag; `python -m experiments.run --help` shows all options",
    "limit": "limit: has no value; write limit=VALUE",
    "limt": "limt: has no value; did you mean limit=VALUE?",
    "help": "help: has no value; did you mean --help?",
    "zzzzz": "zzzzz: has no value; write OPTION=VALUE",
    "engine.block_size:16": "engine.block_size:16: has no value; did you mean engine.block_size=VALUE?",
    "limit = 3": "limit: has no value; write limit=VALUE, without spaces",
    "=3": "=3: names no option; write OPTION=VALUE",
    "limit=3,4": "limit=3,4: several values; -m makes a run of each, limit=[3,4] is a list",
    "+sweeps=demo": "sweeps: unknown option; did you mean +sweep?",
    "sweeps=demo": "sweeps: unknown option; did you mean +sweep?",
    "+share_models=true": "share_models: unknown option; did you mean +share_model?",
    "+share_model=true -m policy=full,zipage": "share_model: unknown option; it goes with +sweep=NAME",
    "+arms=[1]": "arms: unknown option; it goes with +sweep=NAME",
    "--arms=[1] +sweep=demo": "--arms: options have no dashes: +arms=[1]",
    "--arms +sweep=demo": "--arms: options have no dashes: +arms=[1,2]",
    "++engine.blok_size=16": "engine.blok_size: unknown option; did you mean engine.block_size?",
    "engine.block-size=16": "engine.block-size: unknown option; did you mean engine.block_size?",
    "policy=zippage": "policy=zippage: no such choice; did you mean zipage? (choices: ",
    "model=/no/such": "model=/no/such: no such choice; did you mean model=hf model.path=/no/such? (choices: ",
    "model=a.gguf": "model=a.gguf: no such choice; did you mean model=gguf model.path=a.gguf? (choices: ",
    "model=Qwen/Qwen3-0.6B": "model=Qwen/Qwen3-0.6B: no such choice; did you mean model=hf model.path=Qwen/Qwen3-0.6B?",
    "policy=mine:Mine": "policy=mine:Mine: no such choice; did you mean policy.name=mine:Mine? (choices: ",
    "policy=": "policy=: no such choice (choices: ",
    "polcy=zipage": "polcy: unknown option; did you mean policy?",
    "~polcy": "~polcy: unknown option; did you mean policy?",
    "+sweep=[]": "+sweep=[]: must be one sweep, or several joined as +sweep=[a,b]",
    "+sweep=[demo,]": "+sweep=[demo,]: must be one sweep, or several joined as +sweep=[a,b]",
    "+sweep=nowhere.yaml": "sweep=nowhere.yaml: no such sweep: there is no such file",
    "+sweep=bugdet": "sweep=bugdet: no such sweep; did you mean budget? (choices: ",
    "+sweep=zzzz": "sweep=zzzz: no such sweep (choices: ",
    "results_dir=": "results_dir='': must be given: a folder",
}


@pytest.mark.parametrize("typed", MISTYPED)
def test_mistyped_run_is_one_line(typed, launch, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", *typed.split()])
    assert run.main({}) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {MISTYPED[typed]}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_overrides_may_stand_on_both_sides_of_a_flag(launch, results, capsys):
    assert launch("seed=3", "--cfg", "job", "limit=2") == 0
    shown = capsys.readouterr().out
    assert "\nseed: 3\n" in shown
    assert "\nlimit: 2\n" in shown
    assert launch("policy=full", "-m", "seed=0,1") == 0
    assert len(list(results.glob("*/metrics.json"))) == 2


@pytest.mark.parametrize("written", ["+sweep=", "++sweep=", "sweep="])
def test_a_sweep_is_asked_for_with_any_number_of_plus_signs(written, launch, tmp_path, capsys):
    (tmp_path / "one.yaml").write_text("axes: {policy: full}")
    assert launch(f"{written}{tmp_path}/one.yaml", "--dry-run") == 0
    assert capsys.readouterr().out.startswith("sweep one: 1 arm, ")


@pytest.mark.parametrize(
    ("command", "typed", "line"),
    [
        (report, "--widee", "--widee: unknown flag; did you mean --wide?"),
        (report, "--margn=0.1", "--margn: unknown flag; did you mean --margin?"),
        (report, "--margin x", "argument --margin: invalid float value: 'x'; --help shows how"),
        (report, "--html", "argument --html: expected one argument; --help shows how"),
        (report, "-x", "unrecognized arguments: -x; --help shows how"),
        (regrade, "--gradr math", "--gradr: unknown flag; did you mean --grader?"),
        (regrade, "", "the following arguments are required: runs; --help shows how"),
        (regrade, "--grader mth .", "--grader mth: must be one of number, math"),
        (archive, "runs --too folder", "--too: unknown flag; did you mean --to?"),
        (bench, "run --pictur x", "run: no record of a benchmark ("),  # an abbreviation
        (bench, "run --picturr x", "--picturr: unknown flag; did you mean --picture?"),
        (bench_transformers, "--bach 3", "--bach: unknown flag; did you mean --batch?"),
        (train_reasoner, "--zzzzz", "--zzzzz: unknown flag; there are --help, --out, --device, "),
    ],
)
def test_mistyped_flag_of_any_command_is_one_line(command, typed, line, capsys):
    try:
        code = command.main(typed.split())
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1
