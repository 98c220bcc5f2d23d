import random

import pytest

from tests.scheduling.fabricated import make_request, make_samples, make_scheduler
from tests.scheduling.fabricated_model import FabricatedModel
from zipage.scheduling.request import Status


def test_decodes_come_before_prefill_within_the_token_budget():
    scheduler = make_scheduler(max_num_batched_tokens=24)
    model = FabricatedModel(scheduler)
    first, second = make_request("a", prompt=10), make_request("b", prompt=40)
    scheduler.add(first)
    scheduler.add(second)
    plan, _ = model.step()
    assert [(c.request, c.num_tokens) for c in plan.prefills] == [(first, 10), (second, 14)]
    assert plan.sampled == [first]
    plan, _ = model.step()
    assert plan.decodes == [first]
    assert [(c.request, c.num_tokens) for c in plan.prefills] == [(second, 23)]
    plan, _ = model.step()
    assert [(c.request, c.num_tokens) for c in plan.prefills] == [(second, 3)]
    assert plan.sampled == [first, second]


def test_whole_prompts_only_where_chunking_is_off():
    scheduler = make_scheduler(max_num_batched_tokens=48, enable_chunked_prefill=False)
    for name in "abc":
        scheduler.add(make_request(name, prompt=30))
    plans = FabricatedModel(scheduler).run()
    assert all(chunk.num_tokens == 30 for plan in plans for chunk in plan.prefills)
    assert sum(len(plan.prefills) for plan in plans) == 3


def test_second_request_of_a_prefix_computes_only_the_rest():
    scheduler = make_scheduler()
    model = FabricatedModel(scheduler)
    scheduler.add(make_request("a", prompt=list(range(10, 50))))
    model.run()
    again = make_request("b", prompt=list(range(10, 50)))
    scheduler.add(again)
    plan, _ = model.step()
    assert plan.prefills[0].num_tokens == 8
    assert again.cached_tokens == 32


def test_a_fully_cached_prompt_still_computes_its_last_block():
    scheduler = make_scheduler()
    model = FabricatedModel(scheduler)
    scheduler.add(make_request("a", prompt=list(range(10, 42))))
    model.run()
    scheduler.add(make_request("b", prompt=list(range(10, 42))))
    plan, _ = model.step()
    assert plan.prefills[0].num_tokens == 16
    assert len(plan.sampled) == 1


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-index", "no-index"])
@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 33, 40])
def test_samples_share_the_prompt_and_compute_one_token_each(prompt, caching):
    scheduler = make_scheduler(caching=caching)
    model = FabricatedModel(scheduler)
    samples = make_samples(prompt=prompt, n=4)
    for sample in samples:
        scheduler.add(sample)
    plan, _ = model.step()
    assert [c.request for c in plan.prefills] == samples[:1]
    plan, _ = model.step()
    assert [c.num_tokens for c in plan.prefills] == [1, 1, 1]
    full = (prompt - 1) // 16
    assert all(s.block_ids[:full] == samples[0].block_ids[:full] for s in samples)
    assert len({s.block_ids[full] for s in samples}) == 4, "the last block is private"
    model.run()


def test_samples_wait_only_for_their_own_prompt():
    scheduler = make_scheduler(max_num_batched_tokens=32)
    model = FabricatedModel(scheduler)
    samples = make_samples("a", prompt=20, n=2)
    other = make_request("b", prompt=5)
    for request in [*samples, other]:
        scheduler.add(request)
    plan, _ = model.step()
    assert [c.request for c in plan.prefills] == [samples[0], other]
    assert list(scheduler.waiting) == [samples[1]]


def test_sample_whose_sibling_is_gone_computes_the_prompt_itself():
    scheduler = make_scheduler(max_num_seqs=1, caching=False)
    model = FabricatedModel(scheduler)
    for sample in make_samples(prompt=20, n=2, max_tokens=3):
        scheduler.add(sample)
    plans = model.run()
    assert [c.num_tokens for plan in plans for c in plan.prefills] == [20, 20]


def test_youngest_is_preempted_and_returns_first():
    scheduler = make_scheduler(num_blocks=4, caching=False, max_num_seqs=2)
    model = FabricatedModel(scheduler)
    old, young, new = (make_request(n, prompt=p, max_tokens=30) for n, p in (("a", 30), ("b", 30), ("c", 4)))
    for request in (old, young, new):
        scheduler.add(request)
    while not (plan := model.step()[0]).preempted:
        pass
    assert [preemption.request for preemption in plan.preempted] == [young]
    assert young.status is Status.WAITING
    assert young.num_computed == young.cache_len == len(young.block_ids) == 0
    tokens = young.num_tokens
    assert list(scheduler.waiting) == [young, new]
    while young.status is Status.WAITING:
        assert new.status is Status.WAITING
        model.step()
    assert young.num_tokens >= tokens
    assert young.num_preemptions == 1
    model.run()
    assert old.num_preemptions == 0
    assert [r.num_output_tokens for r in (old, young, new)] == [30, 30, 30]


@pytest.mark.parametrize(("headroom", "admitted"), [(6, True), (7, False)])
def test_admission_leaves_room_to_grow(headroom, admitted):
    """The first holds 38 of 40 tokens' room in ten of twelve blocks; the second takes one of the two that are left."""
    scheduler = make_scheduler(num_blocks=12, block_size=4, headroom=headroom)
    model = FabricatedModel(scheduler)
    scheduler.add(make_request("a", prompt=37, max_tokens=30))
    model.step()
    scheduler.add(make_request("b", prompt=4, max_tokens=30))
    model.step()
    assert len(scheduler.running) == 1 + admitted


def test_no_room_is_kept_beyond_a_request_s_end():
    scheduler = make_scheduler(num_blocks=12, block_size=4, headroom=128)
    model = FabricatedModel(scheduler)
    scheduler.add(make_request("a", prompt=37, max_tokens=4))
    scheduler.add(make_request("b", prompt=8, max_tokens=30))
    model.step()
    assert len(scheduler.running) == 2


def test_room_to_grow_saves_preemptions():
    def preemptions(headroom: int) -> int:
        scheduler = make_scheduler(128, 4, headroom=headroom, max_num_seqs=32)
        model = FabricatedModel(scheduler)
        requests = [make_request(f"r{i}", prompt=16 + i % 7, max_tokens=60) for i in range(48)]
        for request in requests:
            scheduler.add(request)
        model.run()
        assert all(request.num_output_tokens == 60 for request in requests)
        return sum(request.num_preemptions for request in requests)

    assert preemptions(16) < preemptions(0)


def test_end_tokens_and_length_end_a_request():
    scheduler = make_scheduler()
    model = FabricatedModel(scheduler)
    request = make_request(max_tokens=3)
    scheduler.add(request)
    model.run()
    assert request.finish_reason == "length"
    request = make_request(max_tokens=3)
    scheduler.add(request)
    model.step(eos_share=1.0)
    assert (request.finish_reason, request.num_output_tokens) == ("stop", 1)


def test_finish_takes_requests_from_any_queue():
    scheduler = make_scheduler(max_num_seqs=1)
    model = FabricatedModel(scheduler)
    requests = [make_request(name) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    model.step()
    scheduler.finish(requests[:2], "abort")
    assert scheduler.running == []
    assert list(scheduler.waiting) == requests[2:]
    model.run()
    assert [r.finish_reason for r in requests] == ["abort", "abort", "length"]


@pytest.mark.parametrize("seed", range(12))
def test_random_loads_end_without_leak_starvation_or_stale_entry(seed):
    rng = random.Random(seed)
    size = rng.choice([1, 2, 4, 16])
    num_blocks = rng.randrange(64 // size, 160 // size) + 2
    scheduler = make_scheduler(
        num_blocks,
        size,
        caching=rng.random() < 0.7,
        headroom=rng.choice([0, 0, 1, size, 128]),
        max_num_seqs=rng.randrange(1, 10),
        max_num_batched_tokens=rng.randrange(10, 80),
    )
    model = FabricatedModel(scheduler, seed)
    families = [[rng.randrange(10, 12) for _ in range(60)] for _ in range(3)]
    requests = []
    for i in range(60):
        prompt = rng.choice(families)[: rng.randrange(1, 40)] + [rng.randrange(10, 12) for _ in range(rng.randrange(3))]
        room = num_blocks * size - len(prompt)
        requests += make_samples(f"r{i}", prompt, max_tokens=rng.randrange(1, min(30, room)), n=rng.randrange(1, 4))
    pending = list(requests)
    steps = 0
    while pending or scheduler.has_unfinished:
        while pending and rng.random() < 0.3:
            scheduler.add(pending.pop(0))
        if scheduler.has_unfinished:
            model.step(eos_share=0.02)
            if rng.random() < 0.02:
                victim = rng.choice(requests)
                if victim.status is Status.RUNNING:
                    scheduler.finish([victim], "abort")
        steps += 1
        assert steps < 20_000
    assert all(r.status is Status.FINISHED for r in requests)
    assert scheduler.pool.num_free == num_blocks
