"""The arms of sweeps: how files join, what wins, what is refused; every shipped sweep composes."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.bench.roofline import ModelShape
from experiments.config.arms import FOLDER, check_multirun, expand, read_sweep, split_command_line, sweep_path
from experiments.config.compose import load_experiment
from experiments.config.schema import to_dict
from experiments.errors import UsageError
from experiments.paths import CONF, ROOT
from tests.calibrations import CALIBRATED

SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "own") -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return str(path)

    return write


NINES = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 9)]
BOMB = "\n".join(["a0: &a0 [1, 2]", *NINES, f"axes: {{limit: [{', '.join(['*a8'] * 8)}]}}"])
OF_THE_PAPER = [name for name in SHIPPED if name.startswith(("paper_", "ablation_")) and name != "paper_speed"]


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_sweeps_of_the_paper_have_a_small_form(name):
    paper, small = ([load_experiment(arm) for arm in expand(names)] for names in ([name], [name, "small"]))
    assert {arm.model.path for arm in small} == {"models/zipage-reasoner"}
    assert all(arm.model.path.startswith("Qwen/") and arm.sampling.n > 1 for arm in paper)
    assert {arm.workload.name for arm in small} == {"chained_arithmetic"}
    assert {arm.policy.name for arm in small} == {arm.policy.name for arm in paper}
    assert {arm.policy.budget_tokens for arm in small} - {None} == {768}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_arm_of_every_sweep_composes(name):
    arms = expand([name])
    assert len(arms) > 1 or name in ("small", "speed")
    options = [repr(to_dict(load_experiment(arm))) for arm in arms]
    known = 2 if name == "policy" else 0  # random_attention is random with the prompt protected
    assert len(options) - len(set(options)) == known, "arms that are the same run"


def test_shipped_sweeps():
    assert set(SHIPPED) >= {
        "async",
        "budget",
        "concurrency",
        "demo",
        "granularity",
        "policy",
        "prefix",
        "scheduling",
        "reasoner",
        "paper_table1",
        "paper_workloads",
        "paper_sizes",
        "paper_budget",
    }
    assert len(OF_THE_PAPER) == 12


def test_calibration_files_of_a_sweep_are_the_models_own_and_lie_where_the_environment_says(monkeypatch):
    def files(*arguments: str) -> set[str]:
        arms = [load_experiment(arm).policy for arm in expand(["qwen_methods"], arguments)]
        return {policy.options["calibration"] for policy in arms if "calibration" in policy.options}

    monkeypatch.delenv("CALIBRATION", raising=False)
    kinds = ("expected_attention", "kvzap", "q_filters", "triattention")
    assert files() == {f"results/calibration/qwen25_coder_1_5b/{kind}.safetensors" for kind in kinds}
    monkeypatch.setenv("CALIBRATION", "/data/made")
    assert files("model=qwen25_coder_0_5b") == {f"/data/made/qwen25_coder_0_5b/{kind}.safetensors" for kind in kinds}


@pytest.mark.parametrize("name", [*(name for name in OF_THE_PAPER if name.startswith("ablation_")), "paper_budget"])
def test_sweeps_of_the_paper_have_a_form_for_speed(name):
    path = ["workload.options.path=t.csv", "workload.samples=8"]
    paper = [load_experiment(arm).policy for arm in expand([name])]
    arms = [load_experiment(arm) for arm in expand([name, "speed"], path)]
    assert [arm.policy for arm in arms] == paper
    assert {arm.model.name for arm in arms} == {"qwen3-8b-shape"}
    assert {(arm.sampling.ignore_eos, arm.sampling.n) for arm in arms} == {(True, 8)}
    assert {(arm.workload.generator, arm.workload.options["path"]) for arm in arms} == {("lengths", "t.csv")}


def test_speed_is_taken_at_the_shapes_of_the_papers_models():
    arms = [load_experiment(arm) for arm in expand(["paper_speed"], ["workload.options.path=t.csv"])]
    sizes = {}
    for arm in arms:
        assert arm.model.load_format == "dummy"
        assert arm.sampling.ignore_eos
        assert arm.scenario.arrival == "steady"
        assert arm.workload.options["path"] == "t.csv"
        shape = ModelShape.read(ROOT / arm.model.path, "bfloat16", "cuda")
        sizes.setdefault(arm.model.name, (shape.weight_bytes / 2e9, shape.kv_bytes))
        gpus = arm.engine.tensor_parallel_size
        used = arm.engine.kv_cache_memory_bytes + shape.weight_bytes / gpus
        assert 72e9 < used < 77e9  # of 80 GiB, of which the engine takes nine tenths, with room for activations
    entry = 2 * 8 * 128 * 2  # bytes of K and V in a layer
    assert sizes == {
        "qwen3-0.6b-shape": (pytest.approx(0.6, abs=0.05), 28 * entry),
        "qwen3-1.7b-shape": (pytest.approx(1.7, abs=0.05), 28 * entry),
        "qwen3-4b-shape": (pytest.approx(4.0, abs=0.05), 36 * entry),
        "qwen3-8b-shape": (pytest.approx(8.2 - 0.6, abs=0.05), 36 * entry),  # the input embedding is only looked up
        "qwen3-14b-shape": (pytest.approx(14.8 - 0.8, abs=0.05), 40 * entry),
        "qwen3-32b-shape": (pytest.approx(32.8 - 0.8, abs=0.05), 64 * entry),
    }
    assert [(arm.policy.name, arm.policy.budget_tokens) for arm in arms[6:]] == [("zipage", 2048)] * 6
    assert [arm.model.name for arm in arms[6:]] == [arm.model.name for arm in arms[:6]]
    assert [arm.engine.tensor_parallel_size for arm in arms] == 2 * [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "active", "kv_bytes"),
    [
        ("phi4-shape", 14.7 - 0.5, 40 * 2 * 10 * 128 * 2),
        ("gpt-oss-20b-shape", 3.6, 24 * 2 * 8 * 64 * 2),  # 3.6 billion of 20.9, as published
        ("qwen3-30b-a3b-shape", 3.3 - 0.3, 48 * 2 * 4 * 128 * 2),  # 3.3 billion of 30.5, as published
    ],
)
def test_shapes_have_the_sizes_of_their_models(name, active, kv_bytes):
    shape = ModelShape.read(ROOT / "models" / name, "bfloat16", "cuda")
    assert shape.weight_bytes / 2e9 == pytest.approx(active, abs=0.06)
    assert shape.kv_bytes == kv_bytes


def test_policy_sweep_has_every_policy():
    arms = [load_experiment(arm).policy for arm in expand(["policy"])]
    chosen = {override for arm in expand(["policy"]) for override in arm if override.startswith("policy=")}
    # But for those that need a file of one model.
    every = {path.stem for path in (CONF / "policy").glob("*.yaml")} - CALIBRATED
    assert chosen == {f"policy={name}" for name in every}
    evicting = [arm for arm in arms if arm.name != "full"]
    assert {arm.protection for arm in evicting} == {"none", "prompt"}
    assert {arm.budget_tokens for arm in evicting} == {512}
    assert len(arms) - len(evicting) == 1


def test_page_sizes_of_the_granularity_sweep():
    arms = [load_experiment(arm) for arm in expand(["granularity"])]
    pages = [
        (arm.engine.block_size, arm.policy.options["page_size"]) for arm in arms if arm.policy.name == "page_random"
    ]
    assert sorted(pages) == [(16, 16), (64, 64), (256, 16), (256, 64), (256, 256)]
    assert sorted(arm.engine.block_size for arm in arms if arm.policy.name == "zipage") == [16, 64, 256]


def test_blocks_are_products_of_their_own(write):
    own = write("""
        axes: {limit: 4}
        arms:
          - policy: full
          - {policy: [zipage, random], policy.budget_tokens: [256, 512]}
    """)
    assert expand([own]) == [
        ("limit=4", "policy=full"),
        ("limit=4", "policy=zipage", "policy.budget_tokens=256"),
        ("limit=4", "policy=zipage", "policy.budget_tokens=512"),
        ("limit=4", "policy=random", "policy.budget_tokens=256"),
        ("limit=4", "policy=random", "policy.budget_tokens=512"),
    ]


def test_axes_alone_are_one_block(write):
    own = write("axes: {seed: [0, 1], engine.enforce_eager: [true, false], limit: null}")
    assert expand([own]) == [
        (f"seed={seed}", f"engine.enforce_eager={eager}", "limit=null")
        for seed in (0, 1)
        for eager in ("true", "false")
    ]


def test_a_block_wins_over_the_axes_of_its_file(write):
    own = write("axes: {limit: [1, 2]}\narms: [{seed: 0}, {limit: 9}]")
    assert expand([own]) == [("limit=1", "seed=0"), ("limit=2", "seed=0"), ("limit=9",)]


def test_sweeps_join_by_product_and_the_later_one_wins(write):
    first = write("axes: {limit: [1, 2], seed: [0, 1]}", "first")
    second = write("axes: {limit: 7}\narms: [{engine.block_size: 16}, {engine.block_size: [32, 64]}]", "second")
    assert expand([first, second]) == [
        ("limit=7", f"seed={seed}", f"engine.block_size={size}")
        for sizes in ([16], [32, 64])
        for seed in (0, 1)
        for size in sizes
    ]
    assert {arm[0] for arm in expand([second, first])} == {"limit=1", "limit=2"}


def test_command_line_wins_and_brings_axes(write):
    own = write("axes: {limit: [1, 2]}\narms: [{policy: zipage}, {policy: random, limit: 5}]")
    assert expand([own], ["limit=3", "seed=0,1"]) == [
        ("limit=3", f"policy={policy}", f"seed={seed}") for policy in ("zipage", "random") for seed in (0, 1)
    ]
    assert {arm[-1] for arm in expand([own], ["seed=range(0,3)"])} == {"seed=0", "seed=1", "seed=2"}
    assert expand([own], ["sampling.stop=[a,b]"])[0][-1] == "sampling.stop=[a,b]", "a list is a value, not an axis"


@pytest.mark.parametrize(
    ("written", "option", "value"),
    [
        ("1.10", "workload.subset", "1.10"),
        ('"1.10"', "workload.subset", "1.10"),
        ('"  "', "workload.system_prompt", "  "),
        ("[0123, 1e5]", "model.revision", "0123"),
        ("on", "workload.subset", "on"),
        ("null", "workload.subset", None),
        ('"null"', "workload.subset", "null"),
        (r'"Q: {question},\nA:"', "workload.template", "Q: {question},\nA:"),
        (r"'[x] {question} \n'", "workload.template", r"[x] {question} \n"),
        ('"1"', "workload.options.kind", "1"),
        ("1", "workload.options.kind", 1),
        ('"[1,2]"', "workload.options.kind", [1, 2]),
        ("on", "workload.options.kind", True),
        ('"[a,1.10]"', "sampling.stop", ["a", "1.10"]),
    ],
)
def test_values_are_those_of_yaml_and_texts_as_they_are_written(write, written, option, value):
    arm, *_ = expand([write(f"axes: {{limit: 3, {option}: {written}}}")])
    found = to_dict(load_experiment(arm))
    for part in option.split("."):
        found = found[part]
    assert found == value


def test_axes_of_the_command_line_are_texts_as_they_are_written(write):
    own = write("axes: {limit: 3}")
    assert [load_experiment(arm).workload.subset for arm in expand([own], ["workload.subset=1.10,1e5"])] == [
        "1.10",
        "1e5",
    ]


def test_another_choice_takes_no_options_of_the_one_before(write):
    """Pages have options that no other policy knows, and generated lengths none that a workload of questions knows."""
    pages = write("axes: {policy: page_random, policy.options.native: false, policy.budget_tokens: 64}", "pages")
    zipage = write("axes: {policy: [zipage, random]}", "zipage")
    assert expand([pages, zipage]) == [
        ("policy=zipage", "policy.budget_tokens=64"),
        ("policy=random", "policy.budget_tokens=64"),
    ]
    assert expand([pages], ["policy=zipage"]) == [("policy=zipage", "policy.budget_tokens=64")]
    assert expand([pages], ["policy=page_random"]) == expand([pages])
    assert expand([zipage], ["policy=zipage", "policy.options.alpha=0.5"])[0][1] == "policy.options.alpha=0.5"
    (arm,) = expand(
        [write("axes: {model: hf, model.path: X, workload: lengths, workload.options.count: 4}")],
        ["model=reasoner", "workload=chained_arithmetic"],
    )
    assert arm == ("model=reasoner", "workload=chained_arithmetic")


def test_an_added_option_is_known_by_its_name(write):
    own = write("axes: {policy: zipage, +policy.options.tau: [1, 2]}")
    assert [arm[1] for arm in expand([own])] == ["+policy.options.tau=1", "+policy.options.tau=2"]
    assert expand([own], ["policy.options.tau=3"]) == [("policy=zipage", "policy.options.tau=3")]


def test_full_kv_has_no_eviction_to_vary(write):
    own = write("axes: {policy: [full, zipage], policy.budget_tokens: [256, 512], policy.protection: [none, prompt]}")
    arms = expand([own])
    assert len(arms) == 5
    assert arms[0] == ("policy=full",)
    named = expand([own], ["policy.name=random"])
    assert all("policy.budget_tokens=256" in arm or "policy.budget_tokens=512" in arm for arm in named)
    assert not [option for option in expand(["demo"], ["policy.budget_tokens=32"])[0] if "policy." in option]


def test_the_command_line_that_asks_for_sweeps():
    assert split_command_line(["limit=3", "seed=1"]) == ([], ["limit=3", "seed=1"])
    assert split_command_line(["+sweep=a", "limit=3"]) == (["a"], ["limit=3"])
    assert split_command_line(["limit=3", "+sweep=[a, b]", "-m"]) == (["a", "b"], ["limit=3"])
    for flag in ("--help", "--cfg"):
        assert split_command_line(["+sweep=a", flag]) == ([], ["+sweep=a", flag]), "Hydra's business"
    for wrong in ("+sweep=a,b", "+sweep="):
        with pytest.raises(UsageError, match=r"\+sweep=.*: must be one sweep, or several joined as \+sweep=\[a,b\]"):
            split_command_line([wrong])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("axis: {limit: 3}", "axis: unknown key; must be axes or arms"),
        ("axes: {limit: 3}\nlimit: 3", "limit: unknown key; must be axes or arms"),
        ("", "must hold axes or arms"),
        ("- limit", "must hold axes or arms"),
        ("axes: [limit]", "axes: must be options and their values"),
        ("arms: {policy: full}", "arms: must be a list of blocks"),
        ("arms: []", "arms: must be a list of blocks"),
        ("arms: [{policy: full}, zipage]", "arms[1]: must be options and their values"),
        ("axes: {limit: []}", "limit: no values; must be a number, a text"),
        ("axes: {engine: {block_size: 16}}", "engine: must be a number, a text"),
        ("axes: {sampling.stop: [[a, b]]}", "sampling.stop: must be a number, a text"),
        ("axes: {limit: 3}\naxes: {seed: 1}", "while constructing a mapping"),
        ("axes: {", "while parsing"),
        ("axes: &a {limit: *a}", "holds an alias inside of what it stands for"),
        (BOMB, "holds 2,834,567,913 values with its aliases written out; at most 100,000"),
        ("axes: " + "[" * 9999, "is nested too deep"),
        ("# " + "a" * (1 << 20), "has 1,048,578 bytes; at most 1,048,576"),
    ],
)
def test_wrong_files_are_named_in_one_line(write, text, line):
    path = write(text)
    with pytest.raises(UsageError) as caught:
        read_sweep(Path(path))
    assert str(caught.value).startswith(f"{path}: {line}")
    assert "\n" not in str(caught.value)


def test_aliases_of_a_moderate_size_are_read(write):
    own = write("axes: {limit: &a [1, 2], seed: *a}\narms: [&b {policy: zipage}, *b]")
    assert len(expand([own])) == 4


def test_arms_are_counted_before_they_are_made(write):
    axes = "\n".join(f"  policy.options.o{axis}: [{', '.join(map(str, range(10)))}]" for axis in range(10))
    own = write(f"axes:\n{axes}")
    with pytest.raises(UsageError, match=r"own\.yaml: 10,000,000,000 arms; at most 2,000: give fewer values"):
        expand([own])
    blocks = write(f"arms: [{', '.join('{limit: 1}' for _ in range(50))}]", "blocks")
    with pytest.raises(UsageError, match=r"2,500 arms; at most 2,000"):
        expand([blocks] * 3)
    small = write("axes: {policy: zipage}", "small")
    with pytest.raises(UsageError, match=r"2,500 arms; at most 2,000"):
        expand([small], ["seed=range(0,50)", "limit=range(1,51)"])
    assert len(expand([small], ["seed=range(0,2000)"])) == 2000


@pytest.mark.parametrize(
    ("axis", "count"),
    [
        ("seed=range(0,10000000000)", "10,000,000,000"),
        ("seed=shuffle(range(0,10000000000))", "10,000,000,000"),
        ("seed=range(0,1,0.0000000001)", "10,000,000,000"),
        ("seed=range(0,10,0.0)", "9,223,372,036,854,775,807"),
        ("seed=range(0,10,-1)", "0"),
        ("seed=range(3,3)", "0"),
    ],
)
def test_a_range_is_counted_before_it_is_written_out(write, axis, count):
    with pytest.raises(UsageError) as caught:
        expand([write("axes: {policy: zipage}")], [axis])
    assert str(caught.value) == f"{axis}: {count} values; must be at least 1 and at most 2,000"


@pytest.mark.parametrize("axis", ["policy=glob(*)", "seed=interval(0,1)"])
def test_an_axis_of_no_list_is_one_line(write, axis):
    with pytest.raises(UsageError, match=r": an axis must be a list such as a,b,c or a range\(START,STOP\)"):
        expand([write("axes: {policy: zipage}")], [axis])


def test_runs_of_hydras_own_sweep_are_counted():
    check_multirun(["-m", "policy=glob(*)", "seed=range(0,100)", "--config-dir", "x"])
    check_multirun(["seed=range(0,10000000000)"])
    with pytest.raises(UsageError, match=r"sweep -m: 20,000,000,000 arms; at most 2,000"):
        check_multirun(["--multirun", "seed=range(0,10000000000)", "limit=1,2"])


def test_unknown_sweep_names_the_closest():
    with pytest.raises(
        UsageError, match=r"sweep=bugdet: no such sweep; did you mean budget\? \(choices: ablation_alpha, ablation"
    ):
        sweep_path("bugdet")
    with pytest.raises(UsageError, match=r"sweep=nowhere/own\.yaml: no such sweep"):
        sweep_path("nowhere/own.yaml")
