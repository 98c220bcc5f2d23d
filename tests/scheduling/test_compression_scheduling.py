import os

import pytest

from tests.scheduling.fabricated import FabricatedModel, make_request, make_rule, make_samples, make_scheduler
from tests.scheduling.simulate_scheduler import missing, simulate
from zipage.scheduling.batch import Batch
from zipage.scheduling.compression import num_fresh_blocks
from zipage.scheduling.request import Status


def started(*requests, num_blocks=64, block_size=4, max_delay=0, **options):
    scheduler = make_scheduler(num_blocks, block_size, **({"num_query_slots": 8} | options))
    for request in requests:
        scheduler.add(request)
    return scheduler, FabricatedModel(scheduler, max_delay=max_delay)


def step_until(model, condition, max_steps=200):
    for _ in range(max_steps):
        if condition():
            return
        model.step()
    raise AssertionError("it never came")


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


# Who may run


def test_hybrid_lets_a_request_without_slot_run_until_w_entries_are_free_and_no_further():
    rule = make_rule(3, 8, window=3)
    holder, other = make_request("a", 4, 60, rule), make_request("b", 4, 60, rule)
    scheduler, model = started(holder, other, block_size=8, num_query_slots=1)
    step_until(model, lambda: holder.num_output_tokens == 50)
    assert other.query_slot == -1
    assert other.cache_len == 24 - 3
    plan, _ = model.step()
    assert plan.num_stalled == 1
    assert plan.decodes == [holder]
    model.run()
    assert other.num_output_tokens == 60
    assert scheduler.num_pauses == 0


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


def test_hybrid_does_not_admit_a_prompt_that_reaches_into_its_window_without_slot():
    rule = make_rule(3, 8, window=3)
    holder, long, short = make_request("a", 4, 30, rule), make_request("b", 22, 5, rule), make_request("c", 4, 5, rule)
    scheduler, model = started(holder, long, short, block_size=8, num_query_slots=1)
    step_until(model, lambda: holder.num_output_tokens == 29)
    assert list(scheduler.waiting) == [long, short]
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


# Pressure


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


# Sharing


def sharers(n=2, prompt=13, protected=0, max_blocks=4, max_tokens=40, **options):
    rule = make_rule(max_blocks, 4, protected=protected)
    samples = make_samples(prompt=prompt, n=n, max_tokens=max_tokens, rule=rule)
    return samples, *started(*samples, **options)


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-index", "no-index"])
def test_survivors_leave_shared_blocks_for_private_ones_and_the_references_are_dropped(caching):
    (first, second), scheduler, model = sharers(caching=caching)
    step_until(model, lambda: second.status is Status.RUNNING)
    shared = first.block_ids[:3]
    assert second.block_ids[:3] == shared
    step_until(model, lambda: first.num_compressions == 1)
    assert second.block_ids[:3] == shared
    assert not set(shared) & set(first.block_ids)
    assert [scheduler.pool.ref_counts[block] for block in shared] == [1, 1, 1]
    model.run()
    assert model.events["moved_off_shared"] == 1, "once the first has left, the blocks are the second's own"


def test_a_protected_prompt_stays_shared_by_all_samples_and_later_ones_find_it():
    samples, scheduler, model = sharers(n=4, prompt=9, protected=8, max_num_seqs=3)
    step_until(model, lambda: min(sample.num_compressions for sample in samples[:3]) == 3)
    pinned = samples[0].block_ids[:2]
    assert all(sample.block_ids[:2] == pinned for sample in samples[:3])
    assert [scheduler.pool.ref_counts[block] for block in pinned] == [3, 3]
    again = make_request("again", prompt=samples[0].token_ids[:9].tolist(), max_tokens=5)
    scheduler.add(again)
    model.abort(samples[1])
    model.abort(samples[2])
    model.step()
    assert samples[3].block_ids[:2] == pinned
    assert (samples[3].cached_tokens, again.cached_tokens) == (8, 8)
    assert again.block_ids[:2] == pinned
    model.run()


def test_without_index_a_later_sample_shares_the_protected_blocks_of_a_compressed_sibling():
    samples, _, model = sharers(n=2, prompt=13, protected=8, max_num_seqs=1, caching=False, max_tokens=30)
    step_until(model, lambda: samples[0].num_compressions == 2)
    model.scheduler.max_num_seqs += 1
    model.scheduler._rows.append(1)
    model.tables.append([0] * 64)
    plan, _ = model.step()
    assert samples[1].cached_tokens == 8
    assert samples[1].block_ids[:2] == samples[0].block_ids[:2]
    assert plan.copies == [], "the sibling's last prompt block holds survivors now"
    model.run()


def test_compacted_blocks_leave_the_prefix_index_and_nothing_after_an_eviction_enters_it():
    request = make_request(prompt=13, max_tokens=60, rule=make_rule(4, 4, protected=5))
    scheduler, model = started(request)
    pool = scheduler.pool
    model.orders = False
    step_until(model, lambda: request.cache_len == 16)
    before = request.block_ids.copy()
    assert all(map(pool.is_indexed, before))
    model.compress()
    assert [pool.is_indexed(block) for block in before] == [True, False, False, True]
    assert request.block_ids == before[:3]
    model.orders = True
    num_cached = pool.num_cached
    while request.status is not Status.FINISHED:
        model.step()
        assert pool.num_cached <= num_cached
    assert pool.num_cached == num_cached == 2, "the protected block, and the one that was left as it was"


def test_a_prefix_hit_leaves_the_window_of_the_first_compression_to_be_computed():
    first, second = make_samples(prompt=12, n=2, max_tokens=20, rule=make_rule(3, 4, window=4))
    first.rule = None
    _, model = started(first, second)
    step_until(model, lambda: second.status is Status.RUNNING)
    assert (second.cached_tokens, second.queries_from) == (8, 8)
    model.run()


@pytest.mark.parametrize("window", [2, 4])
def test_under_pressure_a_prefix_hit_leaves_the_window_before_the_texts_end_to_be_computed(window):
    rule = make_rule(2, 4, window=window)
    first, again = make_request("a", list(range(10, 19)), 3, rule), make_request("b", list(range(10, 19)), 3, rule)
    scheduler, model = started(first, trigger="pressure")
    model.run()
    scheduler.add(again)
    model.step()
    assert again.cached_tokens == 4


def test_two_sharers_due_at_once_in_a_full_pool_both_end():
    (first, second), scheduler, model = sharers(num_blocks=5)
    step_until(model, lambda: first.cache_len == 16)
    assert scheduler.pool.num_free == 0
    plans = model.run(max_steps=200)
    assert first.num_preemptions == first.num_pauses == 0
    assert second.num_preemptions >= 1
    assert [sample.num_output_tokens for sample in (first, second)] == [40, 40]
    assert len(plans) < 120


def test_a_due_sharer_without_room_is_recomputed_and_never_given_an_empty_chunk():
    rule = make_rule(4, 4)
    first, second = make_samples(prompt=12, n=2, max_tokens=40, rule=rule)
    first.rule = make_rule(5, 4)
    _, model = started(first, second, num_blocks=6)
    plans = model.run(max_steps=300)
    assert second.num_preemptions >= 1
    assert first.num_preemptions == 0
    assert all(chunk.num_tokens > 0 for plan in plans for chunk in plan.prefills)


def test_nobody_is_admitted_while_a_due_request_waits_for_blocks():
    (first, second), scheduler, model = sharers(num_blocks=6, prompt=9)
    third = make_request("c", first.token_ids[:9].tolist(), 4)
    while not (plan := model.step()[0]).preempted:
        pass
    assert [p.request for p in plan.preempted] == [second]
    assert second.status is Status.WAITING
    scheduler.add(third)
    model.run(max_steps=300)


# Leaving and coming back


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


def test_preemption_takes_those_without_slot_first_and_then_the_youngest():
    rule = make_rule(4, 4, window=4)
    requests = [make_request(name, 4, 40, rule) for name in "abcd"]
    scheduler, model = started(*requests, num_query_slots=2)
    model.step()
    assert [request.query_slot >= 0 for request in requests] == [True, True, False, False]
    requests[3].query_slot, requests[1].query_slot = requests[1].query_slot, -1
    assert scheduler._find_victim(requests[0]) is requests[2]
    requests[2].query_slot = 7
    assert scheduler._find_victim(requests[0]) is requests[1]
    requests[1].query_slot = 6
    assert scheduler._find_victim(requests[0]) is requests[3]
    assert scheduler._find_victim(requests[3]) is None


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


def test_a_paused_request_waits_for_a_slot():
    rule = make_rule(3, 4, window=4)
    first, second = make_request("a", 12, 20, rule), make_request("b", 4, 20, rule)
    scheduler, model = started(first, second, num_query_slots=1)
    step_until(model, lambda: first.num_compressions == 1)
    model.pause(first)
    scheduler.slots.assign(scheduler.running)
    step_until(model, lambda: second.status is Status.FINISHED)
    assert first.status is Status.PAUSED
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


def test_under_pressure_room_to_grow_is_kept_for_the_unbounded_alone():
    bounded, full = make_request("a", 4, 60, make_rule(3, 4)), make_request("b", 4, 60)
    scheduler, model = started(bounded, full, num_blocks=30, trigger="pressure", headroom=24)
    model.step()
    assert scheduler.headroom.of(bounded) == 0
    assert scheduler.headroom.of(full) == -(-(5 + 24) // 4) - 1


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


def test_sharers_that_drop_blocks_need_no_fresh_ones():
    rule = make_rule(4, 4, drops_blocks=True)
    samples = make_samples(prompt=13, n=2, max_tokens=40, rule=rule)
    _, model = started(*samples, num_blocks=7)
    model.run()
    assert model.events["moved_off_shared"] == 0


# Everything at once


def test_random_loads_end_without_leak_deadlock_starvation_or_wrong_entry():
    """ZIPAGE_SCHEDULER_STEPS=100000 runs the full share."""
    events, labels, _ = simulate(int(os.environ.get("ZIPAGE_SCHEDULER_STEPS", "15000")))
    assert missing(events) == []
    for label in ("compression=sync", "compression=async", "trigger=pressure", "scheduling=constrained"):
        assert labels[label] > 5
