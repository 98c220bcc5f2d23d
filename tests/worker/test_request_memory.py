"""What a request takes, told before there is an engine."""

import pytest

from tests.tiny_models import save_tiny_model
from zipage import LLM, EngineConfig, RequestMemory, SamplingParams

SHAPE = {"model": "models/qwen3-8b-shape", "load_format": "dummy", "dtype": "bfloat16", "device": "cpu"}


def memory(policy="zipage", of=None, **options) -> RequestMemory:
    return RequestMemory.of(EngineConfig(**SHAPE | {"budget_tokens": 2048, "policy": policy} | options), of)


def test_bytes_by_hand():
    """The sizes are those of the memory plan's own test."""
    assert memory() == RequestMemory(256, 1, 38_338_560, 4_718_592)
    assert memory().bytes_of(2048) == 9 * 38_338_560 + 4_718_592 == memory().bytes_of(1900)
    assert memory(interval=600).bytes_of(2048) == 11 * 38_338_560 + 4_718_592
    assert memory("random") == RequestMemory(256, 1, 38_043_648, 0) == memory(of="random")
    assert memory(policy_options={"window": 32}).query_slot_bytes == 2 * 4_718_592
    assert memory("random", of="zipage") == memory()
    unequal = {"allocation": "pyramid", "enable_prefix_caching": False}
    assert memory(**unequal) == memory()
    assert memory(**unequal, allocation_options={"round": "entry"}) == RequestMemory(256, 2, 38_338_560, 4_718_592)


@pytest.mark.parametrize("interval", [None, 100])
def test_the_largest_budget_in_so_many_bytes(interval):
    ours, theirs = memory("random", interval=interval, block_size=16), memory(interval=interval, block_size=16)
    for budget in (16, 512, 2048):
        assert ours.budget_in(ours.bytes_of(budget)) == budget
        assert ours.budget_in(ours.bytes_of(budget + 16) - 1) == budget
        found = ours.budget_in(theirs.bytes_of(budget))
        assert ours.bytes_of(found) <= theirs.bytes_of(budget) < ours.bytes_of(found + 16)
    with pytest.raises(ValueError, match="bytes are too few for a request: a block of 16 entries kept and an interval"):
        ours.budget_in(ours.bytes_of(16) - 1)


def test_what_bounds_no_request_has_no_bytes():
    with pytest.raises(ValueError, match="policy 'full' never evicts, so nothing bounds a request"):
        memory("full")
    with pytest.raises(ValueError, match="unknown policy 'zipge'; did you mean 'zipage'"):
        memory(of="zipge")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        memory(model="/nowhere")


CASES = [("zipage", {"window": 8}, "qwen2"), ("random", {}, "qwen2"), ("keydiff", {}, "qwen2")]
CASES += [("zipage", {"window": 8}, "gpt_oss"), ("knorm", {}, "gemma3_text")]


@pytest.mark.parametrize(("policy", "options", "family"), CASES)
def test_an_engine_takes_what_was_told(tmp_path, policy, options, family):
    shape = {"sliding_window": 300} if family == "gemma3_text" else {}  # longer than any request
    folder = save_tiny_model(family, tmp_path / "model", num_hidden_layers=2, **shape)
    given = {"policy": policy, "policy_options": options, "budget_tokens": 40, "interval": 20, "block_size": 16}
    given |= {"device": "cpu", "num_blocks": 20, "skip_tokenizer_init": True, "max_num_seqs": 4, "max_model_len": 124}
    told = RequestMemory.of(EngineConfig(model=folder, **given))
    llm = LLM(folder, **given)
    plan = llm.memory_plan
    assert (told.block_bytes, told.query_slot_bytes) == (plan.block_bytes, plan.query_slot_bytes)
    params = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
    (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    metrics = output.outputs[0].metrics
    held = metrics.peak_blocks * plan.block_bytes + metrics.query_slot * plan.query_slot_bytes
    held += metrics.peak_sliding_blocks * plan.sliding_block_bytes
    assert held == told.bytes_of(40) == told.bytes_of(48)
