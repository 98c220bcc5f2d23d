"""Orders of compressions over an engine's cache, against the simulation, alone and in batches."""

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels.cache_view import shared
from kernels.compact_stable import compact_stable
from kernels.store_kv import store_kv
from kernels.store_positions import store_positions
from kernels.store_step import store_step
from tests.eviction.dense_event import Tokens, make_tokens
from tests.eviction.dense_simulation import Simulation
from zipage.eviction import registry
from zipage.eviction.budget import Budget
from zipage.eviction.policies.random import Random
from zipage.eviction.policy import Policy
from zipage.eviction.protection import Protection
from zipage.eviction.rule import EvictionRule
from zipage.sampling_params import SamplingParams
from zipage.scheduling.compression import Compression
from zipage.scheduling.plan import CompressionOrder
from zipage.scheduling.planner import plan_compression
from zipage.scheduling.request import Request
from zipage.worker import compression_batch, compressor
from zipage.worker.compression_runner import CompressionResult, CompressionRunner
from zipage.worker.kv_cache import KVCache

SPEC = SimpleNamespace(
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, attention=(SimpleNamespace(scale=32**-0.5),) * 2
)
BLOCK_SIZE, RECENT, WINDOW = 16, 16, 16
BUDGET = Budget.from_tokens(64, BLOCK_SIZE)
SEED_STEP = 0xD1342543DE82EF95
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()

NUMBERS = count()

on_every_device = pytest.mark.parametrize("device", DEVICES)
either_way = pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])

CASES = {
    "zipage": ("zipage", {"chunk": 32}, "none"),
    "zipage-prompt": ("zipage", {"chunk": 32, "pooling": "always"}, "prompt"),
    "random": ("random", {}, "none"),
    "random-prompt": ("random", {}, "prompt"),
    "h2o": ("h2o", {}, "sink:37"),
    "page_random": ("page_random", {"page_size": 16}, "none"),
    "page_attention": ("page_attention", {"page_size": 16}, "prompt"),
}
every_case = pytest.mark.parametrize("case", CASES)


@dataclass(eq=False)
class Serving:
    """A poisoned cache, the requests in it and their simulations: what an engine does around its compressions."""

    device: str = "cpu"
    asynchronous: bool = False
    trace: bool = False
    layer_stride: int | None = None
    debug: bool = False
    all_tokens: dict[Request, Tokens] = field(default_factory=dict)
    simulations: dict[Request, Simulation] = field(default_factory=dict)
    ordered: dict[int, Request] = field(default_factory=dict)

    def __post_init__(self):
        options = {"positions": True, "scores": True, "num_query_slots": 8, "window": WINDOW}
        self.cache = KVCache(SPEC, 100, BLOCK_SIZE, torch.float32, torch.device(self.device), **options)
        self.cache.poison(slice(None))
        self.cache.poison_queries(slice(None))
        self.free = torch.randperm(100).tolist()
        self.runner = CompressionRunner(
            self.cache,
            SPEC,
            asynchronous=self.asynchronous,
            layer_stride=self.layer_stride,
            trace=self.trace,
            debug=self.debug,
        )

    def add(self, case: str, seed: int, prompt_len: int = 40, index: int = 0) -> Request:
        name, options, protection = CASES[case]
        tokens = make_tokens(seed, prompt_len=prompt_len)
        policy = registry.make(name, options)
        rule = EvictionRule.of(policy, BUDGET, Protection.parse(protection), RECENT, prompt_len)
        request = Request(
            case, [0] * prompt_len, SamplingParams(), index=index, seed=tokens.seed, max_total_tokens=999, rule=rule
        )
        request.query_slot = len(self.all_tokens)
        self.all_tokens[request] = tokens
        self.simulations[request] = Simulation(
            policy=name,
            options=options,
            keys=tokens.keys.double().numpy(),
            values=tokens.values.double().numpy(),
            queries=tokens.queries.double().numpy(),
            seed=(tokens.seed + index * SEED_STEP) % 2**63,
            prompt_len=prompt_len,
            keep=BUDGET.keep,
            recent=RECENT,
            protection=protection,
        )
        return request

    def grow(self, request: Request, n: int) -> None:
        """Compute the tokens that bring `request` to `n` entries."""
        while len(request.block_ids) * BLOCK_SIZE < n:
            request.block_ids.append(self.free.pop())
        new = torch.arange(request.num_computed, request.num_computed + n - request.cache_len)
        at = torch.arange(request.cache_len, n)
        slots = torch.tensor(request.block_ids)[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        places = request.query_slot * WINDOW + new % WINDOW
        places[:-WINDOW] = -1
        slots, places = slots.to(self.device), places.to(self.device)
        tokens, cache = self.all_tokens[request], self.cache
        each = shared(slots, SPEC.num_kv_heads)
        for layer in range(SPEC.num_layers):
            k, v = (x[layer][:, new].transpose(0, 1).contiguous().to(self.device) for x in (tokens.keys, tokens.values))
            if request.rule.window:
                q = tokens.queries[layer, new].to(self.device)
                store_step(k, v, q, cache.k[layer], cache.v[layer], cache.queries[layer], each, places)
            else:
                store_kv(k, v, cache.k[layer], cache.v[layer], each)
        store_positions(new.int().to(self.device), cache.positions, shared(slots, SPEC.num_kv_heads, SPEC.num_layers))
        request.num_computed += len(new)
        request.cache_len = n

    def order(self, request: Request) -> CompressionOrder:
        """Into fresh blocks; those of protected entries alone stay."""
        rule, number = request.rule, next(NUMBERS)
        self.ordered[number] = request
        fresh, new_ids = [], []
        if not rule.drops_blocks:
            fresh = [self.free.pop() for _ in range(BUDGET.max_blocks - 1 - rule.pinned_blocks)]
            new_ids = request.block_ids[: rule.pinned_blocks] + fresh
        return plan_compression(Compression(number, request, request.block_ids, new_ids, fresh))

    def request_of(self, result: CompressionResult) -> Request:
        return self.ordered[result.order.number]

    def apply(self, result: CompressionResult) -> None:
        """Give the request its new table; what it left is poisoned."""
        order, request = result.order, self.request_of(result)
        kept = order.new_ids
        if request.rule.drops_blocks:
            kept = [order.block_ids[page] for page in result.kept_pages]
        for block in set(order.block_ids) - set(kept):
            self.cache.poison(block)
            self.free.insert(0, block)
        request.block_ids = list(kept)
        request.cache_len = request.rule.keep
        request.num_compressions += 1

    def compress(self, requests: Sequence[Request]) -> list[CompressionResult]:
        self.runner.submit([self.order(request) for request in requests])
        results = self.runner.poll(wait=True)
        for result in results:
            self.apply(result)
        return results

    def entries(self, request: Request) -> list[torch.Tensor]:
        """K and V [L, H, n, d] and positions [L, H, n], on the CPU."""
        cache = self.cache
        tensors = cache.k, cache.v, cache.positions
        return [x[:, request.block_ids].transpose(1, 2).flatten(2, 3)[:, :, : request.cache_len].cpu() for x in tensors]

    def check(self, request: Request, n: int) -> None:
        """The request holds what its simulation keeps of n entries."""
        (expected,) = self.simulations[request].run([n])
        tokens = self.all_tokens[request]
        k, v, positions = self.entries(request)
        for (layer, head), kept in expected.items():
            assert positions[layer, head].tolist() == kept, (request, layer, head)
            assert torch.equal(k[layer, head], tokens.keys[layer, head, kept])
            assert torch.equal(v[layer, head], tokens.values[layer, head, kept])


@on_every_device
@either_way
@every_case
def test_kept_entries_equal_the_simulation(case, asynchronous, device):
    serving = Serving(device, asynchronous)
    requests = [serving.add(case, 1, prompt_len=40), serving.add(case, 2, prompt_len=5, index=3)]
    for lens in ([96, 80], [80, 80], [80, 96]):
        for request, n in zip(requests, lens, strict=True):
            serving.grow(request, n)
        serving.compress(requests)
        for request, n in zip(requests, lens, strict=True):
            serving.check(request, n)
    serving.runner.close()


@on_every_device
@either_way
def test_policies_may_be_mixed_in_one_submission(asynchronous, device):
    serving = Serving(device, asynchronous)
    requests = [serving.add(case, seed) for seed, case in enumerate(CASES)]
    for _ in range(2):
        for request in requests:
            serving.grow(request, 96)
        results = serving.compress(requests)
        assert {serving.request_of(result) for result in results} == set(requests)
        for result in results:
            assert (result.kept_pages is None) == (not result.order.rule.drops_blocks)
            assert result.kept_positions is None
            assert result.seconds > 0
        for request in requests:
            serving.check(request, 96)


def test_orders_are_launched_in_bounded_batches(monkeypatch):
    # 2 heads * 6 blocks of 16 slots are 192 entries a request.
    monkeypatch.setattr(compression_batch, "LAUNCH_ENTRIES", 2 * 192 + 100)
    serving = Serving()
    requests = [serving.add(case, seed) for seed, case in enumerate(["zipage", "random", "zipage", "zipage"])]
    for request in requests:
        serving.grow(request, 96)
    orders = [serving.order(request) for request in requests]
    sizes = [[serving.ordered[o.number] for o in b.orders] for b in compression_batch.batches(orders, SPEC, BLOCK_SIZE)]
    zipage = requests[0], requests[2], requests[3]
    assert sizes == [[zipage[0], zipage[1]], [zipage[2]], [requests[1]]]
    monkeypatch.setattr(compression_batch, "LAUNCH_ENTRIES", 1)
    assert len(list(compression_batch.batches(orders, SPEC, BLOCK_SIZE))) == 4
    serving.compress(requests)
    for request in requests:
        serving.check(request, 96)


@pytest.mark.parametrize("layer_stride", [1, 2, None])
def test_strides_change_nothing(layer_stride):
    serving = Serving(layer_stride=layer_stride)
    requests = [serving.add("zipage", 1), serving.add("h2o", 2)]
    for _ in range(2):
        for request in requests:
            serving.grow(request, 96)
        serving.compress(requests)
        for request in requests:
            serving.check(request, 96)


@either_way
def test_results_wait_to_be_polled(asynchronous):
    serving = Serving(asynchronous=asynchronous)
    assert serving.runner.poll() == serving.runner.poll(wait=True) == []
    first, second = serving.add("zipage", 1), serving.add("random", 2)
    for request in (first, second):
        serving.grow(request, 96)
    serving.runner.submit([serving.order(first)])
    serving.runner.submit([serving.order(second)])
    assert serving.runner.in_flight == 2
    if asynchronous:
        assert serving.runner.poll() == [], "a request sits out a step"
    assert [serving.request_of(result) for result in serving.runner.poll()] == [first, second]
    assert serving.runner.in_flight == 0
    assert serving.runner.poll(wait=True) == []
    serving.runner.submit([])
    assert serving.runner.in_flight == 0


@on_every_device
def test_a_request_may_change_once_it_was_submitted(device):
    serving = Serving(device, asynchronous=True)
    request = serving.add("zipage", 1)
    serving.grow(request, 96)
    serving.runner.submit([serving.order(request)])
    request.num_compressions, request.query_slot, request.num_computed = 7, 3, 1000
    (result,) = serving.runner.poll(wait=True)
    request.num_compressions = 0
    serving.apply(result)
    serving.check(request, 96)


@on_every_device
@every_case
def test_traces_tell_the_positions_that_stay(case, device):
    serving = Serving(device, trace=True)
    requests = [serving.add(case, 1), serving.add(case, 2)]
    for n in (96, 80):
        for request in requests:
            serving.grow(request, n)
        for result in serving.compress(requests):
            kept = result.kept_positions
            assert kept.dtype == np.int32
            assert kept.shape == (2, 2, 64)
            assert (np.diff(kept) > 0).all()
            assert np.array_equal(kept, serving.entries(serving.request_of(result))[2].numpy())


class Broken(Policy):
    """Fails wherever `fails(event)` says so; ranks as `keydiff` does elsewhere."""

    name, variant, paper = "broken", "broken", ""

    def __init__(self, fails=lambda event: True):
        self.fails = fails

    def rank(self, event):
        if self.fails(event):
            raise ZeroDivisionError("no score\nto divide by")
        return -event.values().norm(dim=-1)


BROKEN = (
    "a compression under policy 'broken' failed: ZeroDivisionError: no score to divide by "
    f"(tests/worker/test_compression_runner.py, line {Broken.rank.__code__.co_firstlineno + 2})"
)


@on_every_device
@either_way
def test_a_failure_is_a_result_and_the_others_go_on(asynchronous, device):
    serving = Serving(device, asynchronous)
    bad, good = serving.add("random", 1), serving.add("random", 2)
    bad.rule = EvictionRule(Broken(), BUDGET)
    for request in (bad, good):
        serving.grow(request, 96)
    serving.runner.submit([serving.order(bad), serving.order(good)])
    failed, done = serving.runner.poll(wait=True)
    assert (serving.request_of(failed), failed.error) == (bad, BROKEN)
    assert done.error is None
    serving.apply(done)
    serving.check(good, 96)
    assert serving.runner.in_flight == 0


class Stored(Broken):
    """Ranks by a state that grows with every compression."""

    state = True

    def rank(self, event):
        scores = super().rank(event) + event.stored
        event.store(-scores)
        return scores


def submit(serving: Serving, policy: Policy, lens: Sequence[int] = (96, 80, 96)) -> list[Request]:
    """Requests of `lens` entries and prompts of 21, 22, ... tokens, submitted together."""
    requests = []
    for number, n in enumerate(lens, 1):
        request = serving.add("random", number, prompt_len=20 + number)
        request.rule = EvictionRule(policy, BUDGET)
        serving.grow(request, n)
        requests.append(request)
    serving.runner.submit([serving.order(request) for request in requests])
    return requests


def check_alone(serving: Serving, request: Request, kind: type[Broken], entries: int) -> None:
    """The request's entries, and their states, are those of a compression without neighbours or failures."""
    alone = Serving(serving.device)
    twin = alone.add("random", 0, prompt_len=request.num_prompt_tokens)
    alone.all_tokens[twin] = serving.all_tokens[request]
    twin.rule = EvictionRule(kind(lambda event: False), BUDGET)
    alone.grow(twin, entries)
    alone.compress([twin])
    for have, want in zip(serving.entries(request), alone.entries(twin), strict=True):
        assert torch.equal(have, want)
    if twin.rule.policy.state:
        scores = [s.cache.scores[:, r.block_ids] for s, r in ((serving, request), (alone, twin))]
        assert torch.equal(*scores)


@on_every_device
@either_way
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("kind", [Broken, Stored])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_batch_that_is_too_much_goes_on_one_by_one(layer, kind, debug, asynchronous, device):
    """From the layer that was not moved: a second move of the layers before it would move the survivors again."""
    serving = Serving(device, asynchronous, layer_stride=1, debug=debug)
    requests = submit(serving, kind(lambda event: event.num_requests > 1 and event.layer_offset == layer))
    results = serving.runner.poll(wait=True)
    assert [serving.request_of(result) for result in results] == requests
    assert [result.error for result in results] == [None] * 3
    assert serving.runner.in_flight == 0
    for result, entries in zip(results, (96, 80, 96), strict=True):
        serving.apply(result)
        check_alone(serving, serving.request_of(result), kind, entries)


class InPlace(Random):
    """Leaves nothing of its event as it was."""

    def rank(self, event):
        scores = super().rank(event)
        for given in (event.must, event.lens, event.keep, event.slots):
            given.zero_()
        return scores


@on_every_device
@pytest.mark.parametrize("layer_stride", [1, None])
def test_a_policy_that_changes_its_event_changes_nothing_else(device, layer_stride):
    serving = Serving(device, layer_stride=layer_stride)
    request = serving.add("random-prompt", 1)
    request.rule = replace(request.rule, policy=InPlace())
    serving.grow(request, 96)
    serving.compress([request])
    serving.check(request, 96)


@on_every_device
@either_way
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_who_is_at_fault_fails_alone_in_any_layer(stride, layer, asynchronous, device):
    serving = Serving(device, asynchronous, layer_stride=stride)
    submit(serving, Broken(lambda event: 22 in event.prompt_lens and event.layer_offset == layer // stride))
    first, failed, last = serving.runner.poll(wait=True)
    assert failed.error == BROKEN
    for result in (first, last):
        assert result.error is None
        serving.apply(result)
        check_alone(serving, serving.request_of(result), Broken, 96)


@on_every_device
@either_way
@pytest.mark.parametrize("call", [0, 1])
def test_a_move_that_fails_costs_all_whose_entries_it_moved(monkeypatch, call, asynchronous, device):
    """Nobody knows what it left behind, in whichever layer."""
    calls = []

    def compact(*args):
        calls.append(args)
        if len(calls) == call + 1:
            raise RuntimeError("the device is gone")
        compact_stable(*args)

    monkeypatch.setattr(compressor, "compact_stable", compact)
    serving = Serving(device, asynchronous, layer_stride=1)
    submit(serving, Broken(lambda event: False))
    message = "a compression under policy 'broken' failed: RuntimeError: the device is gone"
    assert [result.error for result in serving.runner.poll(wait=True)] == [message] * 3
    assert len(calls) == call + 1
    assert serving.runner.in_flight == 0


@either_way
def test_a_failure_behind_the_moves_moves_nothing_again(monkeypatch, asynchronous):
    serving = Serving(asynchronous=asynchronous, trace=True)
    positions, calls = serving.runner._positions, []

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")
        return positions(*args)

    monkeypatch.setattr(serving.runner, "_positions", fails_once)
    submit(serving, Broken(lambda event: False))
    for result, entries in zip(serving.runner.poll(wait=True), (96, 80, 96), strict=True):
        assert result.error is None
        serving.apply(result)
        check_alone(serving, serving.request_of(result), Broken, entries)
        assert np.array_equal(result.kept_positions, serving.entries(serving.request_of(result))[2].numpy())


def test_who_goes_on_alone_finds_the_memory_of_the_batch_free_and_takes_little():
    tensors, launches = [], []

    class Holds(Broken):
        """Has a dense copy at hand where it fails."""

        def rank(self, event):
            dense = event.keys()
            if event.num_requests > 1:
                tensors.append(weakref.ref(dense))
                raise torch.OutOfMemoryError
            launches.append((event.layer_offset, event.num_layers, tensors[0]()))
            return -dense.norm(dim=-1)

    serving = Serving()
    submit(serving, Holds())
    assert [result.error for result in serving.runner.poll(wait=True)] == [None] * 3
    assert launches == [(0, 1, None), (1, 1, None)] * 3


@pytest.mark.parametrize("in_thread", [False, True])
def test_what_is_no_error_of_the_computation_is_passed_on(in_thread):
    def leaves(event):
        raise KeyboardInterrupt

    def run():
        submit(serving, Broken(leaves))
        serving.runner.poll(wait=True)

    serving = Serving()
    if in_thread:
        serving.runner._executor = ThreadPoolExecutor(1)
    with pytest.raises(KeyboardInterrupt):
        run()
    serving.runner.close()


class Misranks(Broken):
    """Ranks an entry of the request with a prompt of 22 tokens NaN, in one layer."""

    def __init__(self, layer, fails=lambda event: False):
        super().__init__(fails)
        self.layer = layer

    def rank(self, event):
        scores = super().rank(event)
        if 22 in event.prompt_lens and event.layer_offset <= self.layer < event.layer_offset + event.num_layers:
            scores[self.layer - event.layer_offset, list(event.prompt_lens).index(22), 1, 5] = float("nan")
        return scores


@on_every_device
@either_way
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("fails_in", [None, 0, 1])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_rank_that_is_no_number_costs_nobody_else(layer, fails_in, debug, asynchronous, device):
    """Nor is it forgotten where the batch fails in a later layer."""
    serving = Serving(device, asynchronous, layer_stride=1, debug=debug)
    submit(serving, Misranks(layer, lambda event: event.num_requests > 1 and event.layer_offset == fails_in))
    first, misranked, last = serving.runner.poll(wait=True)
    serving.runner.ranks.poll(wait=True)
    if debug:
        assert misranked.error.startswith("policy 'broken' ranked entries NaN")
    else:
        assert misranked.error is None
        assert serving.runner.ranks.num_failed == 1
    for result in (first, last):
        assert result.error is None
        serving.apply(result)
        check_alone(serving, serving.request_of(result), Broken, 96)


def test_what_a_policy_needs_is_there():
    serving = Serving()
    request = serving.add("zipage", 1)
    serving.grow(request, 96)
    request.query_slot = -1
    with pytest.raises(RuntimeError, match="no query slot"):
        serving.runner.submit([serving.order(request)])
    pages = serving.add("page_random", 2)
    serving.grow(pages, 90)
    with pytest.raises(RuntimeError, match="not full"):
        serving.runner.submit([serving.order(pages)])
