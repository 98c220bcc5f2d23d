"""A small engine over random weights: fixtures and a helper to read its text."""

import pytest

from tests.tiny_models import save_tiny_model, save_tiny_tokenizer
from zipage import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


@pytest.fixture(scope="module", name="folder")
def small_folder(tmp_path_factory):
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))
    save_tiny_tokenizer(folder)
    return folder


def make_llm(folder, **options) -> LLM:
    defaults = {"device": "cpu", "block_size": 16, "num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return LLM(str(folder), **defaults | {"debug": True} | options)


@pytest.fixture(scope="module", name="shared_llm")
def small_shared_llm(folder):
    return make_llm(folder)


@pytest.fixture(name="llm")
def small_llm(shared_llm):
    yield shared_llm
    assert not shared_llm.has_unfinished_requests()
    assert shared_llm.stats.blocks_used == 0


def text_of(llm, **options) -> tuple[str, list[int]]:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 60, "ignore_eos": True} | options)
    sample = llm.generate(["Once upon a time"], params, use_tqdm=False)[0].outputs[0]
    return sample.text, sample.token_ids
