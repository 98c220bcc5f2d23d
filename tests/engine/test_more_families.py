"""Families beside those of `test_engine_equals_transformers`: each once through all that must not change a token."""

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
from tests.parallel.ranked import TOKEN_POLICIES, answers, engine
from tests.tiny_models import FORMED, LONGROPE, MORE_FAMILIES, VOCAB, save_tiny_model, transformers_greedy
from zipage import SamplingParams
from zipage.models.decoder import Decoder
from zipage.models.loading.safetensors_folder import SafetensorsFolder
from zipage.worker.calibrate import calibrate
from zipage.worker.paged_attention import PagedAttention
from zipage.worker.train_scorer import train_scorer

pytestmark = pytest.mark.usefixtures("forked_children")

NUM_TOKENS = 100
"""More than the longest prompt leaves of a block of 256."""
LENGTHS = (17, 33, 70, 200)
NUM_LAYERS = 2


@pytest.fixture(scope="module", params=sorted(MORE_FAMILIES))
def folder(request, tmp_path_factory):
    """Made by transformers itself."""
    return save_tiny_model(request.param, tmp_path_factory.mktemp(request.param), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS, VOCAB)


@pytest.fixture(scope="module")
def expected(folder, model, prompts):
    guesses = tokens_of(make_llm(folder, None).generate(prompts, greedy(NUM_TOKENS), use_tqdm=False))
    tokens = [transformers_greedy(model, *each)[0] for each in zip(prompts, [NUM_TOKENS] * len(prompts), guesses)]
    assert min(len(set(each)) for each in tokens) > 20, "a text that loops would agree with anything"
    return tokens


@pytest.mark.parametrize(("block_size", "num_blocks"), [(16, 28), (256, 4)])
def test_tokens_of_transformers(folder, prompts, expected, block_size, num_blocks):
    """Mixed lengths in chunks, preemptions and pauses; then again, where the first run left prefixes."""
    options = {"block_size": block_size, "num_blocks": num_blocks, "max_num_batched_tokens": 40}
    llm = make_llm(folder, None, headroom=0, **options)
    pause_now_and_then(llm, share=0.04)
    for num_tokens in (NUM_TOKENS, 20):
        outputs = llm.generate(prompts, greedy(num_tokens), use_tqdm=False)
        assert tokens_of(outputs) == [tokens[:num_tokens] for tokens in expected]
    assert sum(output.metrics.cached_tokens for output in outputs) > 0 or block_size == 256
    assert llm.stats.preemptions > 0
    assert llm.stats.pauses == llm.stats.resumes > 0


plain_families = pytest.mark.parametrize("folder", sorted(set(MORE_FAMILIES) - FORMED), indirect=True)


@plain_families
def test_unbounded_budgets_give_the_tokens_of_full_kv(folder, prompts, expected):
    llm = make_llm(folder, Case("zipage", SMALL_CHUNK), budget=UNBOUNDED, num_blocks=512, max_num_seqs=64)
    params = [
        SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, policy=policy)
        for policy in TOKEN_POLICIES
        for _ in prompts
    ]
    tokens = tokens_of(llm.generate(prompts * len(TOKEN_POLICIES), params, use_tqdm=False))
    assert tokens == [each[:30] for each in expected] * len(TOKEN_POLICIES)


@plain_families
@pytest.mark.parametrize("case", [Case("zipage", SMALL_CHUNK), Case("h2o")], ids=str)
def test_what_each_head_keeps_equals_the_simulation(folder, case, monkeypatch):
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
        for (layer, head), positions in kept.items():
            assert event.kept_positions[layer, head].tolist() == positions, (event.round, layer, head)


def test_two_ranks_answer_as_one_device(tmp_path):
    """Experts are spread too, and the routers of both agree."""
    folder = save_tiny_model("qwen3_moe", tmp_path, num_hidden_layers=NUM_LAYERS)
    case = Case("zipage", SMALL_CHUNK)
    one, two = engine(folder, case), engine(folder, case, tensor_parallel_size=2)
    expected, found = (answers(llm, max_tokens=40) for llm in (one, two))
    two.shutdown()
    assert found.kept
    assert not expected.differences(found)


@pytest.mark.parametrize(
    ("family", "what"), [("gemma3_text", r"window=24 \(layer 0\)"), ("gpt_oss", r"window=24 \(layer 0\)")]
)
def test_what_takes_plain_attention_says_so(family, what, tmp_path, monkeypatch):
    """And reads no weight."""
    monkeypatch.setattr(SafetensorsFolder, "read", None)
    folder = str(save_tiny_model(family, tmp_path, num_hidden_layers=NUM_LAYERS))
    told = {"source": {}, "device": "cpu"}
    for write in (
        lambda out: calibrate(folder, [[1] * 9], out, kind="expected_attention", **told),
        lambda out: train_scorer(folder, [([1] * 9, 4)] * 10, out, **told),
    ):
        with pytest.raises(ValueError, match=f"^calibration of .*: attention with {what} is not supported: calibrate"):
            write(tmp_path / "file")


def test_logits_of_hidden_states_are_capped(tmp_path):
    runner = make_llm(save_tiny_model("gemma3_text", tmp_path, num_hidden_layers=1), None)._core.runner
    hidden = 20 * torch.randn(3, runner.spec.width, generator=torch.Generator().manual_seed(0))
    logits = runner.logits(hidden)
    torch.testing.assert_close(logits, runner.decoder.logits(hidden))
    assert 20 < logits.max() <= 30


def test_longrope_follows_the_longest_context(tmp_path):
    """Up to where it begins, and beyond, an engine has the frequencies that transformers has for such texts."""
    folder = save_tiny_model("phi3", tmp_path, num_hidden_layers=NUM_LAYERS)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = random_prompts((1, 4), VOCAB)
    short, long = (
        tokens_of(make_llm(folder, None, max_model_len=length).generate(prompts, greedy(12), use_tqdm=False))
        for length in (16, 17)
    )
    assert short == [transformers_greedy(model, prompt, 12)[0] for prompt in prompts]
    assert short != long


def test_a_window_ends_contexts(tmp_path):
    folder = save_tiny_model("mistral", tmp_path, num_hidden_layers=1, sliding_window=64)
    assert make_llm(folder, None).generate([[1] * 60], greedy(50), use_tqdm=False)[0].outputs[0].token_ids
    with pytest.raises(ValueError, match=r"max_model_len=65: the model's positions end at 64, .* sliding window"):
        make_llm(folder, None, max_model_len=65)


def test_policies_that_turn_queries_say_what_they_need(tmp_path):
    whole = LONGROPE | {name: LONGROPE[name] + [9.0, 10.0] for name in ("short_factor", "long_factor")}
    for name, options, message in (
        ("part", {}, "heads whose dimensions all rotate; of this model's 16 12 do"),
        ("whole", {"partial_rotary_factor": 1.0, "rope_parameters": whole}, "one set of rotary frequencies"),
    ):
        folder = save_tiny_model("phi3", tmp_path / name, num_hidden_layers=1, **options)
        with pytest.raises(ValueError, match=f"policy=expected_attention: needs {message}"):
            make_llm(folder, Case("expected_attention", {"stats": "window"}))
