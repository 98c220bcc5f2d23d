"""Every config file composes; wrong options are named; nothing of the engine is left out."""

from __future__ import annotations

import sys
from dataclasses import FrozenInstanceError, fields

import pytest

from experiments import run
from experiments.errors import UsageError
from experiments.paths import CONF
from experiments.schema import FIXED, HOMES, EngineOptions, engine_options, load_experiment, to_dict
from zipage import EngineConfig, SamplingParams

CHOICES = sorted(
    (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if not path.is_relative_to(CONF / "hydra")
)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_config_file_composes(group, choice):
    given = {"model": ["model.path=folder"], "workload": ["workload.path=file.jsonl"]}.get(group, [])
    experiment = load_experiment([f"{group}={choice}", *given])
    assert to_dict(experiment)[group]


def test_engine_options_are_those_of_the_engine():
    options = engine_options(load_experiment(), "folder")
    assert set(options) == {f.name for f in fields(EngineConfig)}
    EngineConfig(**options)


def test_defaults_are_those_of_the_engine():
    ours, theirs = vars(EngineConfig(**engine_options(load_experiment(), "folder"))), vars(EngineConfig(model="folder"))
    assert ours == theirs


def test_every_engine_option_can_be_set_and_arrives():
    values = {
        "model": "folder",
        "load_format": "dummy",
        "dtype": "float16",
        "device": "cpu",
        "seed": 3,
        "tensor_parallel_size": 1,
        "block_size": 32,
        "num_blocks": 77,
        "gpu_memory_utilization": 0.5,
        "max_model_len": 77,
        "max_num_seqs": 77,
        "max_num_batched_tokens": 4096,
        "policy": "full",
        "policy_options": {},
        "budget_tokens": 77,
        "protection": "sink:4",
        "trigger": "pressure",
        "scheduling": "constrained",
    }
    left = {f.name: f.default for f in fields(EngineConfig) if f.name not in values and f.name not in FIXED}
    values |= {name: not default for name, default in left.items() if isinstance(default, bool)}
    untouched = {name for name, default in left.items() if not isinstance(default, bool)}
    assert untouched == {"kv_cache_memory_bytes"}, "set it here; this one excludes num_blocks"
    options = [f"{HOMES.get(name, f'engine.{name}')}={value}" for name, value in values.items()]
    experiment = load_experiment(["model=hf", *options])
    assert engine_options(experiment, "folder") == values | FIXED | {"kv_cache_memory_bytes": None}


def test_sampling_options_are_those_of_the_engine():
    experiment = load_experiment(["sampling.stop=[x]"])
    assert set(vars(experiment.sampling)) == set(SamplingParams.names())
    params = SamplingParams(**vars(experiment.sampling))
    assert params.stop == ("x",)
    assert params.temperature == 0


def test_workload_sets_the_defaults_of_sampling():
    experiment = load_experiment(["workload=gsm8k", "workload.samples=3"])
    assert experiment.sampling.n == 3
    assert experiment.sampling.max_tokens == experiment.workload.max_tokens == 512
    assert load_experiment(["sampling.max_tokens=9"]).sampling.max_tokens == 9


def test_the_result_is_frozen():
    experiment = load_experiment()
    assert isinstance(experiment.engine, EngineOptions)
    with pytest.raises(FrozenInstanceError):
        experiment.limit = 3
    with pytest.raises(FrozenInstanceError):
        experiment.engine.block_size = 16


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("engine.blok_size=16", "engine.blok_size: unknown option; did you mean engine.block_size?"),
        ("block_size=16", "block_size: unknown option; did you mean engine.block_size?"),
        ("+engine.wheels=4", "engine.wheels: unknown option; "),
        ("+limits=4", "limits: unknown option; did you mean limit?"),
        ("modell=smollm2", "modell: unknown option; did you mean model?"),
        ("model=smollm", "model=smollm: no such choice; did you mean smollm2? (choices: dummy, gguf, hf, smollm2)"),
        ("engine.seed=3", "engine.seed: set it as seed=..."),
        ("engine.policy=full", "engine.policy: set it as policy.name=..."),
        ("engine.skip_tokenizer_init=true", "engine.skip_tokenizer_init: is always False here"),
        ("engine.block_size=big", "engine.block_size: Value 'big' of type 'str' could not be converted to Integer"),
        ("sampling.temperature=hot", "sampling.temperature: Value 'hot' of type 'str'"),
        ("limit=1.5", "limit: Value '1.5' of type 'float' could not be converted to Integer"),
        ("sampling.stop=x", "sampling.stop: Invalid value assigned"),
        ("sampling.temperature=-1", "sampling: SamplingParams.temperature=-1.0: must be"),
        ("engine.block_size=20", "engine: block_size=20: must be a power of two"),
        ("limit=0", "limit=0: must be at least 1"),
        ("scenario.arrival=never", "scenario.arrival='never': must be all_at_once or poisson"),
        ("scenario.arrival=poisson", "scenario.rate=None: must be arrivals a second"),
        ("tracking.backend=paper", "tracking.backend='paper': must be none or wandb"),
        ("hardware.threads=0", "hardware.threads=0: must be at least 1"),
        ("workload.template=hello", "workload.template='hello': must be a text that holds {question}"),
        ("workload=jsonl", "workload.path=None: must be given"),
        ("model=hf", "model.path=None: must be given"),
        ("seed=${nothing}", "seed: Interpolation key 'nothing' not found"),
        ("nonsense", "nonsense: "),
        ("limit=[", "limit=[: "),
    ],
)
def test_wrong_options_are_named_in_one_line(option, line):
    with pytest.raises(UsageError) as caught:
        load_experiment([option])
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_command_line_names_the_wrong_option_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "engine.blok_size=16"])
    assert run.main() == 2
    captured = capsys.readouterr()
    assert captured.err == "error: engine.blok_size: unknown option; did you mean engine.block_size?\n"


def test_help_explains_every_group_and_choice(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "--help"])
    with pytest.raises(SystemExit) as caught:
        run.main()
    assert caught.value.code == 0
    words = set(capsys.readouterr().out.replace(",", " ").split())
    for group, choice in CHOICES:
        assert {group, choice} <= words, f"{group}={choice}"


def test_all_options_can_be_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "--cfg", "job"])
    assert run.main() == 0
    assert "block_size: 256" in capsys.readouterr().out
