"""What policies that keep whole pages promise: page_attention and page_random."""

import pytest
import torch
from scipy.stats import binom

from tests.eviction.dense_event import dense_event, make_tokens, select
from tests.eviction.policy_runs import REQUESTS, kept, make, repeated, scripted


def test_page_attention_scores_sum_to_one():
    for options in ({"page_size": 16}, {"page_size": 4, "native": False, "scope": "head"}):
        policy = make("page_attention", **options)
        scores = policy.page_scores(dense_event(policy, REQUESTS, [80, 96]))
        assert torch.allclose(scores.sum(dim=-1), torch.ones(scores.shape[:-1]), atol=1e-5)


def test_page_attention_of_one_slot_and_one_head_is_snapkv_unpooled():
    pages = make("page_attention", page_size=1, native=False, scope="head")
    assert torch.equal(kept(pages), kept(make("snapkv", pooling="never")))


def test_page_attention_finds_the_entry_that_speaks_for_its_page():
    event = dense_event(make("page_attention", page_size=16), REQUESTS[:1], [80])
    row = torch.full((80,), 0.01)
    row[16:32] = 0.02
    row[40] = 0.1
    best = {agg: make("page_attention", page_size=16, agg=agg) for agg in ("sum", "max")}
    assert best["sum"].page_scores(scripted(event, row))[0, 0, 0].argmax() == 1
    assert best["max"].page_scores(scripted(event, row))[0, 0, 0].argmax() == 2


@pytest.mark.parametrize("name", ["page_attention", "page_random"])
@pytest.mark.parametrize("protection", ["none", "sink:4", "prompt"])
def test_native_pages_are_whole_blocks_dropped_from_the_table(name, protection):
    policy = make(name, page_size=16)
    event = dense_event(policy, REQUESTS, [112, 112], protection=protection)
    scores = policy.page_scores(event).expand(1, 2, 1, 7)[0, :, 0]
    forced = policy.forced_pages(event)
    positions = kept(policy, schedule=[[112, 112]], protection=protection)[0]
    for row in range(2):
        table = select(scores[row], forced[row], 4)
        slots = (table[:, None] * 16 + torch.arange(16)).flatten()
        assert (positions[row] == slots).all()


def test_page_random_every_free_page_survives_equally_often():
    runs = 2000
    policy = make("page_random", page_size=16)
    requests = repeated(make_tokens(38, layers=1, heads=1), runs)
    positions = kept(policy, requests, schedule=[[112] * runs])[0]
    counts = torch.bincount(positions[..., ::16].flatten() // 16, minlength=7)
    assert counts[-1] == runs
    assert counts.sum() == 4 * runs
    assert binom.ppf(1e-6, runs, 0.5) <= counts[:-1].min() <= counts[:-1].max() <= binom.ppf(1 - 1e-6, runs, 0.5)


def test_page_random_of_one_slot_has_the_law_of_random_shared():
    runs = 1000
    requests = repeated(make_tokens(39), runs)
    pages = make("page_random", page_size=1, native=False)
    rho = 48 / 64
    for policy in (pages, make("random_shared", share="all")):
        positions = kept(policy, requests, schedule=[[80] * runs])[0]
        assert (positions == positions[:, :1, :1]).all()
        counts = torch.bincount(positions[:, 0, 0].flatten(), minlength=80)[:64]
        assert counts.sum() == 48 * runs
        assert binom.ppf(1e-6, runs, rho) <= counts.min() <= counts.max() <= binom.ppf(1 - 1e-6, runs, rho)


def test_page_random_pages_keep_their_members_for_life():
    for event in kept(make("page_random", page_size=8, native=False, scope="head")):
        runs = event.unflatten(-1, (-1, 8))
        assert (runs - runs[..., :1] == torch.arange(8)).all()
        assert (runs[..., 0] % 8 == 0).all()
