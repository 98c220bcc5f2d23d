"""`policy.bytes_as=NAME`: a budget of as many bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.records import load_runs
from experiments.running.equal_bytes import with_budget
from tests.experiments.running.sweep_helpers import launch_sweep  # noqa: F401
from tests.experiments.running.test_sweep_plans import ROOT

SHAPE = ROOT / "models" / "qwen3-0.6b-shape"
"""A block of 16 entries: 28 layers * 8 heads * 16 * (2 * 128 * 4 + 4 bytes) = 3,684,352 bytes, 14,336 more with scores.
A query slot of 16: 28 * 16 * 16 heads * 128 * 4 = 3,670,016 bytes."""
MODEL = ["model=hf", f"model.path={SHAPE}", "model.load_format=dummy", "hardware=cpu", "engine.block_size=16"]


def found(*overrides: str):
    return with_budget(load_experiment([*MODEL, "policy.budget_tokens=512", *overrides]), SHAPE)


@pytest.mark.parametrize(
    ("overrides", "budget"),
    [
        # (33 * 3,698,688 + 3,670,016) / 3,684,352 = 34.1 blocks
        (["policy=random", "policy.bytes_as=zipage"], 33 * 16),
        # (33 * 3,684,352 - 3,670,016) / 3,698,688 = 31.9 blocks
        (["policy=zipage", "policy.bytes_as=random"], 30 * 16),
        (["policy=zipage", "policy.bytes_as=random", "policy.budget_tokens=500"], 30 * 16),
        (["policy=page_attention", "policy.bytes_as=random"], 31 * 16),
        (["policy=streaming", "policy.bytes_as=page_random"], 512),
        # (40 * 3,698,688 + 3,670,016) / 3,684,352 = 41.2 blocks
        (["policy=random", "policy.bytes_as=zipage", "policy.interval=128"], 33 * 16),
        # (33 * 3,684,352 - 3,670,016 / 2) / 3,698,688 = 32.4 blocks
        (["policy=zipage", "policy.bytes_as=random", "policy.options.window=8"], 31 * 16),
    ],
)
def test_budgets_by_hand(overrides, budget):
    experiment, line = found(*overrides)
    assert (experiment.policy.budget_tokens, experiment.policy.bytes_as) == (budget, None)
    assert f" holds {budget} entries in " in line


def test_nothing_asked_is_nothing_changed():
    experiment = load_experiment([*MODEL, "policy=zipage"])
    assert with_budget(experiment, Path("/nowhere")) == (experiment, None)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["policy=random", "policy.bytes_as=zipge"], "policy.bytes_as=zipge: unknown policy 'zipge'; did you mean"),
        (["policy=random", "policy.bytes_as=full"], "policy.bytes_as=full: policy 'full' never evicts"),
        (["policy.bytes_as=zipage"], "policy.bytes_as='zipage': must be left out: with policy=full"),
        (["policy=random", "policy.bytes_as=zipage", "sampling.budget_tokens=64"], "policy.bytes_as='zipage': must be"),
        (
            ["policy=zipage", "policy.bytes_as=random", "policy.budget_tokens=16", "policy.recent_tokens=0"],
            "policy.bytes_as=random: 7,368,704 bytes are too few for a request: a block of 16 entries kept and an "
            "interval of 16 to come take 11,067,392",
        ),
        (
            ["policy=zipage", "policy.bytes_as=random", "policy.protection=sink:490"],
            "policy.bytes_as=random: its bytes are a budget of 480 here: policy.budget_tokens=480 is less than",
        ),
    ],
)
def test_what_can_not_be_is_named(overrides, line):
    with pytest.raises(UsageError) as caught:
        found(*overrides)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_model_that_can_not_be_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    experiment = load_experiment([*MODEL, "policy=random", "policy.budget_tokens=64", "policy.bytes_as=zipage"])
    with pytest.raises(UsageError, match=r"policy\.bytes_as=zipage: .*architecture 'mamba' is not supported"):
        with_budget(experiment, tmp_path)


def test_a_run_records_the_budget_and_is_the_run_of_it(launch, results, capsys):
    given = [*MODEL, "policy=random"]
    assert launch(*given, "policy.budget_tokens=512", "policy.bytes_as=zipage") == 0
    said = capsys.readouterr().out
    assert "note: policy.bytes_as=zipage: at 512 entries its requests hold up to 119.90 MiB each; random holds" in said
    (run,) = load_runs(results).to_dict("records")
    assert (run["policy.budget_tokens"], run["policy.bytes_as"]) == (528, None)
    assert launch(*given, "policy.budget_tokens=528") == 0
    assert "already done" in capsys.readouterr().out


def test_arms_of_a_sweep_may_name_the_memory_of_the_control(launch_sweep, results, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "bytes.yaml"
    path.write_text(
        "axes: {policy.budget_tokens: 64}\n"
        "arms: [{policy: random}, {policy: [zipage, r_kv, streaming], policy.bytes_as: random}]\n"
    )
    assert launch_sweep(f"+sweep={path}", *MODEL[1:]) == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert "zipage bytes_as=random" in plan
    assert "at 64 entries its requests hold up to 17.57 MiB each; zipage holds 32 entries in 14.08 MiB" in plan
    runs = load_runs(results)
    budgets = dict(zip(runs["policy.name"], runs["policy.budget_tokens"], strict=True))
    assert budgets == {"random": 64, "zipage": 32, "r_kv": 48, "streaming": 64}
    assert runs["policy.bytes_as"].isna().all()
