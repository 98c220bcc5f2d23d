"""When requests are compressed, what an order does while it is under way, and random loads."""

import os
from collections import Counter

import pytest

from tests.scheduling.compressing import started, step_until
from tests.scheduling.fabricated import make_request, make_rule, make_samples
from tests.scheduling.simulate_scheduler import missing, simulate
from zipage.scheduling.compression import num_fresh_blocks
from zipage.scheduling.request import Status
from zipage.scheduling.triggers import PACE

# When


@pytest.mark.parametrize("trigger_prompt", [(1, 12), (5, 12), (11, 12), (12, 12), (13, 16), (16, 16), (17, 20)])
def test_block_full_compresses_when_the_last_of_n_max_or_more_blocks_is_full(trigger_prompt):
    prompt, first = trigger_prompt
    request = make_request(prompt=prompt, max_tokens=40, rule=make_rule(3, 4, window=4))
    _, model = started(request)
    model.run()
    assert [n for _, n, _ in model.compressed] == [first] + [12] * (len(model.compressed) - 1)
    # Each but the last token is computed; each event but the first follows four more.
    assert len(model.compressed) == 1 + (prompt + 40 - 1 - first - 1) // 4


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"drops_blocks": True}], ids=["tokens", "window", "blocks"])
def test_an_interval_of_several_blocks_fills_between_two_compressions(options):
    """Two blocks of four kept, three to come."""
    request = make_request(prompt=5, max_tokens=60, rule=make_rule(5, 4, interval_blocks=3, **options))
    scheduler, model = started(request)
    steps, sizes = [], []
    while scheduler.has_unfinished:
        before = len(model.compressed)
        model.step()
        if len(model.compressed) > before:
            steps.append(request.num_computed)
            sizes.append((request.cache_len, len(request.block_ids), scheduler.pool.num_used))
    assert steps == [20, 32, 44, 56], "each but the first after twelve more entries"
    assert [(n, blocks) for _, n, blocks in model.compressed] == [(20, 5)] * 4
    assert sizes == [(8, 2, 2)] * 4
    assert (scheduler.compressions.blocks_returned, request.peak_blocks) == (3 * 4, 5)
    assert scheduler.compressions.entries_evicted == 12 * 4


@pytest.mark.parametrize(("prompt", "first"), [(19, 20), (20, 20), (21, 24), (30, 32)])
def test_with_an_interval_a_long_prompt_is_compressed_when_its_last_block_is_full(prompt, first):
    request = make_request(prompt=prompt, max_tokens=40, rule=make_rule(5, 4, interval_blocks=3, window=3))
    _, model = started(request)
    model.run()
    assert [n for _, n, _ in model.compressed] == [first] + [20] * ((prompt + 38 - first) // 12)


def test_a_request_within_its_budget_is_never_compressed():
    request = make_request(prompt=5, max_tokens=8, rule=make_rule(3, 4))
    _, model = started(request)
    model.run()
    assert model.compressed == []


def test_without_a_rule_nothing_is_ever_compressed():
    bounded, full = make_request("a", 5, 40, make_rule(3, 4)), make_request("b", 5, 40)
    _, model = started(bounded, full)
    model.run()
    assert {request for request, _, _ in model.compressed} == {bounded}
    assert full.cache_len == full.num_computed == 44


def test_after_a_compression_a_request_owns_n_max_less_one_blocks_and_the_others_are_free():
    request = make_request(prompt=17, max_tokens=40, rule=make_rule(3, 4))
    scheduler, model = started(request)
    model.orders = False
    step_until(model, lambda: request.cache_len == 20)
    assert scheduler.pool.num_used == 5
    kept = request.block_ids[:2]
    model.compress()
    assert (request.block_ids, request.cache_len, request.num_computed) == (kept, 8, 20)
    assert scheduler.pool.num_used == 2
    assert request.num_tokens == 21
    plan, _ = model.step()
    assert plan.decodes == [request]
    assert (len(request.block_ids), request.num_computed) == (3, 21)


def test_the_books_of_what_was_evicted():
    request = make_request(prompt=17, max_tokens=10, rule=make_rule(3, 4))
    scheduler, model = started(request)
    model.run()
    books = scheduler.compressions
    assert (books.num_ordered, books.num_applied, books.num_bound) == (2, 2, 1)
    assert (books.entries_evicted, books.entries_kept, books.blocks_returned) == (12 + 4, 16, 3 + 1)


def test_a_compressing_request_sits_out_while_others_decode():
    request, other = make_request("a", 12, 20, make_rule(3, 4)), make_request("b", 5, 20)
    scheduler, model = started(request, other)
    model.orders = False
    model.step()
    (order,) = scheduler.order_compressions()
    assert request.status is Status.COMPRESSING
    for _ in range(3):
        assert scheduler.order_compressions() == []
        plan = scheduler.schedule()
        assert plan.decodes == [other]
        model.execute(plan)
    assert order.block_ids is request.block_ids
    scheduler.compressions.check_integrity()


# Orders under way


@pytest.mark.parametrize("by", ["abort", "end token"])
def test_a_request_that_ends_while_compressing_is_released_with_the_compression(by):
    request = make_request(prompt=12, max_tokens=20, rule=make_rule(3, 4))
    scheduler, model = started(request)
    model.max_delay = 9
    model.rng.seed(0)
    plan, finished = model.step(eos_share=float(by == "end token"))
    assert plan.sampled == [request]
    if by == "abort":
        model.abort(request)
    else:
        assert finished == [request]
    assert request.finish_reason is not None
    assert request.status is Status.COMPRESSING
    assert scheduler.pool.num_used > 0
    model.run()
    assert request.status is Status.FINISHED


def test_nothing_is_compressed_for_a_request_that_the_next_token_ends():
    request = make_request(prompt=12, max_tokens=1, rule=make_rule(3, 4))
    _, model = started(request)
    model.run()
    assert model.compressed == []


def test_an_order_is_completed_once():
    request = make_request(prompt=12, max_tokens=20, rule=make_rule(3, 4))
    scheduler, model = started(request)
    model.orders = False
    model.step()
    (order,) = scheduler.order_compressions()
    scheduler.complete(order.number)
    with pytest.raises(RuntimeError, match="not under way"):
        scheduler.complete(order.number)


def test_while_a_compression_is_under_way_nobody_loses_blocks():
    rule = make_rule(3, 4)
    old, young = make_request("a", 13, 20), make_request("b", 12, 20, rule)
    scheduler, model = started(old, young, num_blocks=7, caching=False)
    model.orders = False
    model.step()
    (order,) = scheduler.order_compressions()
    for _ in range(3):
        model.execute(scheduler.schedule())
    assert old.cache_len == 16
    plan = scheduler.schedule()
    assert (plan.is_empty, plan.num_stalled, plan.paused, plan.preempted) == (True, 1, [], [])
    scheduler.complete(order.number)
    assert scheduler.schedule().decodes[0] is old


@pytest.mark.parametrize("max_delay", [0, 4], ids=["in place", "beside"])
def test_a_wave_is_spread_and_takes_no_memory_beyond_the_plan(max_delay):
    """32 requests that are due together every 32 steps, in a pool of what they may hold: 4 at a step."""
    rule, count = make_rule(2, 32, window=4), 32
    requests = [make_request(str(i), 8, 200, rule) for i in range(count)]
    options = {"max_num_seqs": count, "max_num_batched_tokens": 8 * count, "num_query_slots": count}
    scheduler, model = started(*requests, num_blocks=2 * count, block_size=32, max_delay=max_delay, **options)
    orders, pauses = [], Counter()
    while scheduler.has_unfinished:
        before, tokens = len(model.compressed), [request.num_tokens for request in requests]
        model.step()
        orders.append(len(model.compressed) - before)
        for request, had in zip(requests, tokens, strict=True):
            pauses[request] = 0 if request.num_tokens > had else pauses[request] + 1
            assert request.finish_reason or pauses[request] <= 32 // PACE + max_delay + 1, "it starves"
    assert max(orders) == count * PACE // 32
    assert [entries for _, entries, _ in model.compressed] == [64] * (5 * count)
    if not max_delay:
        assert model.events["deferrals"] == sum(range(4, count, 4)), "the first wave's: the later ones come spread"
    assert scheduler.num_pauses == model.events["preemptions"] == 0


def test_requests_are_admitted_while_others_are_passed_over():
    rule = make_rule(2, 32)
    wave = [make_request(str(i), 8, 100, rule) for i in range(16)]
    scheduler, model = started(*wave, block_size=32, max_num_seqs=17, max_num_batched_tokens=200)
    step_until(model, lambda: any(map(scheduler.trigger.is_deferred, wave)))
    late = make_request("late", 8, 4)
    scheduler.add(late)
    model.step()
    assert any(map(scheduler.trigger.is_deferred, wave))
    assert late.status is Status.RUNNING


def test_blocks_that_a_due_request_waits_for_are_left_to_it():
    rule = make_rule(3, 4)
    first, young, new = make_request("x", 12, 20, rule), make_request("c", 1, 20), make_request("d", 2, 20)
    samples = make_samples("a", prompt=9, n=2, max_tokens=20, rule=rule)
    scheduler, model = started(first, *samples, young, num_blocks=9, caching=False)
    model.orders = False
    model.step()
    (order,) = scheduler.order_compressions()
    step_until(model, lambda: samples[0].cache_len == 12)
    assert young.cache_len == 4
    assert (num_fresh_blocks(samples[0], scheduler.pool), scheduler.pool.num_free) == (2, 1)
    scheduler.add(new)
    plan = scheduler.schedule()
    assert plan.decodes == [samples[1]], "the one free block goes neither to the young nor to the new one"
    assert (plan.num_stalled, list(scheduler.waiting)) == (2, [new])
    scheduler.complete(order.number)


# Whole blocks


def test_dropped_blocks_go_back_and_kept_ones_stay_where_they_are():
    request = make_request(prompt=16, max_tokens=20, rule=make_rule(3, 4, drops_blocks=True))
    scheduler, model = started(request)
    model.orders = False
    model.step()
    before = request.block_ids.copy()
    (order,) = scheduler.order_compressions()
    assert (order.new_ids, order.fresh) == ([], [])
    scheduler.complete(order.number, [0, 3])
    assert request.block_ids == [before[0], before[3]]
    assert request.cache_len == 8
    assert [scheduler.pool.ref_counts[block] for block in before] == [1, 0, 0, 1]


def test_dropping_the_wrong_number_of_blocks_is_an_error():
    request = make_request(prompt=16, max_tokens=20, rule=make_rule(3, 4, drops_blocks=True))
    scheduler, model = started(request)
    model.orders = False
    model.step()
    (order,) = scheduler.order_compressions()
    with pytest.raises(RuntimeError, match="2 wanted"):
        scheduler.complete(order.number, [0, 1, 3])


# Everything at once


def test_random_loads_end_without_leak_deadlock_starvation_or_wrong_entry():
    """ZIPAGE_SCHEDULER_STEPS=100000 runs the full share."""
    events, labels, _ = simulate(int(os.environ.get("ZIPAGE_SCHEDULER_STEPS", "15000")))
    assert missing(events) == []
    for label in (
        *("compression=sync", "compression=async", "trigger=pressure", "scheduling=constrained"),
        *("interval=1 blocks", "interval=3 blocks"),
    ):
        assert labels[label] > 5
