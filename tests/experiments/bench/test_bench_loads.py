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


@pytest.mark.parametrize("path", sorted(LOADS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_load_is_sound(path):
    for arm in arms_of(path):
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


@pytest.mark.parametrize(("load", "arm"), [("ample", "full"), ("pressure", "full"), ("pressure", "pressure")])
def test_ample_memory_holds_every_request_to_its_end(load, arm):
    (found,) = (a for a in arms_of(load) if a.name == arm)
    options = found.options | {"model": "models/qwen3-8b-shape"}
    config = EngineConfig.from_kwargs(**options)
    spec = spec_from_config(AutoConfig.from_pretrained(ROOT / "models/qwen3-8b-shape"))
    policy = config.make_policy()
    rule = None if policy is None else config.rule(policy, config.budget_tokens, config.max_model_len)
    plan = plan_memory(
        config, spec, torch.bfloat16, 0, policy=policy, max_blocks=rule and rule.max_blocks,
        max_model_len=config.max_model_len,
    )  # fmt: skip
    needed = sum(-(-sum(lengths) // config.block_size) for lengths in found.lengths)
    assert needed <= plan.num_blocks < 1.05 * needed
