"""What policies that draw at random promise: vase, random and random_shared."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import binom, chisquare

from tests.eviction.dense_event import Tokens, dense_event, make_tokens, select
from tests.eviction.policy_runs import REQUESTS, kept, make, repeated

# vase


@pytest.mark.parametrize("protection", ["none", "prompt"])
def test_vase_widest_values_always_stay(protection):
    tokens = REQUESTS[0]
    first = 24 if protection == "prompt" else 0
    positions = kept(make("vase"), repeated(tokens, 20), schedule=[[80] * 20], protection=protection)[0]
    widths = tokens.values[:, :, first:64].amax(dim=-1) - tokens.values[:, :, first:64].amin(dim=-1)
    if protection == "none":
        widths[..., :4] = math.inf
    widest = widths.topk(16, dim=-1).indices + first
    held = (positions[..., None, :] == widest[..., :, None]).any(dim=-1)
    assert held.all()


def test_vase_same_seed_same_set():
    policy = make("vase")
    assert torch.equal(kept(policy), kept(policy))
    others = [replace(tokens, seed=tokens.seed + 1) for tokens in REQUESTS]
    assert not torch.equal(kept(policy), kept(policy, others))


def test_vase_one_draw_follows_p():
    policy = make("vase")
    runs = 3000
    # Of 12 entries before the window 5 are the reserve, and the one entry left of the budget is drawn from 7.
    event = dense_event(policy, repeated(make_tokens(34, layers=1, heads=1), runs), [28] * runs, keep=22)
    scores = policy.score(event)[0, :, 0]
    rest = (scores[0, :12] < 100).nonzero().flatten()
    assert len(rest) == 7
    p = event.pool(event.attention("cut", group="mean", window="mean"), 5, "mean", event.window_start)[0, 0, 0, rest]
    drawn = torch.stack([select(row, forced, 22) for row, forced in zip(scores, event.forced)])
    counts = (drawn[:, :, None] == rest).sum(dim=(0, 1))
    assert counts.sum() == runs
    expected = p.double() / p.double().sum() * runs
    assert chisquare(counts, expected).pvalue > 1e-4


def test_vase_uniform_chances_are_random_outside_the_reserve():
    policy = make("vase")
    runs = 1500
    tokens = make_tokens(35, layers=1, heads=1)
    event = dense_event(policy, repeated(tokens, runs), [80] * runs)
    event.pool = lambda scores, *_: torch.full_like(scores, 1 / 64)
    scores = policy.score(event)[0, :, 0]
    positions = torch.stack([select(row, forced, 64) for row, forced in zip(scores, event.forced)])
    counts = torch.bincount(positions.flatten(), minlength=80)[:64]
    free = counts[counts < runs]
    assert len(free) == 64 - 16
    rho = (64 - 16 - 16) / 48
    assert binom.ppf(1e-6, runs, rho) <= free.min() <= free.max() <= binom.ppf(1 - 1e-6, runs, rho)


def test_vase_cuts_the_reserve_to_what_is_free():
    tokens = replace(REQUESTS[0], prompt_len=40)
    positions = kept(make("vase"), [tokens], schedule=[[80]], protection="prompt")[0, 0]
    widths = tokens.values[:, :, 40:64].amax(dim=-1) - tokens.values[:, :, 40:64].amin(dim=-1)
    assert torch.equal(positions[..., 40:48], widths.topk(8, dim=-1).indices.sort(dim=-1).values + 40)


def test_vase_draws_where_most_chances_are_zero():
    policy = make("vase")
    event = dense_event(policy, REQUESTS, [80, 80])
    event.pool = lambda scores, *_: torch.zeros_like(scores)
    assert policy.score(event).isfinite().all()


def test_vase_dkv_needs_no_queries_and_keeps_the_first_four():
    policy = make("vase", mode="dkv")
    assert not policy.needs_queries
    positions = kept(policy)
    assert (positions[..., :4] == torch.arange(4)).all()
    others = [replace(tokens, seed=tokens.seed + 1) for tokens in REQUESTS]
    assert not torch.equal(positions, kept(policy, others))


# random


def test_random_survivors_are_uniform_over_the_free_entries():
    runs = 400
    tokens = make_tokens(36)
    positions = kept(make("random"), repeated(tokens, runs), schedule=[[80] * runs], protection="prompt")[0]
    counts = torch.bincount(positions.flatten(), minlength=80)
    trials = runs * 4
    assert (counts[:24] == trials).all()
    assert (counts[64:] == trials).all()
    rho = (64 - 40) / (80 - 40)
    free = counts[24:64]
    assert free.sum() == 24 * trials
    assert binom.ppf(1e-6, trials, rho) <= free.min() <= free.max() <= binom.ppf(1 - 1e-6, trials, rho)


def overlap(positions):
    """Mean share of free entries that the two heads of a layer both keep; positions [R, L, 2, k], r = 16."""
    free = positions[..., :48]
    return (free[:, :, 0, :, None] == free[:, :, 1, None]).any(-1).float().mean()


def test_random_heads_draw_for_themselves_and_shared_heads_do_not():
    runs = 200
    requests = repeated(make_tokens(37), runs)
    positions = {
        share: kept(make("random_shared", share=share), requests, schedule=[[80] * runs])[0]
        for share in ("heads", "all")
    }
    independent = kept(make("random"), requests, schedule=[[80] * runs])[0]
    # 400 pairs of 48 entries out of 64: the overlap's standard deviation is about 0.0026.
    assert abs(overlap(independent) - 48 / 64) < 0.012
    assert overlap(positions["heads"]) == overlap(positions["all"]) == 1
    assert not torch.equal(positions["heads"][:, 0], positions["heads"][:, 1])
    assert torch.equal(positions["all"][:, 0], positions["all"][:, 1])


@pytest.mark.parametrize("name", ["random", "random_shared"])
def test_random_reads_no_entries(name):
    changed = [
        Tokens(*(torch.randn_like(x) for x in (t.keys, t.values, t.queries)), t.seed, t.prompt_len) for t in REQUESTS
    ]
    assert torch.equal(kept(make(name)), kept(make(name), changed))


@pytest.mark.parametrize("name", ["random", "random_shared"])
def test_random_is_fresh_at_every_event(name):
    policy = make(name)
    event = dense_event(policy, REQUESTS, [80, 80])
    later = replace(event, rounds=[1, 1])
    assert not torch.equal(policy.score(event), policy.score(later))


def test_random_of_a_rank_is_its_part_of_all_heads():
    policy = make("random")
    event = dense_event(policy, REQUESTS, [80, 80])
    rank = replace(event, num_heads=1, head_offset=1)
    assert torch.equal(policy.score(rank), policy.score(event)[:, :, 1:])


@pytest.mark.parametrize("free", [0, 1])
def test_random_with_next_to_nothing_free(free):
    positions = kept(make("random"), REQUESTS[:1], schedule=[[80]], keep=40 + free, protection="sink:24", recent=16)
    assert (positions[..., :24] == torch.arange(24)).all()
    assert (positions[..., 24 + free :] == torch.arange(64, 80)).all()
