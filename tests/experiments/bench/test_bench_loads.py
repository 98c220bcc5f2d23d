"""The loads of benchmarks: their requests, their arms and their memory."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from experiments.bench.loads import LOADS
from experiments.errors import UsageError
from experiments.paths import ROOT
from tests.experiments.bench.bench_runs import arms_of
from zipage import EngineConfig
from zipage.models.loading.hf_config import spec_from_config
from zipage.worker.memory_plan import plan_memory


@pytest.fixture
def trace(tmp_path):
    """600 requests, each fifth longer than any load takes."""
    path = tmp_path / "trace.csv"
    rows = [f"{5 + 2 * i},{10 + i},{20_000 if i % 5 == 4 else 20 + i}" for i in range(600)]
    path.write_text("\n".join(["arrival,prompt_tokens,output_tokens", *rows]))
    return str(path)


@pytest.mark.parametrize("path", sorted(LOADS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_load_is_sound(path, trace):
    for arm in arms_of(path, trace=trace if path.stem == "trace" else None):
        longest = max(prompt + output for prompt, output in arm.lengths)
        assert longest <= arm.options["max_model_len"]
        assert arm.window_steps is not None or len(arm.lengths) <= arm.options["max_num_seqs"]


def test_staggered_requests_end_where_the_others_do():
    (arm,) = (arm for arm in arms_of("long") if arm.name == "full")
    assert {prompt + output for prompt, output in arm.lengths} == {128 + 16_384}
    assert [prompt for prompt, _ in arm.lengths[43:]] == [128] * (312 - 43)
    begun = sorted(prompt for prompt, _ in arm.lengths[:43])
    assert begun[0] < 400
    assert begun[-1] > 16_000


def test_staggered_requests_hold_what_their_budget_lets_them():
    (arm,) = (arm for arm in arms_of("long") if arm.name == "zipage")
    begun = arm.lengths[:166]
    assert sorted(output for _, output in begun)[::165] == [50, 16_384 - 49]
    held = [prompt for prompt, output in begun if output < 16_384 - 2048]
    assert min(held) > 2048
    assert 2048 + 240 < max(held) <= 2048 + 256
    assert sum(held) / len(held) == pytest.approx(2048 + 128, rel=0.01)


def test_the_requests_of_a_trace_come_at_once_or_when_they_came(trace):
    arms = {arm.name: arm for arm in arms_of("trace", trace=trace)}
    lengths = [[10 + i, 8192 if i % 5 == 4 else 20 + i] for i in range(512)]
    for name in ("full", "zipage_512", "zipage_2048", "random_prompt", "vllm"):
        assert arms[name].lengths == arms[f"{name}_arriving"].lengths == lengths
        assert arms[name].arrivals is None
        assert arms[f"{name}_arriving"].arrivals == [2.0 * i for i in range(512)]
    assert "arrivals" not in arms["full"].plain()
    changes = {"lengths": {"count": 3, "longest": 11}, "speed": 4}
    (arm,) = arms_of("trace/full_arriving", trace=trace, changes=changes)
    assert arm.lengths == [[10, 11], [11, 11], [11, 11]]
    assert arm.arrivals == [0.0, 0.5, 1.0]


def test_mixed_lengths_are_lognormal_and_others_with_another_seed():
    (arm,) = arms_of("mixed/full")
    prompts, outputs = (sorted(lengths) for lengths in zip(*arm.lengths, strict=True))
    assert len(prompts) == 160
    assert 200 < prompts[80] < 320
    assert 1100 < outputs[80] < 1800
    assert outputs[-1] <= 7000


SMALL = "lengths: {count: 4}\narms: {full: {}}\n"
TRACED = "lengths: {trace: null, count: 4}\narms: {full: {arrivals: trace}}\n"


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        (SMALL, {"lengths": {"cuont": 3}}, "lengths: .*cuont"),
        (SMALL, {"lengths": 3}, "lengths=3: must be a mapping"),
        (SMALL, {"sped": 3}, "scenario.options: unknown option sped; known: lengths, arms, engine"),
        (SMALL, {"arms": {}}, "scenario.options.arms: give a YAML file of your own"),
        (SMALL, {"warmup_tokens": True}, "warmup_tokens=True: must be a whole number"),
        (SMALL.replace("full: {}", "full: {arrivals: soon}"), {}, "arms.full: arrivals=.soon.: must be at_once"),
        (SMALL.replace("full: {}", "full: {arrivals: trace}"), {}, "arms.full: arrivals=trace: needs the `lengths`"),
        (SMALL.replace("{}", ""), {}, "arms.full: "),
        (TRACED, {"window_steps": 3}, "arrivals=trace: needs .*neither `staggered` nor `window_steps`"),
        (TRACED.replace("trace}}", "trace, staggered: 2}}"), {}, "arrivals=trace: needs .*neither"),
        (TRACED, {"speed": 0}, "speed=0: must be above 0"),
        (TRACED, {"lengths": {"count": 601}}, "lengths.count=601: the trace has 600 requests"),
        (TRACED, {"lengths": {"sigma": 1}}, "lengths: unknown option sigma; known: trace, count, longest"),
    ],
)  # fmt: skip
def test_what_a_load_cannot_be_is_refused(text, changes, reason, tmp_path, trace):
    path = tmp_path / "load.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=reason):
        arms_of(path, changes=changes, trace=trace if "trace:" in text else None)


def test_a_trace_goes_with_loads_that_take_one(trace, tmp_path):
    with pytest.raises(UsageError, match=r"takes a trace: scenario\.path=FILE"):
        arms_of("trace")
    with pytest.raises(UsageError, match="none of the loads takes a trace; leave it out"):
        arms_of("ample", trace=trace)
    (tmp_path / "lengths.csv").write_text("prompt_tokens,output_tokens\n3,4\n")
    (tmp_path / "load.yaml").write_text(TRACED.replace("4", "1"))
    with pytest.raises(UsageError, match="lengths alone, no arrivals"):
        arms_of(tmp_path / "load.yaml", trace=str(tmp_path / "lengths.csv"))


STAGGERED = """
lengths: {count: 64, prompt_tokens: 16, output_tokens: 2000}
window_steps: 5
engine: {block_size: 64, num_blocks: 99, max_num_seqs: 64, max_model_len: 4096, policy: random, budget_tokens: 200}
arms:
  whole_blocks: {staggered: 64}
  pressure: {staggered: 64, trigger: pressure}
  interval: {staggered: 64, interval: 140}
"""


def test_staggered_budgets_are_whole_blocks_and_bound_nothing_under_pressure(tmp_path):
    path = tmp_path / "load.yaml"
    path.write_text(STAGGERED)
    bounded, pressed, spaced = ([held for held, _ in arm.lengths] for arm in arms_of(path))
    assert 256 < max(bounded) <= 256 + 64
    assert max(pressed) > 1900
    assert 256 + 128 < max(spaced) <= 256 + 192
    path.write_text(STAGGERED.replace("trigger: pressure", "protection: prompt"))
    with pytest.raises(UsageError, match="protection=prompt: a staggered prompt"):
        arms_of(path)


def test_one_arm_of_a_load():
    assert [arm.title for name in ("short/vllm", "ample") for arm in arms_of(name)][:2] == ["short/vllm", "ample/full"]


def test_the_command_line_wins_over_a_load():
    assert all(arm.options["max_num_seqs"] == 7 for arm in arms_of("ample", max_num_seqs=7))


@pytest.mark.parametrize(
    ("load", "arm", "model"),
    [
        ("ample", "full", "qwen3-8b-shape"),
        ("pressure", "full", "qwen3-8b-shape"),
        ("pressure", "pressure", "qwen3-8b-shape"),
        ("experts", "full", "qwen3-30b-a3b-shape"),
    ],
)
def test_ample_memory_holds_every_request_to_its_end(load, arm, model):
    (found,) = (a for a in arms_of(load) if a.name == arm)
    options = found.options | {"model": f"models/{model}"}
    config = EngineConfig.from_kwargs(**options)
    spec = spec_from_config(AutoConfig.from_pretrained(ROOT / "models" / model))
    policy = config.make_policy()
    rule = None if policy is None else config.rule(policy, config.budget_tokens, config.max_model_len)
    plan = plan_memory(
        config, spec, torch.bfloat16, 0, policy=policy, max_blocks=rule and rule.max_blocks,
        max_model_len=config.max_model_len,
    )  # fmt: skip
    needed = sum(-(-sum(lengths) // config.block_size) for lengths in found.lengths)
    assert needed <= plan.num_blocks < 1.05 * needed


def test_budgets_of_mixtures_bind_while_they_are_timed():
    (arm,) = arms_of("experts/zipage")
    config = EngineConfig.from_kwargs(**arm.options | {"model": "models/qwen3-30b-a3b-shape"})
    rule = config.rule(config.make_policy(), config.budget_tokens, arm.lengths[0][0])
    most = rule.max_blocks * config.block_size
    assert not rule.prompt_truncated
    assert all(prompt + arm.warmup_tokens > most for prompt, _ in arm.lengths)
