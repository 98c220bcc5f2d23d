"""Greedy tokens of the engine against transformers, token for token."""

import random

import pytest
from transformers import AutoModelForCausalLM

from tests.tiny_models import FAMILIES, VOCAB, save_tiny_model, transformers_greedy
from zipage import LLM, SamplingParams

NUM_TOKENS = 60
LENGTHS = (1, 15, 17, 70, 220)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def reference(request, tmp_path_factory):
    """A model folder, prompts of mixed lengths, and transformers' tokens and log-probabilities for them."""
    folder = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in LENGTHS]
    outputs = make_llm(folder).generate(prompts, PARAMS, use_tqdm=False)
    guesses = [output.outputs[0].token_ids for output in outputs]
    return folder, prompts, [transformers_greedy(model, p, NUM_TOKENS, guess) for p, guess in zip(prompts, guesses)]


def make_llm(folder, **options) -> LLM:
    defaults = {
        "skip_tokenizer_init": True,
        "device": "cpu",
        "num_blocks": 2048 // options.get("block_size", 16),
        "block_size": 16,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "debug": True,
    }
    return LLM(str(folder), **defaults | options)


PARAMS = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=True)


def check(outputs, expected) -> None:
    for output, (tokens, logprobs) in zip(outputs, expected, strict=True):
        assert output.error is None
        sample = output.outputs[0]
        assert sample.finish_reason == "length"
        assert sample.token_ids == tokens
        assert [
            of[token].logprob for token, of in zip(sample.token_ids, sample.logprobs, strict=True)
        ] == pytest.approx(logprobs, rel=1e-4, abs=1e-4)


def test_reference_wanders(reference):
    """A text that loops would agree with anything."""
    assert min(len(set(tokens)) for tokens, _ in reference[2]) > 15


def test_a_wrong_guess_changes_no_token_of_the_reference(reference):
    folder, prompts, expected = reference
    tokens, logprobs = (part[:12] for part in expected[1])
    wrong = [*tokens[:5], (tokens[5] + 1) % VOCAB, *tokens[6:]]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for guess in ([], wrong, tokens[:3]):
        found = transformers_greedy(model, prompts[1], 12, guess)
        assert found == (tokens, pytest.approx(logprobs, abs=1e-4))


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("chunk", [512, 40], ids=["whole", "chunked"])
def test_mixed_batch(reference, block_size, chunk):
    folder, prompts, expected = reference
    llm = make_llm(folder, block_size=block_size, max_num_batched_tokens=chunk)
    check(llm.generate(prompts, PARAMS, use_tqdm=False), expected)
    assert llm.stats.preemptions == 0


@pytest.mark.parametrize("block_size", [16, 256])
def test_prefix_hits(reference, block_size):
    folder, prompts, expected = reference
    llm = make_llm(folder, block_size=block_size, num_blocks=8192 // block_size)
    llm.generate(prompts, PARAMS, use_tqdm=False)
    # Prompts that go on where the first answers were: hits in blocks that decoding filled too.
    cut = 40
    longer = [prompt + tokens[:cut] for prompt, (tokens, _) in zip(prompts, expected)]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS - cut, ignore_eos=True, logprobs=True)
    outputs = llm.generate(longer, params, use_tqdm=False)
    check(outputs, [(tokens[cut:], logprobs[cut:]) for tokens, logprobs in expected])
    cached = [output.metrics.cached_tokens for output in outputs]
    assert cached == [(len(prompt) - 1) // block_size * block_size for prompt in longer]
    assert sum(cached) > 0


@pytest.mark.parametrize(("block_size", "num_blocks"), [(16, 19), (256, 3)])
@pytest.mark.parametrize("caching", [True, False], ids=["prefix-cache", "no-prefix-cache"])
def test_preemption(reference, block_size, num_blocks, caching):
    folder, prompts, expected = reference
    llm = make_llm(folder, block_size=block_size, num_blocks=num_blocks, enable_prefix_caching=caching)
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    check(outputs, expected)
    if block_size == 16:
        assert llm.stats.preemptions > 0
        assert sum(output.metrics.preemptions for output in outputs) == llm.stats.preemptions


def test_unchunked_prefill(reference):
    folder, prompts, expected = reference
    llm = make_llm(folder, enable_chunked_prefill=False, max_model_len=512)
    check(llm.generate(prompts, PARAMS, use_tqdm=False), expected)


def test_samples_of_one_prompt(reference):
    folder, prompts, expected = reference
    params = SamplingParams(n=3, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=True)
    for block_size in (16, 256):
        llm = make_llm(folder, block_size=block_size, enable_prefix_caching=False)
        output = llm.generate([prompts[3]], params, use_tqdm=False)[0]
        for sample in output.outputs:
            assert sample.token_ids == expected[3][0]
        assert output.metrics.cached_tokens == 2 * (len(prompts[3]) - 1)


def test_text_does_not_depend_on_the_batch(reference):
    folder, prompts, expected = reference
    llm = make_llm(folder)
    for prompt, one in zip(prompts, expected, strict=True):
        check(llm.generate([prompt], PARAMS, use_tqdm=False), [one])
