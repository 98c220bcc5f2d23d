"""Who may ask for norms of projected values."""

from types import SimpleNamespace

import pytest

from tests.engine.compressed import greedy, make_llm, random_prompts, tokens_of
from tests.eviction.cases import Case
from tests.tiny_models import VOCAB, save_tiny_model
from zipage.eviction import registry
from zipage.worker.worker import Worker


def test_more_ranks_than_kv_heads_are_refused():
    """A rank then holds a part of its group's rows of the output projection."""
    worker = SimpleNamespace(policy=registry.make("critical"), _model_heads=2)
    decoder = SimpleNamespace(shard=SimpleNamespace(size=4))
    with pytest.raises(
        ValueError, match="tensor_parallel_size=4: policy 'critical' needs the output projection of whole"
    ):
        Worker._output_norms(worker, decoder)


def test_requests_may_ask_where_the_engine_holds_them(tmp_path):
    folder = save_tiny_model("qwen3", tmp_path, num_hidden_layers=2)
    prompts = random_prompts([40], VOCAB)
    expected = tokens_of(make_llm(folder, Case("critical")).generate(prompts, greedy(60), use_tqdm=False))
    llm = make_llm(folder, Case("critical", {"base": "h2o"}))
    outputs = llm.generate(prompts, greedy(60, policy="snapkv"), use_tqdm=False)
    assert tokens_of(outputs)
    assert outputs[0].metrics.compressions > 0
    (output,) = make_llm(folder, Case("snapkv")).generate(prompts, greedy(60, policy="critical"), use_tqdm=False)
    assert "policy='critical': needs norms of projected values" in output.error
    other = make_llm(folder, Case("critical", {"norm": "l2"}))
    (output,) = other.generate(prompts, greedy(60), use_tqdm=False)
    assert output.metrics.compressions > 0
    assert len(expected[0]) == 60
