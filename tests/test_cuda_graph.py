"""What a decode graph computes, without a GPU to capture it on."""

import pytest
import torch

from tests.compressed import greedy, make_llm, random_prompts
from tests.eviction.cases import Case
from tests.tiny_models import VOCAB, save_tiny_model
from zipage.cuda_graph import DecodeGraphs, batch_sizes


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (5, [1, 2, 4, 5]), (33, [1, 2, 4, 8, 16, 32, 33])])
def test_sizes_end_with_the_largest_batch(largest, sizes):
    assert batch_sizes(largest) == sizes


def test_sizes_of_large_batches():
    sizes = batch_sizes(512)
    assert sizes == sorted(set(sizes))
    assert sizes[-4:] == [416, 448, 480, 512]


@pytest.mark.parametrize("case", [None, Case("zipage", {"chunk": 32}), Case("random")], ids=str)
def test_a_padded_batch_gives_the_logits_of_an_eager_step(tmp_path, case):
    llm = make_llm(save_tiny_model("qwen3", tmp_path), case, debug=False)
    runner, scheduler = llm._runner, llm._scheduler
    for prompt in random_prompts([5, 20, 70], VOCAB):
        llm.add_request(prompt, greedy(50))
    for _ in range(20):
        llm.step()
    plan = scheduler.schedule()
    assert len(plan.decodes) == 3
    cache = runner.cache
    tensors = [*cache.entry_tensors, *([] if cache.queries is None else [cache.queries])]
    state = [x.clone() for x in tensors]
    with torch.inference_mode():
        expected = runner.forward(plan)
        computed = [x.clone() for x in tensors]
        for x, before in zip(tensors, state, strict=True):
            x.copy_(before)
        graphs = DecodeGraphs(runner.decoder, cache, runner.scale, runner._tables, runner._sampled)
        inputs = graphs.inputs(runner._decode_batch(plan), 8)
        logits = runner.decoder.logits(graphs.forward(inputs))
    torch.testing.assert_close(logits[:3], expected, rtol=1e-5, atol=1e-5)
    for x, once in zip(tensors, computed, strict=True):
        torch.testing.assert_close(x, once, rtol=1e-5, atol=1e-5, equal_nan=True)
