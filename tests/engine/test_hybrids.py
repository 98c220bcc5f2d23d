"""Models with recurrent layers: each once through all that must not change a token."""

import pytest
from transformers import AutoModelForCausalLM

from tests.engine.compressed import UNBOUNDED, greedy, make_llm, pause_now_and_then, random_prompts, tokens_of
from tests.eviction.cases import SMALL_CHUNK, Case
from tests.tiny_models import HYBRIDS, VOCAB, save_tiny_model, transformers_greedy
from zipage import SamplingParams

NUM_TOKENS = 200
LENGTHS = (1, 17, 33, 70, 200)
NUM_LAYERS = 4
POLICIES = ("zipage", "h2o", "snapkv", "r_kv", "streaming", "keydiff", "full")


@pytest.fixture(scope="module", params=sorted(HYBRIDS))
def folder(request, tmp_path_factory):
    """Made by transformers itself."""
    return save_tiny_model(request.param, tmp_path_factory.mktemp(request.param), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS, VOCAB)


@pytest.fixture(scope="module")
def expected(folder, prompts):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = [transformers_greedy(model, prompt, NUM_TOKENS)[0] for prompt in prompts]
    assert min(len(set(each)) for each in tokens) > 20, "a text that loops would agree with anything"
    return tokens


@pytest.mark.parametrize(("block_size", "num_blocks"), [(16, 34), (256, 4)])
def test_tokens_of_transformers(folder, prompts, expected, block_size, num_blocks):
    """Mixed lengths in chunks, preemptions and pauses; then again, in rows that others have left."""
    llm = make_llm(
        folder, None, block_size=block_size, num_blocks=num_blocks, max_num_batched_tokens=40, max_num_seqs=4
    )
    pause_now_and_then(llm, share=0.02)
    for num_tokens in (NUM_TOKENS, 20):
        outputs = llm.generate(prompts, greedy(num_tokens), use_tqdm=False)
        assert tokens_of(outputs) == [tokens[:num_tokens] for tokens in expected]
        assert not any(output.metrics.cached_tokens for output in outputs)
    assert llm.stats.preemptions > 0
    assert llm.stats.pauses == llm.stats.resumes > 0
