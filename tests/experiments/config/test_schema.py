"""Every config file composes; wrong options are named; nothing of the engine is left out."""

from __future__ import annotations

import shutil
import sys
from dataclasses import FrozenInstanceError, fields

import pytest

from experiments import run
from experiments.config import compose
from experiments.config.compose import load_experiment
from experiments.config.known import is_list_of_texts, is_text
from experiments.config.schema import FIXED, HOMES, UNRECORDED, EngineOptions, Experiment, engine_options, to_dict
from experiments.errors import UsageError
from experiments.paths import CONF
from experiments.records import flatten
from tests.calibrations import CALIBRATED
from zipage import EngineConfig, SamplingParams
from zipage.eviction import registry

LOADS = ("bench", "serve_bench")
"""No groups: their files are the loads of benchmarks, which test_bench_loads.py and test_serve_bench.py read."""
MACHINES = "machine"
"""Nor are these: tests/experiments/simulation reads them."""
CHOICES = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("hydra", MACHINES, *LOADS)
)

GROUPS = [(group, choice) for group, choice in CHOICES if group != "sweep"]
"""Sweeps are no part of a run's config: tests/experiments/config/test_arms.py composes their arms."""


FILE = ["policy.options.calibration=file"]


@pytest.mark.parametrize(("group", "choice"), GROUPS)
def test_every_config_file_composes(group, choice):
    given = {
        "model": ["model.path=folder"],
        "workload": ["workload.path=file.jsonl"],
        "scenario": ["scenario.path=file.jsonl"],
        "policy": FILE if choice in CALIBRATED else [],
    }.get(group, [])
    experiment = load_experiment([f"{group}={choice}", *given])
    assert getattr(experiment, group)


def test_every_policy_has_a_config_file():
    given = {choice: FILE if choice in CALIBRATED else [] for group, choice in CHOICES if group == "policy"}
    configs = {choice: load_experiment([f"policy={choice}", *more]).policy for choice, more in given.items()}
    assert set(configs) == {*registry.POLICIES, "random_attention"}
    for choice, policy in configs.items():
        assert policy.name == ("random" if choice == "random_attention" else choice)
        assert policy.protection == ("prompt" if choice == "random_attention" else "none")
        assert policy.budget_tokens == (None if choice == "full" else 512)
        assert not policy.options or given[choice] or choice.startswith("page_"), (
            "an option's default belongs to the policy"
        )


@pytest.mark.parametrize("policy", ["page_attention", "page_random"])
def test_pages_are_blocks_whatever_their_size(policy):
    assert load_experiment([f"policy={policy}"]).policy.options == {"page_size": 256}
    assert load_experiment([f"policy={policy}", "engine.block_size=16"]).policy.options == {"page_size": 16}
    emulated = load_experiment([f"policy={policy}", "policy.options.page_size=64", "policy.options.native=false"])
    assert emulated.policy.options == {"page_size": 64, "native": False}


def test_options_of_a_policy_are_free_and_arrive():
    options = ["policy.options.alpha=0.9", "policy.options.lambda=0.3", "policy.options.global=false"]
    experiment = load_experiment(["policy=zipage", *options, "+policy.options.tau=1"])
    assert engine_options(experiment, "folder")["policy_options"] == {
        "alpha": 0.9,
        "lambda": 0.3,
        "global": False,
        "tau": 1,
    }


def test_policy_of_ones_own(monkeypatch):
    monkeypatch.setattr(registry, "POLICIES", dict(registry.POLICIES))
    own = ["policy.name=examples.my_policy:MyPolicy", "policy.budget_tokens=256"]
    policy = load_experiment([*own, "policy.options.power=2"]).policy
    assert (policy.name, policy.options) == ("examples.my_policy:MyPolicy", {"power": 2})
    with pytest.raises(UsageError, match="policy 'my_policy': unknown option 'pwer'; did you mean power"):
        load_experiment([*own, "policy.options.pwer=2"])


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
        "data_parallel_size": 2,
        "block_size": 32,
        "num_blocks": 77,
        "gpu_memory_utilization": 0.5,
        "swap_space": 1.5,
        "max_model_len": 77,
        "max_num_seqs": 77,
        "max_num_batched_tokens": 4096,
        "policy": "full",
        "policy_options": {},
        "budget_tokens": 77,
        "interval": 77,
        "protection": "sink:4",
        "allocation": "pyramid",
        "allocation_options": {},
        "recent_tokens": 7,
        "layer_stride": 3,
        "trigger": "pressure",
        "scheduling": "constrained",
        "async_scheduling": True,
    }
    left = {f.name: f.default for f in fields(EngineConfig) if f.name not in values and f.name not in FIXED}
    values |= {name: not default for name, default in left.items() if isinstance(default, bool)}
    untouched = {name for name, default in left.items() if not isinstance(default, bool)}
    assert untouched == {"kv_cache_memory_bytes"}, "set it here; this one excludes num_blocks"
    options = [f"{HOMES.get(name, f'engine.{name}')}={value}" for name, value in values.items()]
    experiment = load_experiment(["model=hf", *options])
    assert engine_options(experiment, "folder") == values | FIXED | {"kv_cache_memory_bytes": None}


def test_an_allocation_and_its_options_arrive():
    unequal = ["policy=snapkv", "policy.allocation=adaptive", "engine.enable_prefix_caching=false"]
    experiment = load_experiment([*unequal, "policy.allocation_options.alpha=0.3"])
    assert engine_options(experiment, "folder")["allocation_options"] == {"alpha": 0.3}
    with pytest.raises(
        UsageError, match="allocation_options of 'adaptive': unknown option 'alhpa'; did you mean alpha"
    ):
        load_experiment([*unequal, "policy.allocation_options.alhpa=0.3"])
    with pytest.raises(UsageError, match=r"enable_prefix_caching=True: must be False with .*allocation='adaptive'"):
        load_experiment(unequal[:2])


def test_sampling_options_are_those_of_the_engine():
    experiment = load_experiment(["sampling.stop=[x]"])
    assert set(vars(experiment.sampling)) == set(SamplingParams.names()) - set(UNRECORDED)
    params = SamplingParams(**vars(experiment.sampling))
    assert params.stop == ("x",)
    assert params.temperature == 0


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("model.revision=12e4567", "12e4567"),
        ("model.name=0123", "0123"),
        ("workload.subset=1.10", "1.10"),
        ("workload.subset=true", "true"),
        ("workload.subset='1.10'", "1.10"),
        ("workload.subset= 1.10 ", "1.10"),
        ("workload.subset=null", None),
        ("workload.subset='null'", "null"),
        ("workload.subset=", ""),
        ("tracking.group=1_000", "1_000"),
        ("tracking.tags=[1.10,v2,1e3]", ["1.10", "v2", "1e3"]),
        ("results_dir=2e10", "2e10"),
        ("scenario.path=nan", "nan"),
        (r'sampling.stop=["\n\n"]', ("\n\n",)),
        (r"sampling.stop=['\n',1.10,x]", (r"\n", "1.10", "x")),
        (r'workload.template="{question}\nSay \"it\":\t\\n \boxed{}"', '{question}\nSay "it":\t\\n \\boxed{}'),
        (r"workload.template='{question} \nu \boxed{}'", r"{question} \nu \boxed{}"),
        ("+workload.parts.aime.revision=12e4567", "12e4567"),
        ("workload.parts={aime: {revision: 12e4567, seed: 3}}", {"aime": {"revision": "12e4567", "seed": 3}}),
    ],
)
def test_text_fields_get_the_text_that_was_written(option, text):
    key = option.partition("=")[0].lstrip("+")
    value = to_dict(load_experiment([option]))
    for part in key.split("."):
        value = value[part]
    assert value == (list(text) if isinstance(text, tuple) else text)


def test_every_text_field_is_known_as_one():
    texts = {name for name in flatten(to_dict(Experiment())) if is_text(name)}
    assert {
        "model.revision",
        "workload.subset",
        "policy.protection",
        "hardware.device",
        "backend",
        "results_dir",
    } <= texts
    assert {"sampling.stop", "sampling.bad_words", "tracking.tags", "scenario.loads"} == {
        name for name in texts if is_list_of_texts(name)
    }
    assert not texts & {"seed", "limit", "engine.block_size", "sampling.temperature", "engine.enforce_eager"}
    strings = {name for name, value in flatten(to_dict(load_experiment())).items() if isinstance(value, str)}
    assert strings - texts == set()


def test_numbers_and_free_options_are_what_hydra_reads():
    experiment = load_experiment(["sampling.temperature=1e-1", "workload.options.count=1_0", "seed=007"])
    assert (experiment.sampling.temperature, experiment.workload.options["count"], experiment.seed) == (0.1, 10, 7)


def test_command_line_gets_the_text_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "workload.subset=1.10", "--cfg", "job"])
    assert run.main() == 0
    assert "subset: '1.10'" in capsys.readouterr().out


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
        ("engin.block_size=16", "engin: unknown option; did you mean engine?"),
        ("sampling.block_size=16", "sampling.block_size: unknown option; did you mean engine.block_size?"),
        ("sampling.max_new_tokens=4", "sampling.max_new_tokens: unknown option; did you mean sampling.max_tokens?"),
        ("max_tokens=4", "max_tokens: unknown option; did you mean sampling.max_tokens or workload.max_tokens?"),
        ("budget_tokens=4", "budget_tokens: unknown option; did you mean policy.budget_tokens or sampling.budget_"),
        ("seeds=4", "seeds: unknown option; did you mean seed?"),
        ("policy.budget=512", "policy.budget: unknown option; did you mean policy.budget_tokens?"),
        ("policy.budgets=512", "policy.budgets: unknown option; did you mean policy.budget_tokens?"),
        ("policy.recent=8", "policy.recent: unknown option; did you mean policy.recent_tokens?"),
        ("policy.tokens=8", "policy.tokens: unknown option; an option of the policy itself is policy.options.tokens, "),
        ("engine.blocksize=16", "engine.blocksize: unknown option; did you mean engine.block_size?"),
        ("engine.max_len=64", "engine.max_len: unknown option; did you mean engine.max_model_len?"),
        ("engine.gpu_memory=0.5", "engine.gpu_memory: unknown option; did you mean engine.gpu_memory_utilization?"),
        ("sampling.max_token=4", "sampling.max_token: unknown option; did you mean sampling.max_tokens?"),
        ("max_len=64", "max_len: unknown option; did you mean engine.max_model_len?"),
        ("scenario.qps=3", "scenario.qps: unknown option; `--cfg job` lists all options"),
        ("sampling.best_of=2", "sampling.best_of: unknown option; `--cfg job` lists all options"),
        ("workload.dataset=x", "workload.dataset: unknown option; `--cfg job` lists all options"),
        (
            "workload.template_options.enable_thinking=false",
            "workload.template_options: unknown option; did you mean model.chat_template_options?",
        ),
        ("workload.file=x", "workload.file: unknown option; did you mean model.file?"),
        ("hardware.gpu=1", "hardware.gpu: unknown option; `--cfg job` lists all options"),
        ("+limits=4", "limits: unknown option; did you mean limit?"),
        ("modell=smollm2", "modell: unknown option; did you mean model?"),
        (
            "model=smollm",
            "model=smollm: no such choice; did you mean smollm2? (choices: dummy, gguf, gpt_oss_20b_shape, hf, ",
        ),
        ("engine.seed=3", "engine.seed: set it as seed=..."),
        ("engine.policy=full", "engine.policy: set it as policy.name=..."),
        ("engine.recent_tokens=8", "engine.recent_tokens: set it as policy.recent_tokens=..."),
        ("policy=zipge", "policy=zipge: no such choice; did you mean zipage? (choices: "),
        (
            "policy=my.module:Mine",
            "policy=my.module:Mine: no such choice; did you mean policy.name=my.module:Mine? (cho",
        ),
        ("policy.name=zipge", "engine: unknown policy 'zipge'; did you mean 'zipage'?"),
        ("policy.alpha=0.9", "policy.alpha: unknown option; an option of the policy itself is policy.options.alpha"),
        ("policy.budgt_tokens=64", "policy.budgt_tokens: unknown option; did you mean policy.budget_tokens?"),
        ("+policy.recent_token=64", "policy.recent_token: unknown option; did you mean policy.recent_tokens?"),
        ("engine.skip_tokenizer_init=true", "engine.skip_tokenizer_init: is always False here"),
        ("engine.block_size=big", "engine.block_size: Value 'big' of type 'str' could not be converted to Integer"),
        ("sampling.temperature=hot", "sampling.temperature: Value 'hot' of type 'str'"),
        ("limit=1.5", "limit: Value '1.5' of type 'float' could not be converted to Integer"),
        ("sampling.stop=x", "sampling.stop: Invalid value assigned"),
        ("sampling.temperature=-1", "sampling.temperature=-1.0: must be"),
        ("engine.block_size=20", "engine.block_size=20: must be a power of two"),
        ("limit=0", "limit=0: must be at least 1"),
        ("scenario.arrival=never", "scenario.arrival='never': must be all_at_once or poisson or trace"),
        ("scenario=trace", "scenario.path=None: must be given"),
        ("scenario.arrival=poisson", "scenario.rate=None: must be arrivals a second"),
        ("tracking.backend=paper", "tracking.backend='paper': must be none or wandb"),
        ("hardware.threads=0", "hardware.threads=0: must be at least 1"),
        ("workload.template=hello", "workload.template='hello': must be a text that holds {question}"),
        ("workload=jsonl", "workload.path=None: must be given"),
        ("workload.chain=4", "workload.grader='number': must be chain or none beside workload.chain"),
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


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("policy.options.alhpa=0.9", "engine: policy 'zipage': unknown option 'alhpa'; did you mean alpha?"),
        ("policy.options.lambda=2", "policy.options.lambda=2.0: must be in [0, 1]"),
        ("policy.options.window=300", "engine: zipage: window=300 queries do not fit a block of 256"),
        (
            "policy.protection=sink:500",
            "policy.budget_tokens=512 is less than policy.protection=sink:500 and policy.recent_tokens=16",
        ),
        ("policy.protection=head", "policy.protection='head': must be none, prompt or sink:N"),
        (
            "policy.recent_tokens=512",
            "policy.budget_tokens=512 leaves nothing to choose beside policy.recent_tokens=512",
        ),
        ("policy.interval=0", "policy.interval=0: must be at least 1, or None"),
        ("policy.budget_tokens=null", "policy.budget_tokens=None: must be given with policy 'zipage'"),
    ],
)
def test_wrong_options_of_a_policy_are_named_in_one_line(option, line):
    with pytest.raises(UsageError) as caught:
        load_experiment(["policy=zipage", option])
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


OWN_WORKLOAD = """
# of one's own
name: 1.10
path: q.jsonl
question: 0x10
revision: 12e4567
subset: null
split: yes
id: 1_000
system_prompt: ${workload.name}
grader: none
max_tokens: 1_000
samples: &two 2
seed: *two
parts:
  one: {subset: 1.10, revision: 010, id: "007", seed: 3}
"""


@pytest.mark.parametrize("name", ["own", "deeper/own"])
def test_texts_in_a_config_file_are_as_written(tmp_path, monkeypatch, name):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    path = conf / "workload" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text("# @package workload\n" * ("/" in name) + OWN_WORKLOAD)
    with (conf / "sampling" / "greedy.yaml").open("a") as file:
        file.write("stop: [1.10, yes, '0x10']\n")
    monkeypatch.setattr(compose, "CONF", conf)
    experiment = load_experiment([f"workload={name}"])
    workload = experiment.workload
    assert (workload.name, workload.question, workload.revision) == ("1.10", "0x10", "12e4567")
    assert (workload.subset, workload.split, workload.id, workload.system_prompt) == (None, "yes", "1_000", "1.10")
    assert (workload.max_tokens, workload.samples, workload.seed) == (1000, 2, 2), "numbers are numbers"
    assert workload.parts == {"one": {"subset": "1.10", "revision": "010", "id": "007", "seed": 3}}
    assert experiment.sampling.stop == ["1.10", "yes", "0x10"]
