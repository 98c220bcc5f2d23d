"""Norms of projected values, and who may ask for them."""

from types import SimpleNamespace

import pytest
import torch

from tests.engine.compressed import greedy, make_llm, random_prompts, tokens_of
from tests.eviction.cases import Case
from tests.tiny_models import VOCAB, save_tiny_model
from zipage.eviction import registry
from zipage.worker.output_norms import OutputNorms
from zipage.worker.worker import Worker


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("most", [1, 2**24])
def test_output_norms_are_those_of_the_projected_values(dtype, norm, most, monkeypatch):
    monkeypatch.setattr("zipage.worker.output_norms.PROJECTED", most)
    heads, group, dim, width = 2, 3, 8, 40
    weights = [torch.randn(width, heads * group * dim).to(dtype) for _ in range(2)]
    values = torch.randn(2, heads, 11, dim).to(dtype)
    found = OutputNorms(weights, heads, dim, norm).of(1, values.float())
    for row in range(2):
        for head in range(heads):
            for entry in range(11):
                each = []
                for g in range(head * group, (head + 1) * group):
                    projected = weights[1][:, g * dim : (g + 1) * dim].double() @ values[row, head, entry].double()
                    each.append(projected.norm(p={"l1": 1, "l2": 2}[norm]))
                expected = float(sum(each) / group)
                assert float(found[row, head, entry]) == pytest.approx(expected, rel=1e-5 if norm == "l2" else 3e-3)


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
