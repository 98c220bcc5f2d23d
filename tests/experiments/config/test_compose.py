"""What is composed once for many arms is what Hydra makes of each."""

from __future__ import annotations

import shutil

import pytest

from experiments.config import compose as module
from experiments.config.arms import expand
from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.paths import CONF

SWEEPS = ("small", "policy", "speed", "reasoner", "ablation_async", "paper_table1", "qwen_gsm8k", "qwen_turns")


def told(overrides):
    try:
        return load_experiment(overrides)
    except UsageError as error:
        return str(error)


@pytest.fixture
def both(monkeypatch):
    """What comes of overrides, what Hydra alone makes of them, and whether it was asked beside the choices."""

    def both(overrides):
        with monkeypatch.context() as patch:
            asked, compose = [], module.compose
            patch.setattr(
                module, "compose", lambda *args, overrides: (asked.append(overrides), compose(*args, overrides))[1]
            )
            ours = told(overrides)
            left_to_hydra = any(given == [*map(module._as_written, overrides)] for given in asked[-1:])
            patch.setattr(module, "_split", lambda overrides: None)
            return ours, told(overrides), left_to_hydra

    return both


@pytest.mark.parametrize("sweep", SWEEPS)
def test_arms_are_what_hydra_makes_of_them(both, sweep):
    arm = ["model=reasoner", "policy.protection=prompt", *expand([sweep])[-1]]
    ours, hydras, left_to_hydra = both(arm)
    assert ours == hydras
    assert not left_to_hydra


@pytest.mark.parametrize(
    "overrides",
    [
        ["policy=full", "policy=zipage", "policy.budget_tokens=64", "policy.budget_tokens=128"],
        ["policy='zipage'", "policy.options={chunk: 32}", "policy.options.alpha=0.5"],
        ["workload=jsonl", "workload.path='a b,c.jsonl'", "workload.subset=1.10", "limit=null"],
        ["scenario=engine_bench", "scenario.loads=[ample,short]", "sampling.top_p=0.5"],
        ["scenario=steady", "model=reasoner", "policy=zipage", "seed=3"],  # decides more than its group
        ["workload=lengths", "policy=zipage", "seed=3"],
        ["seed=3", "model=hf", 'model.path="x\\ty"', "results_dir=${model.path}/runs"],
    ],
)
def test_plain_options_are_set_as_by_hydra(both, overrides):
    ours, hydras, left_to_hydra = both(overrides)
    assert not isinstance(ours, str), ours
    assert ours == hydras
    assert not left_to_hydra


@pytest.mark.parametrize(
    "overrides",
    [
        ["+policy.options.chunk=32", "policy=zipage"],
        ["~policy.options", "policy=zipage"],
        ["policy={name: zipage, budget_tokens: 64}", "policy.budget_tokens=128"],
        ["hydra.job.chdir=true"],
        ["policy@workload=zipage"],
        ["policy=zipage,full"],
        ["policy=[zipage,full]"],
        ["polcy=zipage"],
        ["policy=zipagee"],
        ["policy.budget=3"],
        ["policy.budget_tokens=many"],
        ["policy.budget_tokens=-1"],
        ["model=hf"],
        ["sweep=demo"],
        ["seed"],
        ["seed=[1"],
        ["results_dir=${nothing}"],
        ["engine.block_size=???"],
    ],
)
def test_what_is_out_of_the_ordinary_is_hydras(both, overrides):
    ours, hydras, _ = both(overrides)
    assert ours == hydras


def test_a_config_file_that_changes_is_read_again(monkeypatch, tmp_path):
    conf = shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr(module, "CONF", conf)
    assert load_experiment(["policy=zipage"]).policy.budget_tokens == 512
    file = conf / "policy" / "zipage.yaml"
    file.write_text(file.read_text().replace("512", "320"))
    assert load_experiment(["policy=zipage"]).policy.budget_tokens == 320
    (conf / "policy" / "mine.yaml").write_text(file.read_text())
    assert load_experiment(["policy=mine"]).policy.budget_tokens == 320


def test_arms_of_equal_choices_do_not_change_each_other():
    first = load_experiment(["policy=zipage", "policy.options.chunk=32"])
    assert "chunk" not in load_experiment(["policy=zipage"]).policy.options
    assert first.policy.options["chunk"] == 32
