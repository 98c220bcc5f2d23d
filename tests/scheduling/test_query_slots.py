"""Who may run with a query slot, and who without."""

from collections import Counter

import pytest

from tests.scheduling.compressing import started, step_until
from tests.scheduling.fabricated import make_request, make_rule, make_samples, make_scheduler
from zipage.scheduling.request import Status


def test_a_request_without_slot_runs_until_w_entries_are_free_and_no_further_if_nobody_can_lend_one():
    rule = make_rule(3, 8, window=3)
    holder, other = make_request("a", 5, 60, rule), make_request("b", 4, 60, rule)
    scheduler, model = started(holder, other, block_size=8, num_query_slots=1)
    step_until(model, lambda: holder.cache_len == 22)
    assert (other.query_slot, other.cache_len) == (-1, 24 - 3)
    plan, _ = model.step()
    assert plan.num_stalled == 1
    assert plan.decodes == [holder]
    model.run()
    assert other.num_output_tokens == 60
    assert scheduler.num_pauses == 0


def test_a_request_that_needs_a_slot_takes_that_of_the_one_farthest_from_its_window():
    rule = make_rule(3, 8, window=3)
    near, far, other = (make_request(name, length, 60, rule) for name, length in (("a", 16), ("b", 4), ("c", 18)))
    _, model = started(near, far, other, block_size=8, num_query_slots=2)
    step_until(model, lambda: other.cache_len == 24 - 3)
    assert [near.query_slot, far.query_slot, other.query_slot] == [0, 1, -1]
    plan, _ = model.step()
    assert plan.num_stalled == 0
    assert [near.query_slot, far.query_slot, other.query_slot] == [0, -1, 1]
    assert other.queries_from == 24 - 3
    model.run()


def test_a_short_request_never_needs_a_slot():
    rule = make_rule(3, 8, window=3)
    holder, short = make_request("a", 4, 60, rule), make_request("b", 4, 17, rule)
    _, model = started(holder, short, block_size=8, num_query_slots=1)
    step_until(model, lambda: short.status is Status.FINISHED, max_steps=18)
    assert holder.status is Status.RUNNING


def test_a_freed_slot_goes_to_the_oldest_without_one():
    rule = make_rule(3, 8, window=3)
    requests = [make_request(name, 4, 40, rule) for name in "abcd"]
    _, model = started(*requests, block_size=8, num_query_slots=1)
    model.step()
    model.abort(requests[0])
    model.step()
    assert [request.query_slot for request in requests[1:]] == [0, -1, -1]
    model.run()


def test_a_prompt_that_reaches_into_its_window_is_admitted_when_somebody_can_lend_it_a_slot():
    rule = make_rule(3, 8, window=3)
    holder, long, short = make_request("a", 21, 30, rule), make_request("b", 22, 5, rule), make_request("c", 4, 5, rule)
    scheduler, model = started(holder, long, short, block_size=8, num_query_slots=1)
    model.step()
    assert list(scheduler.waiting) == [long, short], "the holder needs its own"
    step_until(model, lambda: holder.num_compressions == 1)
    assert scheduler.pool.num_free > 20
    model.step()
    assert not scheduler.waiting
    assert (holder.query_slot, long.query_slot) == (-1, 0)
    model.run()


def test_queries_count_from_the_slot_on():
    rule = make_rule(3, 8, window=3)
    holder, other = make_request("a", 4, 10, rule), make_request("b", 4, 60, rule)
    _, model = started(holder, other, block_size=8, num_query_slots=1)
    step_until(model, lambda: holder.status is Status.FINISHED)
    model.step()
    assert (other.query_slot, other.queries_from) == (0, other.num_computed - 1)


@pytest.mark.parametrize("window", [0, 3])
def test_constrained_admits_only_with_a_slot(window):
    rule = make_rule(3, 8, window=window)
    requests = [make_request(name, 4, 10, rule) for name in "abc"]
    scheduler, model = started(*requests, block_size=8, num_query_slots=2, scheduling="constrained")
    while scheduler.has_unfinished:
        model.step()
        assert len(scheduler.running) <= 2
        assert all(request.query_slot >= 0 for request in scheduler.running)


def test_constrained_lets_unbounded_requests_run_without_slots():
    requests = [make_request(name, 4, 10) for name in "abc"]
    scheduler, model = started(*requests, num_query_slots=1, scheduling="constrained")
    model.step()
    assert len(scheduler.running) == 3


def test_without_window_hybrid_needs_no_slot():
    requests = [make_request(name, 4, 30, make_rule(3, 4)) for name in "abc"]
    _, model = started(*requests, num_query_slots=0)
    model.run()
    assert len(model.compressed) == 3 * 6


def test_a_slot_freed_inside_a_step_goes_past_nobody_older():
    old, holder = make_samples(prompt=9, n=2, max_tokens=40, rule=make_rule(4, 4, window=4))
    _, model = started(old, holder, num_blocks=5, num_query_slots=1)
    model.step()
    model.step()
    model.pause(old)
    old.queries_saved = False
    model.host_copies[old.number] = (model.host_copies[old.number][0], None)
    step_until(model, lambda: holder.cache_len == 16)
    assert (old.query_slot, holder.query_slot, old.cache_len) == (-1, 0, 12)
    plan, _ = model.step()
    assert [p.request for p in plan.preempted] == [holder], (
        "it is due, shares two blocks with the older, and no block is free"
    )
    assert old.query_slot == 0
    model.run(max_steps=200)


def test_a_step_looks_at_each_request_a_few_times_however_many_look_for_a_slot(monkeypatch):
    rule = make_rule(3, 8, window=3)
    requests = [make_request(str(i), 4 + i % 16, 60, rule) for i in range(64)]
    options = {"max_num_seqs": 64, "max_num_batched_tokens": 2048}
    scheduler = make_scheduler(256, 8, num_query_slots=16, **options)
    for request in requests:
        scheduler.add(request)
    looked = Counter()
    has_come = scheduler.trigger.has_come_to_window

    def count(request):
        looked[request] += 1
        return has_come(request)

    monkeypatch.setattr(scheduler.trigger, "has_come_to_window", count)
    num_stalled = 0
    for _ in range(100):
        looked.clear()
        batch = scheduler.schedule()
        assert max(looked.values(), default=0) <= 2
        num_stalled += batch.num_stalled
        scheduler.advance(batch)
        for order in scheduler.order_compressions():
            scheduler.complete(order.number)
        scheduler.update(batch, [7] * len(batch.sampled))
    assert num_stalled > 64
