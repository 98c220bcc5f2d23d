"""Requests that leave, preempted or paused, and come back."""

import pytest

from tests.scheduling.compressing import sharers, started, step_until
from tests.scheduling.fabricated import make_request, make_rule
from zipage.scheduling.batch import Batch
from zipage.scheduling.headroom import COPIED_HEADROOM, HEADROOM, entries_to_keep
from zipage.scheduling.request import Status
from zipage.scheduling.swap_space import SwapCosts, SwapSpace


def test_a_resumed_request_has_room_for_its_next_token():
    old, request = make_request("a", 16, 6), make_request("b", 16, 60, make_rule(4, 4))
    scheduler, model = started(old, request, num_blocks=8, caching=False)
    model.step()
    model.compress()
    assert (request.cache_len, len(request.block_ids)) == (12, 3)
    model.pause(request)
    while old.status is Status.RUNNING:
        model.step()
        assert old.status is Status.FINISHED or request.status is Status.PAUSED, "three blocks are free, it needs four"
    model.run()
    assert scheduler.num_pauses == 1


@pytest.mark.parametrize("prompt", [5, 12, 17])
@pytest.mark.parametrize("window", [0, 4])
def test_a_request_preempted_when_due_is_compressed_at_the_same_length(prompt, window):
    def lengths(preempt):
        request = make_request(prompt=prompt, max_tokens=40, rule=make_rule(3, 4, window=window))
        scheduler, model = started(request)
        due = max(12, -(-prompt // 4) * 4)
        model.orders = False
        step_until(model, lambda: request.cache_len == due)
        if preempt:
            scheduler._evict_request(plan := Batch(), request)
            model.execute(plan)
            assert request.num_tokens == due + 1
        model.orders = True
        model.run()
        assert request.num_preemptions == preempt
        return [n for _, n, _ in model.compressed]

    assert lengths(True) == lengths(False)


def test_preemption_takes_the_youngest_whether_it_holds_a_slot_or_not():
    rule = make_rule(4, 4, window=4)
    requests = [make_request(name, 4, 40, rule) for name in "abcd"]
    scheduler, model = started(*requests, num_query_slots=2)
    model.step()
    assert scheduler._find_victim(requests[0]) is requests[3]
    requests[3].query_slot, requests[1].query_slot = requests[1].query_slot, -1
    assert scheduler._find_victim(requests[0]) is requests[3]
    assert scheduler._find_victim(requests[3]) is None


def test_one_that_lent_its_slot_does_not_leave_before_a_younger_borrower_nor_leave_and_return_at_once():
    first, second = make_request("a", 8, 20), make_request("b", 8, 20)
    lender = make_request("c", 8, 20, make_rule(2, 4, window=1))
    borrower = make_request("d", 9, 20, make_rule(5, 4, window=1))
    scheduler, model = started(first, second, lender, borrower, num_blocks=9, num_query_slots=1, caching=False)
    model.step()
    model.poll()
    assert [request.cache_len for request in (first, second, lender, borrower)] == [8, 8, 4, 9], "three grow now"
    scheduler.slots.take_back(lender)
    scheduler.slots.offer(borrower)
    scheduler.pool.allocate(scheduler.pool.num_free)
    plan = model.schedule()
    assert [p.request for p in plan.preempted] == [borrower]
    assert plan.paused == plan.resumed == []


def test_after_its_first_compression_a_victim_is_paused_and_comes_back_unchanged():
    full, request = make_request("a", 20, 60), make_request("b", 4, 80, make_rule(3, 4, window=4))
    scheduler, model = started(full, request, num_blocks=20, caching=False)
    step_until(model, lambda: request.status is Status.PAUSED)
    assert (request.num_pauses, request.num_preemptions) == (1, 0)
    assert request.query_slot == -1
    assert request.num_compressions > 1
    model.run()
    assert scheduler.num_pauses == scheduler.num_resumes == request.num_pauses
    assert full.num_preemptions == 0
    assert request.num_output_tokens == 80


def test_a_paused_request_keeps_its_age_and_regains_a_slot():
    rule = make_rule(3, 4, window=4)
    requests = [make_request(name, 12, 60, rule) for name in "abc"]
    scheduler, model = started(*requests, num_query_slots=3, max_num_seqs=3)
    last = make_request("d", 12, 60, rule)
    scheduler.add(last)
    step_until(model, lambda: min(request.num_compressions for request in requests) == 2)
    queries_from = requests[1].queries_from
    model.pause(requests[1])
    model.pause(requests[0])
    assert list(scheduler.waiting) == [*requests[:2], last]
    assert scheduler.slots.num_used == 1
    plan, _ = model.step()
    assert [swap.request for swap in plan.resumed] == requests[:2]
    assert plan.decodes == [requests[2]], "they decode from the next step on"
    assert scheduler.running == requests
    assert scheduler.slots.num_used == 3
    assert requests[1].queries_from == queries_from
    assert model.step()[0].decodes == requests
    model.run()


def test_a_paused_request_waits_for_the_slot_of_one_that_can_do_without():
    rule = make_rule(3, 8, window=3)
    first, second = make_request("a", 20, 40, rule), make_request("b", 16, 40, rule)
    scheduler, model = started(first, second, block_size=8, num_query_slots=1)
    step_until(model, lambda: first.num_compressions == 1 and second.cache_len == 21)
    assert first.query_slot == 0
    model.pause(first)
    scheduler.slots.assign(scheduler.running)
    assert scheduler.trigger.has_come_to_window(second)
    for _ in range(3):
        model.step()
        assert (first.status, second.query_slot) == (Status.PAUSED, 0)
    model.step()
    assert (first.query_slot, second.query_slot) == (0, -1), "the second is compressed"
    model.run()


def test_a_resumed_request_shares_its_protected_blocks_again():
    samples, _, model = sharers(n=2, prompt=9, protected=8)
    first, second = samples
    step_until(model, lambda: second.num_compressions == 2)
    pinned = first.block_ids[:2]
    model.pause(second)
    plan, _ = model.step()
    assert [(swap.request, swap.num_shared) for swap in plan.resumed] == [(second, 2)]
    assert second.block_ids[:2] == pinned
    model.run()


def test_a_resumed_request_gets_its_protected_entries_back_where_the_blocks_were_taken():
    rule = make_rule(4, 4, protected=8)
    request, other = make_request("a", 9, 60, rule), make_request("b", 48, 4)
    scheduler, model = started(request, num_blocks=13)
    step_until(model, lambda: request.num_compressions == 2)
    model.pause(request)
    scheduler.waiting.remove(request)
    scheduler.add(other)
    model.run()
    scheduler.waiting.append(request)
    plan, _ = model.step()
    assert plan.resumed[0].num_shared == 0
    model.run()
    assert request.num_output_tokens == 60


@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("bounded", [True, False])
def test_admission_and_return_leave_room_to_grow_to_those_that_no_compression_stops(paused, bounded):
    request = make_request("a", 12, 60, make_rule(3, 4))
    other = make_request("b", 4, 60, make_rule(3, 4) if bounded else None)
    scheduler, model = started(request, num_blocks=10, headroom=24)
    if paused:
        step_until(model, lambda: request.num_compressions == 1)
        model.pause(request)
    scheduler.waiting.remove(request)
    scheduler.add(other)
    step_until(model, lambda: len(other.block_ids) == 3)
    scheduler.waiting.append(request)
    model.step()
    assert set(scheduler.running) == ({request, other} if bounded else {other})


@pytest.mark.parametrize("paused", [True, False])
def test_alone_a_request_may_use_the_whole_pool(paused):
    request = make_request("a", 16, 20, make_rule(4, 4))
    scheduler, model = started(request, num_blocks=4, headroom=24)
    if paused:
        step_until(model, lambda: request.num_compressions == 1 and request.cache_len == 14)
        model.pause(request)
    model.run(max_steps=50)
    assert scheduler.num_resumes == paused


@pytest.mark.parametrize("trigger", ["block_full", "pressure"])
def test_a_request_paused_when_it_fills_the_pool_comes_back(trigger):
    request = make_request("a", 4, 40, make_rule(4, 4, window=4))
    scheduler, model = started(request, num_blocks=4, trigger=trigger)
    step_until(model, lambda: request.num_compressions == 1)
    model.orders = False
    step_until(model, lambda: request.cache_len == 16)
    model.pause(request)
    model.orders = True
    model.run(max_steps=60)
    assert scheduler.num_resumes == 1


def test_an_abort_while_paused():
    request, other = make_request("a", 12, 60, make_rule(3, 4, window=4)), make_request("b", 12, 20)
    scheduler, model = started(request, other)
    step_until(model, lambda: request.num_compressions == 1)
    model.pause(request)
    model.abort(request)
    assert (request.status, request.finish_reason) == (Status.FINISHED, "abort")
    assert list(scheduler.waiting) == []
    assert model.host_copies.keys() == {request.number}
    model.step()
    assert not model.host_copies, "the next plan says to drop them"
    model.run()


# Copies of requests that were never compressed


def ample() -> SwapSpace:
    return SwapSpace(100, 2, SwapCosts(block_bytes=0, token_operations=1, pair_operations=0))


@pytest.mark.parametrize(("num_slabs", "copied"), [(0, False), (1, False), (2, True)])
def test_a_victim_is_copied_where_there_is_room(num_slabs, copied):
    old, request = make_request("a", 12, 12), make_request("b", 12, 12)
    scheduler, model = started(old, request, num_blocks=7, caching=False, swap_space=ample())
    scheduler.swap_space.num_slabs = num_slabs
    model.step()
    step_until(model, lambda: request.status is not Status.RUNNING)
    assert (request.status is Status.PAUSED) == copied
    assert scheduler.swap_space.num_used == (2 if copied else 0), "three blocks, two of which a slab holds"
    model.run()
    assert (request.num_pauses, request.num_preemptions) == ((1, 0) if copied else (0, 1))


def test_what_came_back_is_in_the_prefix_index_again():
    old, request = make_request("a", 12, 12), make_request("b", 12, 12)
    scheduler, model = started(old, request, num_blocks=7, swap_space=ample())
    step_until(model, lambda: request.status is Status.PAUSED)
    step_until(model, lambda: request.status is Status.RUNNING)
    model.step()
    assert len(request.prefix_ids) == request.cache_len // 4 == 3
    model.run()
    assert 0 < scheduler.swap_space.blocks_in <= scheduler.swap_space.blocks_out == 3


def test_one_that_fills_the_pool_without_the_queries_of_its_window_is_computed_again():
    """Copied, it would come back without them and leave for ever."""
    request = make_request("a", 4, 40, make_rule(4, 4, window=4))
    scheduler, model = started(request, num_blocks=4, trigger="pressure", swap_space=ample())
    step_until(model, lambda: request.cache_len == 15)
    scheduler.slots.take_back(request)
    model.run(max_steps=80)
    assert request.num_preemptions == 1
    assert request.num_compressions > 0


def test_a_copy_costs_twice_its_bytes_and_a_computation_grows_with_the_square():
    costs = SwapCosts(block_bytes=1_000, token_operations=1_000_000, pair_operations=2_000)
    assert not costs.is_copy_cheaper(10, 160)  # 200 million against 160 million, and 26 million of attention
    assert costs.is_copy_cheaper(10, 176)
    assert not costs.is_copy_cheaper(10, 1), "of a request whose prompt has just begun"
    assert costs.is_copy_cheaper(200, 2400), "4 billion against 2.4, and 5.8 of attention"


@pytest.mark.parametrize(
    ("space", "room"),
    [
        (SwapSpace(8, 2, SwapCosts(1, 10**9, 0)), COPIED_HEADROOM),
        (SwapSpace(0, 2, SwapCosts(1, 10**9, 0)), HEADROOM),
        (SwapSpace(8, 2, SwapCosts(10**9, 1, 0)), HEADROOM),
        (SwapSpace(), HEADROOM),
    ],
    ids=["copied", "no slabs", "cheaper to compute", "no host memory"],
)
def test_less_room_is_kept_where_those_who_leave_are_copied(space, room):
    assert entries_to_keep(space, block_size=16) == room
