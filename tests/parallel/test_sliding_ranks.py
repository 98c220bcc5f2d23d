"""Models whose layers differ in what they attend to, spread over processes."""

import pytest

from tests.engine.compressed import greedy, random_prompts, tokens_of
from tests.eviction.cases import SMALL_CHUNK, Case
from tests.parallel.ranked import TOKEN_POLICIES, answers, engine
from tests.tiny_models import FORMED, VOCAB, save_tiny_model

pytestmark = pytest.mark.usefixtures("forked_children")


@pytest.fixture(scope="module", name="folder", params=sorted(FORMED))
def model_folder(request, tmp_path_factory):
    """Two KV heads, and a window of 24 in every other layer."""
    return save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_keep_what_one_device_keeps(folder, size):
    """Of four each KV head is on two, which hold its group's sinks."""
    one = engine(folder, Case("zipage", SMALL_CHUNK))
    ranks = engine(folder, Case("zipage", SMALL_CHUNK), tensor_parallel_size=size, layer_stride=2)
    policies = TOKEN_POLICIES[::3] if size == 2 else TOKEN_POLICIES[:1]
    expected, found = (answers(llm, policies, pauses=0.2, max_tokens=40) for llm in (one, ranks))
    stats = ranks.stats
    ranks.shutdown()
    assert not expected.differences(found)
    assert len(found.kept) > 2 * len(policies)
    assert stats.pauses
    assert stats.blocks_used == 0


def test_ranks_answer_as_one_device_in_full(folder):
    prompts = random_prompts((5, 60, 90), VOCAB)
    found = []
    for options in ({}, {"tensor_parallel_size": 2}):
        llm = engine(folder, None, **options)
        found.append(tokens_of(llm.generate(prompts, greedy(50), use_tqdm=False)))
        llm.shutdown()
    assert found[0] == found[1]
