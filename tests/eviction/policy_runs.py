"""Policies over made-up requests: what they keep, and how they rank."""

from dataclasses import replace

import torch

from tests.eviction.dense_event import Run, dense_event, make_tokens
from zipage.eviction import registry

SCHEDULE = [[80, 96], [96, 80], [80, 80]]
REQUESTS = [make_tokens(31), make_tokens(32)]


def make(name, **options):
    options = {key.rstrip("_"): value for key, value in options.items()}
    return registry.make(name, options)


def kept(policy, requests=REQUESTS, **run):
    """Positions kept after every event of every request: int64 [events, requests, L, H, k]."""
    events = Run(**{"schedule": SCHEDULE, **run}).generate(policy, requests)
    return torch.stack([torch.stack(list(event.values())) for event in events])


def scores_of(policy, requests=REQUESTS, n=80, **options):
    """Scores of a first event over n entries of each request: [L, R, H, n]."""
    return policy.score(dense_event(policy, requests, [n] * len(requests), **options))


def with_keys(tokens, change):
    return replace(tokens, keys=change(tokens.keys))


def scripted(event, *answers):
    """Make `event.attention` answer with `answers` [n] in every layer, head and request."""
    answer = torch.stack(answers).expand(event.shape).clone()
    event.attention = lambda *_, **__: answer
    return event


def repeated(tokens, count):
    """The same entries under `count` seeds."""
    return [replace(tokens, seed=seed) for seed in range(count)]
