"""Compressions that fail, in a batch and alone, and what becomes of the others."""

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kernels.compact_stable import compact_stable
from tests.worker.serving import BUDGET, Serving, either_way, on_every_device
from zipage.eviction.policy import Policy
from zipage.eviction.rule import EvictionRule
from zipage.scheduling.request import Request
from zipage.worker import compressor


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
    f"(tests/worker/test_compression_failures.py, line {Broken.rank.__code__.co_firstlineno + 2})"
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
        scores = [s.cache.scores[0][:, r.block_ids] for s, r in ((serving, request), (alone, twin))]
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
    positions, calls = serving.runner.positions, []

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")
        return positions(*args)

    monkeypatch.setattr(serving.runner, "positions", fails_once)
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
