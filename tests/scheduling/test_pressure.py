"""Compressions that wait until memory is short."""

import pytest

from tests.scheduling.compressing import started, step_until
from tests.scheduling.fabricated import make_request, make_rule
from zipage.scheduling.request import Status


def test_pressure_does_nothing_in_ample_memory():
    request = make_request(prompt=17, max_tokens=40, rule=make_rule(3, 4, window=4))
    _, model = started(request, trigger="pressure")
    model.run()
    assert model.compressed == []
    assert request.cache_len == 56


def test_pressure_compresses_the_most_over_budget_first_and_only_as_many_as_needed():
    rule = make_rule(3, 4)
    requests = [make_request(name, prompt, 60, rule) for name, prompt in (("a", 12), ("b", 24), ("c", 16))]
    scheduler, model = started(*requests, num_blocks=16, trigger="pressure", caching=False)
    step_until(model, lambda: model.compressed)
    assert [request for request, _, _ in model.compressed] == [requests[1]]
    assert scheduler.pool.num_free > 0
    assert [request.num_compressions for request in requests] == [0, 1, 0]
    model.run()
    assert all(request.num_preemptions == request.num_pauses == 0 for request in requests)


def test_pressure_makes_room_for_the_head_of_the_queue():
    running, new = make_request("a", 28, 30, make_rule(3, 4)), make_request("b", 20, 5)
    scheduler, model = started(running, num_blocks=10, trigger="pressure", caching=False)
    model.step()
    scheduler.add(new)
    model.step()
    assert [request for request, _, _ in model.compressed] == [running]
    model.step()
    assert new.status is Status.RUNNING


def test_pressure_compresses_only_with_the_queries_of_the_window():
    rule = make_rule(3, 8, window=8)
    holder, other = make_request("a", 8, 80, rule), make_request("b", 32, 80, rule)
    _, model = started(holder, other, block_size=8, num_blocks=7, num_query_slots=1, trigger="pressure")
    model.run()
    assert other not in [request for request, _, _ in model.compressed][:1]


@pytest.mark.parametrize("page", [2, 4])
def test_pressure_compresses_pages_only_when_the_last_one_is_full(page):
    rule = make_rule(3, 4, page=page)
    requests = [make_request(name, prompt, 60, rule) for name, prompt in (("a", 9), ("b", 11))]
    _, model = started(*requests, num_blocks=8, trigger="pressure")
    model.run()
    assert model.compressed
    assert all(n % page == 0 for _, n, _ in model.compressed)


def test_under_pressure_a_paused_request_does_not_come_and_go_without_a_block():
    rule = make_rule(2, 4)
    full, bounded = make_request("a", 4, 40), make_request("b", 4, 40, rule)
    scheduler, model = started(full, bounded, num_blocks=12, trigger="pressure", caching=False)
    model.run()
    assert scheduler.num_pauses <= 4


def test_under_pressure_room_to_grow_is_kept_for_the_unbounded_alone():
    bounded, full = make_request("a", 4, 60, make_rule(3, 4)), make_request("b", 4, 60)
    scheduler, model = started(bounded, full, num_blocks=30, trigger="pressure", headroom=24)
    model.step()
    assert scheduler.headroom.of(bounded) == 0
    assert scheduler.headroom.of(full) == -(-(5 + 24) // 4) - 1


def test_pressure_leaves_requests_within_their_budget_alone():
    inside, over = make_request("a", 8, 30, make_rule(8, 4)), make_request("b", 16, 30, make_rule(3, 4))
    _, model = started(inside, over, num_blocks=9, trigger="pressure", caching=False)
    step_until(model, lambda: model.compressed)
    assert {request for request, _, _ in model.compressed} == {over}


def test_pressure_counts_what_compressions_under_way_will_return():
    over = [make_request(name, 21, 20, make_rule(3, 4)) for name in "ab"]
    scheduler, model = started(*over, make_request("u", 4, 20), num_blocks=13, trigger="pressure", caching=False)
    model.orders = False
    model.step()
    assert scheduler.pool.num_free == 0
    assert [order.request for order in scheduler.order_compressions()] == over[:1]
    assert scheduler.order_compressions() == [], "four blocks are on their way already"


def test_pressure_asks_for_no_block_that_the_head_of_the_queue_will_share():
    holder, over = make_request("r", 17, 20), make_request("b", 21, 20, make_rule(3, 4))
    scheduler, model = started(holder, over, num_blocks=12, trigger="pressure")
    model.orders = False
    model.step()
    scheduler.add(make_request("h", holder.token_ids[:17].tolist(), 5))
    assert scheduler.pool.num_free == 1
    assert scheduler.order_compressions() == []
