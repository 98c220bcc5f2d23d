"""What a trained scorer says of every entry: that of the offline score, however the entry came to be."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.calibrations import MADE_UP, arrays, given
from tests.engine.compressed import UNBOUNDED, greedy, make_llm, pause_now_and_then, random_prompts, tokens_of
from tests.eviction.cases import Case
from tests.tiny_models import VOCAB, save_tiny_model
from zipage import LLM
from zipage.eviction.calibration import write_calibration
from zipage.models.decoder import Decoder
from zipage.models.loading.identity import model_identity

KVZAP = Case("kvzap", MADE_UP)
PROMPTS = random_prompts([70, 20], VOCAB)
PROMPTS.append(PROMPTS[0][:48] + PROMPTS[1])  # which finds a prefix


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def offline(folder):
    """[L, H, T] of token ids, from transformers' hidden states in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with safe_open(given(KVZAP.options, "kvzap", folder)["calibration"], framework="np") as file:
        weight, bias = (file.get_tensor(name).astype(np.float64) for name in ("weight", "bias"))
    inputs = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _, __, out: inputs.append(out[0].detach().numpy()))

    def scored(token_ids: list[int]) -> np.ndarray:
        inputs.clear()
        model(torch.tensor([token_ids]))
        return np.stack([w @ x.T + b[:, None] for w, x, b in zip(weight, inputs, bias, strict=True)])

    return scored


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 8}, {"async_compression": True}], ids=str)
@pytest.mark.parametrize("paused", [False, True])
def test_entries_carry_the_offline_score(folder, offline, options, paused):
    """In chunks or whole, computed or found, paused or not."""
    llm = make_llm(folder, KVZAP, budget=UNBOUNDED, **options)
    llm.generate(PROMPTS[0], greedy(1), use_tqdm=False)
    if paused:
        pause_now_and_then(llm, share=0.5)
    for prompt in PROMPTS:
        llm.add_request(prompt, greedy(40, n=2))
    scheduler, runner, checked, found = llm._core.scheduler, llm._core.runner, 0, 0
    while llm.has_unfinished_requests():
        outputs = llm.step()
        found += sum(output.metrics.cached_tokens for output in outputs)
        for request in scheduler.running if llm.stats.steps % 5 == 0 else ():
            if request.cache_len < 60 or request.status.name != "RUNNING":
                continue
            held = runner.cache.predictions[:, request.block_ids].transpose(1, 2).flatten(2)[..., : request.cache_len]
            tokens = list(request.token_ids)[: request.cache_len]
            np.testing.assert_allclose(held.double().numpy(), offline(tokens), atol=2e-4)
            checked += 1
    assert checked >= 8
    assert found > 48
    assert not paused or llm.stats.resumes > 0


def test_nothing_is_kept_and_nothing_runs_where_no_policy_predicts(folder, monkeypatch):
    observers = []
    forward = Decoder.forward

    def watched(self, token_ids, positions, attention, observe=None, *more):
        observers.append(observe)
        return forward(self, token_ids, positions, attention, observe, *more)

    monkeypatch.setattr(Decoder, "forward", watched)
    sizes = {}
    for case in (None, Case("random"), KVZAP):
        llm = make_llm(folder, case)
        llm.generate(PROMPTS[:1], greedy(3), use_tqdm=False)
        sizes[case and case.policy] = llm.memory_plan.block_bytes
        assert (llm._core.runner.cache.predictions is not None) == (case is KVZAP)
        assert all((observe is not None) == (case is KVZAP) for observe in observers)
        observers.clear()
    assert sizes["kvzap"] - sizes["random"] == 2 * 2 * 16 * 4


def test_samples_that_share_a_prompt_equal_each_alone(folder):
    """The last block of the prompt is copied, predictions too; debug mode would find any that is missing."""
    llm = make_llm(folder, KVZAP, budget=48)
    params = [greedy(60, seed=i, n=3) for i in range(2)]
    together = tokens_of(llm.generate(PROMPTS[:2], params, use_tqdm=False))
    assert llm.stats.compressions_applied > 0
    alone = [
        make_llm(folder, KVZAP, budget=48).generate([prompt], greedy(60, seed=i), use_tqdm=False)[0]
        for i, prompt in enumerate(PROMPTS[:2])
    ]
    assert together == [tokens for tokens in tokens_of(alone) for _ in range(3)]


def test_requests_of_other_policies_share_an_engine_and_its_prefixes(folder):
    llm = make_llm(folder, KVZAP, budget=48, max_num_batched_tokens=512)
    params = [greedy(60, policy=policy) for policy in ("full", "knorm", None)]
    outputs = llm.generate([PROMPTS[0]] * 3, params, use_tqdm=False)
    expected = make_llm(folder, KVZAP, budget=48).generate([PROMPTS[0]], greedy(60), use_tqdm=False)
    assert tokens_of(outputs[2:]) == tokens_of(expected)
    assert outputs[2].metrics.compressions > 0


def test_a_request_cannot_ask_for_it_elsewhere(folder):
    (output,) = make_llm(folder, Case("random")).generate([PROMPTS[1]], greedy(5, policy="kvzap"), use_tqdm=False)
    assert "kvzap.calibration: give the calibration file of the model; make it: python -m experiments.train_scorer" in (
        output.error
    )


def test_a_scorer_of_another_width_is_refused(folder, tmp_path):
    identity = model_identity(str(folder))
    heads = identity["num_kv_heads"]
    made = arrays("kvzap", 2, heads, identity["num_heads"] // heads, identity["head_dim"], width=10)
    write_calibration(tmp_path / "file", "kvzap", {n: torch.from_numpy(a) for n, a in made.items()}, identity, {})
    with pytest.raises(ValueError, match=r"kvzap.calibration=.*weight \[2, 2, 10\] and bias \[2, 2\] are not of"):
        LLM(str(folder), skip_tokenizer_init=True, device="cpu", num_blocks=8, policy="kvzap", budget_tokens=64,
            policy_options={"calibration": str(tmp_path / "file")})  # fmt: skip
