"""When a request is compressed next, as each trigger answers it."""

import pytest

from tests.scheduling.fabricated import make_request, make_rule
from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.request import Status
from zipage.scheduling.triggers import PACE, TRIGGERS, BlockFull

THREE_BLOCKS = make_rule(3, 4)


def held(name="a", prompt=6, entries=8, compressed=0, rule=THREE_BLOCKS):
    """A running request of N_max 3 blocks of 4, or under another rule, with that many entries."""
    request = make_request(name, prompt, entries + 100, rule)
    request.status = Status.RUNNING
    request.block_ids = list(range(-(-entries // rule.budget.block_size)))
    request.cache_len, request.num_computed = entries, entries + 10 * compressed
    request.token_ids.extend([5] * (request.num_computed + 1 - request.num_tokens))
    request.num_compressions = compressed
    return request


@pytest.fixture(params=TRIGGERS)
def trigger(request):
    return TRIGGERS[request.param](BlockPool(20, 4))


@pytest.mark.parametrize(
    ("request_", "block_full", "pressure"),
    [
        (held(prompt=6, entries=8), (12, 12), (80, 9)),
        (held(prompt=21, entries=24), (24, 24), (80, 25)),
        (held(prompt=21, entries=12, compressed=1), (12, 12), (80, 23)),
    ],
    ids=["short prompt", "long prompt", "compressed"],
)
def test_entries_at_the_next_compression(trigger, request_, block_full, pressure):
    expected = block_full if isinstance(trigger, BlockFull) else pressure
    assert (trigger.most_entries(request_), trigger.fewest_entries(request_)) == expected


def test_a_request_is_due_when_its_budget_is_full_and_under_pressure_when_blocks_lack():
    block_full, pressure = (TRIGGERS[name](BlockPool(20, 4)) for name in ("block_full", "pressure"))
    inside, full, over = held("a", entries=8), held("b", entries=12), held("c", prompt=21, entries=24)
    running = [inside, full, over]
    assert [block_full.is_due(request) for request in running] == [False, True, True]
    assert block_full.choose(running, running, (), lambda: 0) == [full, over]
    assert not any(map(pressure.is_due, running))
    for num_short, expected in ((0, []), (1, [over]), (4, [over]), (5, [over, full])):
        assert pressure.choose(running, running, (), lambda short=num_short: short) == expected
    assert block_full.blocks_to_expect(inside) == 3
    assert pressure.blocks_to_expect(inside) == 0


def test_the_window_of_the_next_compression():
    """The last two of twelve entries."""
    block_full, pressure = (TRIGGERS[name](BlockPool(20, 4)) for name in ("block_full", "pressure"))
    request = held(rule=make_rule(3, 4, window=2))
    assert [block_full.is_in_window(request, n, -(-(n + 1) // 4)) for n in (6, 8, 9, 10, 11)] == [False] * 3 + [
        True
    ] * 2
    assert not pressure.is_in_window(request, 11, 3)


def test_an_interval_of_two_blocks():
    """Two blocks kept of four."""
    block_full, pressure = (TRIGGERS[name](BlockPool(20, 4)) for name in ("block_full", "pressure"))
    rule = make_rule(4, 4, interval_blocks=2, window=2)
    three, full = held("a", entries=12, rule=rule), held("b", entries=16, rule=rule)
    assert block_full.choose([three, full], [three, full], (), lambda: 0) == [full]
    assert (block_full.most_entries(three), block_full.blocks_to_expect(three)) == (16, 4)
    assert [block_full.is_in_window(full, n, -(-(n + 1) // 4)) for n in (11, 13, 14)] == [False, False, True]
    assert pressure.fewest_entries(held(entries=4, rule=rule)) == 9, "one more than stay"
    over, most = held("c", entries=12, rule=make_rule(4, 4, interval_blocks=2)), held("d", entries=20, rule=rule)
    most.query_slot = 0
    assert pressure.choose([over, most], [over, most], (), lambda: 3) == [most], "it gives three blocks back"
    assert pressure.choose([over, most], [over, most], (), lambda: 4) == [most, over]


# A wave


def wave(count, entries=640, prompt=6, interval_blocks=1):
    rule = make_rule(5, 128, interval_blocks=interval_blocks)
    return [held(str(i), prompt, entries, rule=rule) for i in range(count)]


def test_a_wave_is_compressed_at_a_multiple_of_the_rate_of_compressions():
    """512 requests that are due together, and are due every 128 steps: 16 at a step, oldest first, within 32 steps."""
    trigger = BlockFull(BlockPool(4096, 128))
    running = wave(512)
    waiting = running
    for step in range(128 // PACE):
        chosen = trigger.choose(running, running, (), lambda: 0)
        assert chosen == waiting[: 512 * PACE // 128], step
        waiting = waiting[len(chosen) :]
        assert [request for request in running if trigger.is_deferred(request)] == waiting
        for request in chosen:
            request.cache_len, request.block_ids = 512, request.block_ids[:4]
    assert not waiting
    assert trigger.choose(running, running, (), lambda: 0) == []


@pytest.mark.parametrize(
    ("count", "interval_blocks", "most"), [(512, 2, 8), (100, 1, 4), (8, 1, 1), (2, 1, 1), (1, 1, 1)]
)
def test_what_a_step_bears_grows_with_those_that_run_and_shrinks_with_their_interval(count, interval_blocks, most):
    trigger = BlockFull(BlockPool(4096, 128))
    running = wave(count, interval_blocks=interval_blocks)
    assert len(trigger.choose(running, running, (), lambda: 0)) == most


def test_a_request_of_more_blocks_than_it_may_hold_is_never_passed_over():
    trigger = BlockFull(BlockPool(4096, 128))
    running = wave(8) + wave(3, entries=1280, prompt=1280)
    assert trigger.choose(running, running, (), lambda: 0) == [running[0], *running[8:]]
    assert [trigger.is_deferred(request) for request in running] == [False] + [True] * 7 + [False] * 3


def test_pressure_passes_nobody_over():
    """It chooses no more than memory wants."""
    trigger = TRIGGERS["pressure"](BlockPool(4096, 128))
    running = wave(64)
    assert trigger.choose(running, running, (), lambda: 64) == running
    assert not any(map(trigger.is_deferred, running))
