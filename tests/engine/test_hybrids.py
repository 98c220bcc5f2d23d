"""Models with recurrent layers: each once through all that must not change a token."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.compressed import (
    UNBOUNDED,
    Recorder,
    greedy,
    make_llm,
    pause_now_and_then,
    random_prompts,
    record_events,
    tokens_of,
)
from tests.eviction.cases import SMALL_CHUNK, Case
from tests.eviction.dense_simulation import Simulation
from tests.tiny_models import HYBRIDS, VOCAB, save_tiny_model, transformers_greedy
from zipage import SamplingParams
from zipage.models.decoder import Decoder
from zipage.models.loading.safetensors_folder import SafetensorsFolder
from zipage.scheduling import swap_space
from zipage.simulation.llm import SimulatedLLM
from zipage.worker.calibrate import calibrate
from zipage.worker.paged_attention import PagedAttention
from zipage.worker.peak import run_largest_step
from zipage.worker.train_scorer import train_scorer

NUM_TOKENS = 100
"""More than the longest prompt leaves of a block of 256."""
LENGTHS = (1, 200, 17, 33, 70)
NUM_LAYERS = 4
POLICIES = ("full", "zipage", "h2o", "snapkv", "r_kv", "streaming", "keydiff", "lagkv")
UNEQUAL = {"allocation": "adaptive", "enable_prefix_caching": False}


every_hybrid = pytest.mark.parametrize("folder", sorted(HYBRIDS), indirect=True)


@pytest.fixture(scope="module", params=["qwen3_next"])
def folder(request, tmp_path_factory):
    """Made by transformers itself."""
    return save_tiny_model(request.param, tmp_path_factory.mktemp(request.param), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS, VOCAB)


@pytest.fixture(scope="module")
def expected(folder, prompts):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    guesses = tokens_of(make_llm(folder, None).generate(prompts, greedy(NUM_TOKENS), use_tqdm=False))
    tokens = [transformers_greedy(model, *each)[0] for each in zip(prompts, [NUM_TOKENS] * len(prompts), guesses)]
    assert min(len(set(each)) for each in tokens) > 20, "a text that loops would agree with anything"
    return tokens


@every_hybrid
@pytest.mark.parametrize(("block_size", "num_blocks"), [(16, 22), (256, 4)])
def test_tokens_of_transformers(folder, prompts, expected, block_size, num_blocks):
    """Mixed lengths in chunks, preemptions and pauses; then again, in rows that others have left."""
    options = {"block_size": block_size, "num_blocks": num_blocks, "max_num_batched_tokens": 40, "max_num_seqs": 4}
    llm = make_llm(folder, None, headroom=0, **options)
    pause_now_and_then(llm, share=0.04)
    for count in (NUM_TOKENS, 20):
        outputs = llm.generate(prompts, greedy(count), use_tqdm=False)
        assert tokens_of(outputs) == [tokens[:count] for tokens in expected]
        assert not any(output.metrics.cached_tokens for output in outputs)
    assert llm.stats.preemptions > 0
    assert llm.stats.pauses == llm.stats.resumes > 0


@pytest.mark.parametrize("case", [None, Case("zipage", SMALL_CHUNK)], ids=str)
def test_copied_in_place_of_preempted(folder, prompts, expected, case, monkeypatch):
    """Steps overlap: a row is handed on while the step before it may still be under way."""
    monkeypatch.setattr(swap_space, "OPERATIONS_PER_BYTE", 0)  # a tiny model is computed in no time
    options = {"num_blocks": 22, "max_num_seqs": 4, "headroom": 0, "swap_space": 0.01, "async_scheduling": True}
    llm = make_llm(folder, case, budget=UNBOUNDED, **options)
    outputs = llm.generate(prompts, greedy(80), use_tqdm=False)
    assert tokens_of(outputs) == [tokens[:80] for tokens in expected]
    assert llm.stats.pauses == llm.stats.resumes > 0
    assert not llm._core.runner.swapper.copies


def test_samples_of_a_prompt_compute_it_each(folder, prompts, expected):
    outputs = make_llm(folder, None).generate(prompts, greedy(20, n=2), use_tqdm=False)
    assert tokens_of(outputs) == [tokens[:20] for tokens in expected for _ in range(2)]
    assert not any(output.metrics.cached_tokens for output in outputs)


@every_hybrid
def test_unbounded_budgets_give_the_tokens_of_full_kv(folder, prompts, expected):
    llm = make_llm(folder, Case("zipage", SMALL_CHUNK), budget=UNBOUNDED, num_blocks=512, max_num_seqs=64)
    params = [
        SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, policy=policy)
        for policy in POLICIES
        for _ in prompts
    ]
    tokens = tokens_of(llm.generate(prompts * len(POLICIES), params, use_tqdm=False))
    assert tokens == [each[:30] for each in expected] * len(POLICIES)


@pytest.mark.parametrize("case", [Case("zipage", SMALL_CHUNK), Case("h2o")], ids=str)
def test_what_each_head_keeps_equals_the_simulation(folder, case, monkeypatch):
    """Of the layers that attend."""
    recorder = Recorder()
    monkeypatch.setattr(PagedAttention, "__call__", recorder.wrap(PagedAttention.__call__))
    monkeypatch.setattr(Decoder, "forward", recorder.watch(Decoder.forward))
    llm = make_llm(folder, case, budget=48, trace_positions=True)
    events = record_events(llm)
    llm.generate(random_prompts([24], VOCAB, seed=3), greedy(90, seed=5), use_tqdm=False)
    simulation = Simulation(
        policy=case.policy, options=case.options, **recorder.arrays(llm), seed=5, prompt_len=24, keep=48,
        recent=case.recent, protection=case.protection,
    )  # fmt: skip
    expected = simulation.run([64] * len(events))
    assert len(events) == 4
    for event, kept in zip(events, expected, strict=True):
        assert len(kept) == 2 * NUM_LAYERS / 2
        for (layer, head), positions in kept.items():
            assert event.kept_positions[layer, head].tolist() == positions, (event.round, layer, head)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case("zipage", SMALL_CHUNK), {}),
        (Case("h2o"), {}),
        (Case("streaming"), {"async_compression": True}),
        (Case("zipage", SMALL_CHUNK), UNEQUAL),
    ],
    ids=str,
)
def test_bounded_requests_answer_as_each_alone(folder, case, options):
    """In chunks and paused, and in a pool too small for all."""
    prompts = random_prompts((17, 27, 20, 33, 70), VOCAB)
    unbounded = tokens_of(make_llm(folder, None).generate(prompts, greedy(34), use_tqdm=False))

    def answers(alone: bool, paused: bool = False, **more) -> list[list[int]]:
        llm = make_llm(folder, case, budget=32, **{"async_compression": False} | options | more)
        if paused:
            pause_now_and_then(llm)
        batches = [[prompt] for prompt in prompts] if alone else [prompts]
        tokens = [each for batch in batches for each in tokens_of(llm.generate(batch, greedy(34), use_tqdm=False))]
        assert llm.stats.budget_bound == len(prompts)
        assert not paused or llm.stats.resumes > 0
        assert "num_blocks" not in more or llm.stats.preemptions + llm.stats.resumes > 0
        return tokens

    alone = answers(True)
    assert alone != unbounded
    assert answers(False, max_num_batched_tokens=24, paused=True) == alone
    assert answers(False, num_blocks=10, headroom=0) == alone


@every_hybrid
def test_prefix_caching_is_off(folder, caplog):
    with caplog.at_level(logging.WARNING):
        make_llm(folder, None)
    assert [record.message for record in caplog.records if "prefix" in record.message] == [
        f"prefix caching is off: blocks don't hold what recurrent layers of {folder.name.rstrip('0123456789')} keep"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_llm(folder, None, enable_prefix_caching=False)
    assert not [record for record in caplog.records if "prefix" in record.message]


@pytest.mark.parametrize(("num_blocks", "told"), [(16, True), (4096, False)])
def test_states_that_take_much_of_the_memory_are_told_of(folder, caplog, num_blocks, told):
    with caplog.at_level(logging.WARNING):
        make_llm(folder, None, num_blocks=num_blocks, max_num_seqs=64)
    messages = [record.message for record in caplog.records if "recurrent states" in record.message]
    assert len(messages) == told
    assert all(message.startswith("max_num_seqs=64: recurrent states take ") for message in messages)


@every_hybrid
def test_what_is_not_supported_says_so(folder, tmp_path, monkeypatch):
    """And reads no weight."""
    monkeypatch.setattr(SafetensorsFolder, "read", None)
    with pytest.raises(ValueError, match=r"^tensor_parallel_size=2: qwen3_\S+ is not supported: use one device"):
        make_llm(folder, None, tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"^policy=critical: weighs .*, and qwen3_\S+ has a gate of each query"):
        make_llm(folder, Case("critical"))
    with pytest.raises(ValueError, match=r"^model=.*: recurrent layers can't be simulated"):
        SimulatedLLM(str(folder), times=None, skip_tokenizer_init=True)
    told = {"source": {}, "device": "cpu"}
    for write in (
        lambda out: calibrate(str(folder), [[1] * 9], out, kind="q_filters", **told),
        lambda out: train_scorer(str(folder), [([1] * 9, 4)] * 10, out, **told),
    ):
        with pytest.raises(ValueError, match=r"^calibration of \S+: qwen3_\S+ is not supported: calibrate another"):
            write(tmp_path / "file")


def test_a_policy_that_turns_queries_needs_whole_heads(folder):
    with pytest.raises(ValueError, match="policy=expected_attention: needs heads whose dimensions all rotate"):
        make_llm(folder, Case("expected_attention", {"stats": "window"}))


@torch.inference_mode()
def test_the_largest_step_is_of_prompts_of_all_rows(folder):
    """As it is measured on a GPU."""
    runner = make_llm(folder, None, debug=False, max_num_batched_tokens=200)._core.runner
    run_largest_step(runner, runner.cache, 200)
    states = runner.recurrent.state
    assert (states.flatten(2).std(dim=-1) > 0).all()
