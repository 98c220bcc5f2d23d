"""Orders of compressions over an engine's cache, against the simulation, alone and in batches."""

from concurrent.futures import Executor, Future
from dataclasses import replace

import numpy as np
import pytest

from tests.worker.serving import BLOCK_SIZE, CASES, SPEC, Serving, either_way, every_case, on_every_device
from zipage.eviction.policies.random import Random
from zipage.worker import compression_batch


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


class Busy(Executor):
    """A worker that gets to its tasks when it is told to."""

    def __init__(self):
        self.tasks = []

    def submit(self, run, /, *args):
        future = Future()
        self.tasks.append((future, run, args))
        return future

    def catch_up(self):
        for future, run, args in self.tasks:
            future.set_result(run(*args))
        self.tasks.clear()


class Sizes(Random):
    """Notes how many requests each launch is of."""

    def rank(self, event):
        sizes.append(event.num_requests)
        return super().rank(event)


sizes = []


def test_orders_that_wait_for_the_worker_go_in_one_batch():
    serving = Serving()
    worker = serving.runner._executor = Busy()
    requests = [serving.add("random", seed) for seed in range(5)]
    for request in requests:
        request.rule = replace(request.rule, policy=Sizes())
        serving.grow(request, 96)
    sizes.clear()
    for some in (requests[:1], requests[1:3], requests[3:4]):
        serving.runner.submit([serving.order(request) for request in some])
    assert serving.runner.poll() == []
    assert serving.runner.in_flight == 4
    worker.catch_up()
    serving.runner.submit([serving.order(requests[4])])
    results = serving.runner.poll()
    assert [serving.request_of(result) for result in results] == requests[:4]
    assert results[0].seconds > results[1].seconds == results[2].seconds > results[3].seconds > 0
    assert serving.runner.in_flight == 1
    worker.catch_up()
    results += serving.runner.poll()
    assert sizes == [4, 1]
    for result in results:
        serving.apply(result)
        serving.check(serving.request_of(result), 96)


def test_orders_that_come_while_the_gpu_is_behind_go_in_one_batch_too():
    serving = Serving()
    worker = serving.runner._executor = Busy()
    first, second = serving.add("random", 1), serving.add("random", 2)
    for request in (first, second):
        request.rule = replace(request.rule, policy=Sizes())
        serving.grow(request, 96)

    class Behind:
        def synchronize(self):
            serving.runner.submit([serving.order(second)])

    sizes.clear()
    serving.runner._latest.extend([Behind(), None])
    serving.runner.submit([serving.order(first)])
    tasks, worker.tasks = worker.tasks, []
    for future, run, args in tasks:
        future.set_result(run(*args))
    assert [serving.request_of(result) for result in serving.runner.poll()] == [first, second]
    assert sizes == [2]


class InPlace(Random):
    """Leaves nothing of its event as it was."""

    def rank(self, event):
        scores = super().rank(event)
        for given in (event.forced, event.lens, event.keep, event.slots):
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
