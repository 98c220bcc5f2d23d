"""What a step leaves in the cache beside keys and values, and plans that move blocks."""

import pytest
import torch

from tests.models.dense import dense_attention
from tests.tiny_models import save_tiny_model
from zipage.eviction import registry
from zipage.eviction.budget import Budget
from zipage.eviction.rule import EvictionRule
from zipage.models.loading.loader import load_model
from zipage.sampling_params import SamplingParams
from zipage.scheduling.batch import Batch, Chunk, Preemption, Swap
from zipage.scheduling.planner import plan_step
from zipage.scheduling.request import Request
from zipage.worker.kv_cache import NOWHERE, KVCache
from zipage.worker.model_runner import ModelRunner

SIZE, WINDOW = 16, 4
RULE = EvictionRule(registry.make("snapkv", {"window": WINDOW}), Budget(4, SIZE))
NO_QUERIES = EvictionRule(registry.make("random", {}), Budget(4, SIZE))
TEXT = [(7 * i + 3) % 300 for i in range(80)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))
    return load_model(str(folder), load_format="auto", dtype="float32", device="cpu", seed=0)


@pytest.fixture
def runner(loaded):
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 512, "max_model_len": 256}
    runner = ModelRunner(loaded.decoder, loaded.spec, torch.device("cpu"), **sizes)
    options = {"positions": True, "scores": True, "num_query_slots": 3, "window": WINDOW}
    cache = KVCache(loaded.spec, 20, SIZE, torch.float32, torch.device("cpu"), **options)
    cache.poison(slice(None))
    cache.poison_queries(slice(None))
    runner.attach(cache)
    return runner


def make_request(row: int, length: int, blocks: list[int], rule=RULE, query_slot=-1) -> Request:
    request = Request(str(row), TEXT[:length], SamplingParams(temperature=0.0), max_total_tokens=256, rule=rule)
    request.number = request.row = row
    request.query_slot = query_slot
    request.hold(blocks)
    return request


def run(runner: ModelRunner, batch: Batch) -> None:
    """Compute a batch and book it, without the sampled token: the text goes on as `TEXT`."""
    batch.sampled = batch.decodes + [r for r, n in batch.prefills if r.num_computed + n == r.num_tokens]
    batch.entered = [chunk.request for chunk in batch.prefills]
    plan = plan_step(batch)
    runner.move(plan)
    result = runner.launch(plan).wait()
    assert len(result.token_ids) == len(batch.sampled)
    for request, num_tokens in [(r, 1) for r in batch.decodes] + batch.prefills:
        request.num_computed += num_tokens
        request.cache_len += num_tokens
    for request in batch.sampled:
        request.token_ids.append(TEXT[request.num_tokens])


@torch.inference_mode()
def queries_of(loaded, length: int) -> torch.Tensor:
    """[L, length, Hq, d] of the text, by a dense forward pass."""
    recorded = []

    def attention(layer, q, k, v):
        recorded.append(q)
        return dense_attention(layer, q, k, v)

    loaded.decoder(torch.tensor(TEXT[:length]), torch.arange(length), attention)
    return torch.stack(recorded)


def check_ring(runner, loaded, request: Request) -> None:
    """The request's query slot holds the queries of its last w tokens."""
    n = request.num_computed
    expected = queries_of(loaded, n)
    for position in range(n - WINDOW, n):
        stored = runner.cache.queries[:, request.query_slot, position % WINDOW]
        torch.testing.assert_close(stored, expected[:, position], rtol=1e-4, atol=1e-4)


def test_positions_and_latest_queries_of_every_token_are_kept(runner, loaded):
    first = make_request(0, 23, [3, 8], query_slot=2)
    second = make_request(1, 41, [5, 1, 9], query_slot=0)
    without = make_request(2, 9, [12])
    windowless = make_request(3, 9, [13], NO_QUERIES, query_slot=1)
    run(runner, Batch(prefills=[Chunk(first, 23), Chunk(second, 17), Chunk(without, 9), Chunk(windowless, 9)]))
    check_ring(runner, loaded, first)
    run(runner, Batch(decodes=[first, without, windowless], prefills=[Chunk(second, 2)]))
    run(runner, Batch(decodes=[windowless, first, without], prefills=[Chunk(second, 22)]))
    run(runner, Batch(decodes=[second, first]))
    for request in (first, second):
        check_ring(runner, loaded, request)
    cache = runner.cache
    assert cache.queries[:, 1].isnan().all()
    for request in (first, second, without, windowless):
        held = cache.positions[:, request.block_ids].transpose(1, 2).flatten(2)
        assert (held[..., : request.cache_len] == torch.arange(request.cache_len)).all()
        assert (held[..., request.cache_len :] == NOWHERE).all()
    assert cache.scores[0].isnan().all()


def test_logical_positions_go_on_where_slots_do_not(runner):
    request = make_request(0, 40, [3, 8, 4], query_slot=0)
    run(runner, Batch(prefills=[Chunk(request, 40)]))
    # As after a compression to one block.
    request.hold([3, 8])
    request.cache_len = 16
    run(runner, Batch(decodes=[request]))
    assert (runner.cache.positions[:, 8, :, 0] == 40).all()
    assert (runner.cache.positions[:, 8, :, 1] == 17).all()


def test_without_a_query_slot_nothing_is_stored(runner):
    request = make_request(0, 20, [3, 8])
    run(runner, Batch(prefills=[Chunk(request, 20)]))
    assert runner.cache.queries.isnan().all()


def test_copies_take_positions_along(runner):
    request = make_request(0, 20, [3, 8])
    run(runner, Batch(prefills=[Chunk(request, 20)]))
    other = make_request(1, 20, [3, 6])
    other.num_computed = other.cache_len = 19
    run(runner, Batch(copies=[(8, 6)], prefills=[Chunk(other, 1)]))
    assert (runner.cache.positions[:, 6, :, :4] == torch.arange(16, 20)).all()
    torch.testing.assert_close(runner.cache.k[:, 6, :, :4], runner.cache.k[:, 8, :, :4], rtol=1e-4, atol=1e-5)


def test_a_plan_without_tokens_computes_nothing(runner):
    request = make_request(0, 40, [3, 8, 4])
    plan = plan_step(Batch(preempted=[Preemption(request, 40, 3)]))
    runner.move(plan)
    result = runner.launch(plan).wait()
    assert (result.token_ids, result.logprobs) == ([], None)


def test_swaps_move_blocks_and_queries(runner):
    request = make_request(0, 40, [3, 8, 4], query_slot=2)
    run(runner, Batch(prefills=[Chunk(request, 40)]))
    cache = runner.cache
    expected = [x[:, [3, 8, 4], :, :8].clone() for x in (cache.k, cache.v)]
    queries = cache.queries[:, 2].clone()
    runner.move(plan_step(Batch(paused=[Swap(request, [3, 8, 4], 0, 2)])))
    cache.poison(slice(None))
    cache.poison_queries(2)
    runner.move(plan_step(Batch(resumed=[Swap(request, [1, 0, 11], 0, 1)])))
    assert not runner.swapper.copies
    for x, before in zip((cache.k, cache.v), expected, strict=True):
        assert torch.equal(x[:, [1, 0, 11], :, :8], before)
    assert torch.equal(cache.queries[:, 1], queries)


def test_pauses_come_before_resumptions_into_the_same_blocks(runner):
    one, two = make_request(0, 16, [3]), make_request(1, 15, [8])
    run(runner, Batch(prefills=[Chunk(one, 16), Chunk(two, 15)]))
    keys = runner.cache.k[:, 3].clone(), runner.cache.k[:, 8, :, :15].clone()
    runner.move(plan_step(Batch(paused=[Swap(one, [3], 0, -1)])))
    runner.move(plan_step(Batch(paused=[Swap(two, [8], 0, -1)], resumed=[Swap(one, [8], 0, -1)])))
    assert torch.equal(runner.cache.k[:, 8], keys[0])
    runner.move(plan_step(Batch(resumed=[Swap(two, [3], 0, -1)])))
    assert torch.equal(runner.cache.k[:, 3, :, :15], keys[1])


def test_what_was_saved_is_dropped_by_the_number_of_its_request(runner):
    one, two = make_request(0, 16, [3]), make_request(1, 15, [8])
    run(runner, Batch(prefills=[Chunk(one, 16), Chunk(two, 15)]))
    runner.move(plan_step(Batch(paused=[Swap(one, [3], 0, -1), Swap(two, [8], 0, -1)])))
    runner.move(plan_step(Batch(), drops=[one.number]))
    assert runner.swapper.copies.keys() == {two.number}
