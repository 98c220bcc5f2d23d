"""Compressions of requests that share blocks, and the prefix index."""

import pytest

from tests.scheduling.compressing import sharers, started, step_until
from tests.scheduling.fabricated import make_request, make_rule, make_samples
from zipage.scheduling.request import Status


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


def test_with_an_interval_only_the_kept_blocks_move_off_shared_ones():
    """Of five blocks, three of them a shared prompt's, two stay."""
    (first, second), scheduler, model = sharers(max_blocks=5, interval_blocks=3)
    step_until(model, lambda: second.status is Status.RUNNING)
    shared = first.block_ids[:3]
    assert second.block_ids[:3] == shared
    step_until(model, lambda: first.num_compressions == 1)
    assert (len(first.block_ids), first.peak_blocks) == (2, 5 + 2)
    assert not set(shared) & set(first.block_ids)
    assert [scheduler.pool.ref_counts[block] for block in shared] == [1, 1, 1]
    model.run()


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


def test_sharers_that_drop_blocks_need_no_fresh_ones():
    rule = make_rule(4, 4, drops_blocks=True)
    samples = make_samples(prompt=13, n=2, max_tokens=40, rule=rule)
    _, model = started(*samples, num_blocks=7)
    model.run()
    assert model.events["moved_off_shared"] == 0
