"""Host time of a scheduler step (schedule + update) over 512 running requests, with a fabricated model.

    make bench-scheduler                                        # prints a table
    python -m pytest tests/benchmarks/bench_scheduler.py --benchmark-json=FILE   # writes the record

A step in which nothing special happens, one in which every request takes a new block and enters the full one in the
prefix index, and the mean over a whole block's worth of steps.
"""

from __future__ import annotations

import pytest

from zipage.sampling_params import SamplingParams
from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.request import Request
from zipage.scheduling.scheduler import Scheduler

NUM_REQUESTS = 512
PROMPT = 1000


def running(block_size: int, stagger: bool) -> Scheduler:
    """A scheduler with 512 decoding requests; `stagger` spreads their lengths over a block."""
    length = PROMPT // block_size * block_size
    num_blocks = NUM_REQUESTS * (length + 4096) // block_size
    scheduler = Scheduler(
        BlockPool(num_blocks, block_size), max_num_seqs=NUM_REQUESTS, max_num_batched_tokens=NUM_REQUESTS * 2 * PROMPT
    )
    params = SamplingParams(max_tokens=10**9)
    for i in range(NUM_REQUESTS):
        prompt = [i] * (length + (i % block_size if stagger else 0))
        scheduler.add(Request(str(i), prompt, params, max_total_tokens=10**9, stop_ids=frozenset([2])))
    step(scheduler)
    assert len(scheduler.running) == NUM_REQUESTS
    return scheduler


def step(scheduler: Scheduler) -> None:
    plan = scheduler.schedule()
    scheduler.advance(plan)
    scheduler.update(plan, [7] * len(plan.sampled))


@pytest.mark.parametrize("block_size", [16, 256])
def test_plain_step(benchmark, block_size):
    scheduler = running(block_size, stagger=False)
    step(scheduler)
    # Every request is one token into a fresh block; so many rounds cross no border.
    benchmark.pedantic(step, (scheduler,), rounds=10)


@pytest.mark.parametrize("block_size", [16, 256])
def test_every_request_crosses_a_block_border(benchmark, block_size):
    schedulers = iter([running(block_size, stagger=False) for _ in range(5)])

    def at_the_border():
        scheduler = next(schedulers)
        for _ in range(block_size - 1):
            step(scheduler)
        return (scheduler,), {}

    benchmark.pedantic(step, setup=at_the_border, rounds=5)


@pytest.mark.parametrize("block_size", [16, 256])
def test_staggered_requests(benchmark, block_size):
    scheduler = running(block_size, stagger=True)
    benchmark.pedantic(step, (scheduler,), rounds=2 * block_size)
