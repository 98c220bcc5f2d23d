"""The largest step and the largest compression, whose memory is measured on CUDA; here they run on a CPU."""

import pytest
import torch

from tests.tiny_models import save_tiny_model
from zipage.eviction import registry
from zipage.eviction.allocation import make
from zipage.eviction.budget import Budget
from zipage.eviction.rule import EvictionRule
from zipage.models.loading.loader import load_model
from zipage.scheduling.plan import CompressionOrder
from zipage.worker import compression_batch, peak
from zipage.worker.compression_batch import batches
from zipage.worker.cuda_graph import StepGraphs
from zipage.worker.kv_cache import KVCache
from zipage.worker.model_runner import ModelRunner
from zipage.worker.peak import run_compression, run_largest_step

SIZE = 16
RULE = EvictionRule(registry.make("snapkv", {"window": 4}), Budget(4, SIZE))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))
    return load_model(str(folder), device="cpu")


def make_cache(loaded, **options) -> KVCache:
    return KVCache(loaded.spec, 5, SIZE, torch.float32, torch.device("cpu"), **options)


@torch.inference_mode()
def test_the_largest_step_has_as_many_tokens_as_a_step_may(loaded, monkeypatch):
    runner = ModelRunner(
        loaded.decoder, loaded.spec, torch.device("cpu"), max_num_seqs=4, max_num_batched_tokens=200, max_model_len=80
    )
    seen = []
    monkeypatch.setattr(loaded.decoder, "logits", lambda hidden: seen.append(len(hidden)) or torch.zeros(4, 300))
    cache = make_cache(loaded)
    cache.poison(slice(None))
    run_largest_step(runner, cache, 200)
    assert seen == [4]
    assert not cache.k.isnan().any(), "a request as long as the model allows fills every slot"


@pytest.mark.parametrize("interval_blocks", [1, 2, 3])
def test_a_measured_compression_reads_a_block_that_it_does_not_write(loaded, interval_blocks):
    cache = KVCache(loaded.spec, 4, SIZE, torch.float32, torch.device("cpu"), positions=True, scores=True)
    cache.poison(slice(None))
    rule = EvictionRule(registry.make("keydiff", {}), Budget(4, SIZE, interval_blocks), recent=4)
    run_compression(cache, loaded.spec, rule, None, False, 9, 2)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["pyramid", "adaptive"])
def test_tiles_are_measured_like_blocks(loaded, monkeypatch, name):
    made = []
    monkeypatch.setattr(peak, "_peak_of", lambda device, run: run() is None and 0)
    monkeypatch.setattr(peak, "KVCache", lambda *args, **options: made.append(KVCache(*args, **options)) or made[-1])
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 7 * SIZE, "max_model_len": 6 * SIZE}
    runner = ModelRunner(loaded.decoder, loaded.spec, torch.device("cpu"), **options)
    warmed = []
    monkeypatch.setattr(StepGraphs, "warm_up_largest", lambda graphs: warmed.append(graphs.most))
    rule = EvictionRule(RULE.policy, Budget(4, SIZE), recent=4, allocation=make(name))
    table_bytes = 5 * loaded.spec.num_layers * loaded.spec.num_kv_heads * 7 * 4
    kept = runner.step_graphs(make_cache(loaded), None).kept_bytes
    assert peak.measure_peak(runner, SIZE, torch.float32, rule=rule) == kept + table_bytes
    assert [cache.tiled for cache in made] == [True, True]
    assert warmed == [7 * SIZE]


@pytest.mark.parametrize(("asynchronous", "peak_bytes"), [(False, 100 + 3), (True, 10 + 100 + 3)])
def test_graphs_keep_their_memory_while_a_compression_runs(loaded, monkeypatch, asynchronous, peak_bytes):
    """Of a step, the graphs and two compressions."""
    measured = iter([10, 3, 100, 40])
    monkeypatch.setattr(peak, "_peak_of", lambda device, run: next(measured))
    options = {"max_num_seqs": 4, "max_num_batched_tokens": SIZE, "max_model_len": 6 * SIZE}
    runner = ModelRunner(loaded.decoder, loaded.spec, torch.device("cpu"), **options)
    kept = runner.step_graphs(make_cache(loaded), None).kept_bytes + runner.block_tables(make_cache(loaded)).nbytes
    options = {"rule": RULE, "asynchronous": asynchronous}
    assert peak.measure_peak(runner, SIZE, torch.float32, **options) == peak_bytes + kept


class Allocator:
    """CUDA's counters, and a run that takes `transient` bytes and leaves `left` behind the first time."""

    def __init__(self, monkeypatch) -> None:
        self.now = self.most = 1000
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: setattr(self, "most", self.now))

    def take(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.most = max(self.most, self.now)

    def run(self, transient: int, left: int, late: bool):
        kept = [left]

        def once() -> None:
            if not late:
                self.take(kept.pop() if kept else 0)
            self.take(transient)
            self.take(-transient)
            self.take(kept.pop() if kept else 0)

        return once


@pytest.mark.parametrize("late", [False, True])
def test_what_a_run_leaves_behind_is_counted_once(monkeypatch, late):
    """It is missing from what is free afterwards, so it is no part of the peak, whenever it came."""
    allocator = Allocator(monkeypatch)
    assert peak._peak_of(None, allocator.run(500, 64, late)) == 500
    assert allocator.now == 1064
    assert peak._peak_of(None, allocator.run(30, 0, late)) == 30


@torch.inference_mode()
def test_plan_and_use_agree(loaded, monkeypatch):
    """An engine that then takes all that was measured at once uses what is planned, and no more than the limit."""
    allocator = Allocator(monkeypatch)
    runs = iter([(500, 64, False), (200, 32, True), (100, 16, False), (40, 0, False)])
    monkeypatch.setattr(peak, "run_largest_step", lambda *_: step())
    step, graphs, long, many = (allocator.run(*next(runs)) for _ in range(4))
    monkeypatch.setattr(StepGraphs, "warm_up_largest", lambda _: graphs())
    compressions = [long, long, many, many, lambda: None]
    monkeypatch.setattr(peak, "run_compression", lambda *_, **__: compressions.pop(0)())
    options = {"max_num_seqs": 4, "max_num_batched_tokens": SIZE, "max_model_len": 6 * SIZE}
    runner = ModelRunner(loaded.decoder, loaded.spec, torch.device("cpu"), **options)
    measured = peak.measure_peak(runner, SIZE, torch.float32, rule=RULE, asynchronous=True)
    assert allocator.now == 1000 + 64 + 32 + 16
    tables = runner.block_tables(make_cache(loaded)).nbytes
    assert measured == 500 + (200 + runner.step_graphs(make_cache(loaded), None).kept_bytes) + 100 + tables


@torch.inference_mode()
def test_seen_tokens_stay_and_are_measured(loaded):
    """The sampler that is measured is the one that serves, so what it keeps is there before memory is divided."""
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 80, "max_model_len": 80}
    runner = ModelRunner(loaded.decoder, loaded.spec, torch.device("cpu"), **options)
    run_largest_step(runner, make_cache(loaded), 80)
    assert runner.sampler._seen.shape == (4, loaded.spec.vocab_size)


@pytest.mark.parametrize("max_num_seqs", [1, 3, 64])
@pytest.mark.parametrize("budget", [Budget(4, SIZE), Budget(6, SIZE, 3)])
def test_no_batch_of_compressions_is_larger_than_those_that_are_measured(loaded, monkeypatch, budget, max_num_seqs):
    """A batch holds few requests with long tables or many with short ones, of which each keeps as much."""
    cpu, longest = torch.device("cpu"), 40
    launch = 60 * SIZE * loaded.spec.num_kv_heads
    monkeypatch.setattr(peak, "LAUNCH_ENTRIES", launch)
    monkeypatch.setattr(compression_batch, "LAUNCH_ENTRIES", launch)
    monkeypatch.setattr(peak, "_peak_of", lambda device, run: run() or 0)
    measured = []
    monkeypatch.setattr(peak, "run_compression", lambda *options, **_: measured.append(options[-2:]))
    options = {"max_num_seqs": max_num_seqs, "max_model_len": longest * SIZE, "enforce_eager": True}
    options["max_num_batched_tokens"] = SIZE
    rule = EvictionRule(RULE.policy, budget)
    peak.measure_peak(ModelRunner(loaded.decoder, loaded.spec, cpu, **options), SIZE, torch.float32, rule=rule)
    most, blocks = max(requests for _, requests in measured), max(blocks * requests for blocks, requests in measured)
    assert max(table for table, _ in measured) == longest
    assert most <= max_num_seqs
    for table in range(budget.kept_blocks + 1, longest + 1):
        tables = list(range(table)), list(range(budget.kept_blocks))
        order = CompressionOrder(0, rule, *tables, num_entries=table * SIZE, window_end=table * SIZE, query_slot=0)
        for batch in batches([order] * max_num_seqs, loaded.spec, SIZE):
            assert len(batch.orders) <= most
            assert len(batch.orders) * table <= blocks + most, "but for what does not divide"


def test_a_compression_that_can_not_be_measured_is_an_error(loaded, monkeypatch):
    """Its share of the memory would be unknown, and every compression to come would fail like it."""

    def no_memory(self, event):
        raise torch.OutOfMemoryError("no memory left")

    cache = make_cache(loaded, positions=True, scores=True, num_query_slots=1, window=4)
    run_compression(cache, loaded.spec, RULE, None, False, 4, 2)
    monkeypatch.setattr(type(RULE.policy), "rank", no_memory)
    with pytest.raises(RuntimeError, match="policy 'snapkv' failed: OutOfMemoryError: no memory left"):
        run_compression(cache, loaded.spec, RULE, None, False, 4, 2)


@pytest.mark.parametrize("budget", [Budget(5000, SIZE, 4996), Budget(5000, SIZE), Budget(4, SIZE)])
def test_what_is_measured_fits_in_blocks_of_one_request_however_large_budget_and_interval(loaded, monkeypatch, budget):
    sizes = []

    class Noted(KVCache):
        def __init__(self, spec, num_blocks, *more, **options) -> None:
            sizes.append(num_blocks)
            super().__init__(spec, num_blocks, *more, **options)

    monkeypatch.setattr(peak, "KVCache", Noted)
    monkeypatch.setattr(peak, "_peak_of", lambda device, run: run() or 0)
    monkeypatch.setattr(peak, "LAUNCH_ENTRIES", 256)
    cpu = torch.device("cpu")
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 3 * SIZE, "max_model_len": 5 * SIZE, "enforce_eager": True}
    runner = ModelRunner(loaded.decoder, loaded.spec, cpu, **options)
    rule = EvictionRule(RULE.policy, budget)
    peak.measure_peak(runner, SIZE, torch.float32, rule=rule)
    assert max(sizes) <= 5 + 1
