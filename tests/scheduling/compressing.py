"""Schedulers with requests in them, on the way to a compression."""

from tests.scheduling.fabricated import make_rule, make_samples, make_scheduler
from tests.scheduling.fabricated_model import FabricatedModel


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


def sharers(n=2, prompt=13, protected=0, max_blocks=4, interval_blocks=1, max_tokens=40, **options):
    rule = make_rule(max_blocks, 4, interval_blocks=interval_blocks, protected=protected)
    samples = make_samples(prompt=prompt, n=n, max_tokens=max_tokens, rule=rule)
    return samples, *started(*samples, **options)
