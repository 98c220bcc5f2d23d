"""What policies that read no queries and draw nothing promise: streaming, keydiff, knorm and lagkv."""

from dataclasses import replace

import pytest
import torch

from tests.eviction.dense_event import Tokens
from tests.eviction.policy_runs import REQUESTS, kept, make, scores_of, with_keys
from zipage.eviction.budget import Budget
from zipage.eviction.policy import HUGE
from zipage.eviction.protection import Protection

# streaming


def test_streaming_keeps_four_sinks_and_the_latest():
    for positions, seen in zip(kept(make("streaming"), REQUESTS[:1], schedule=[[80], [96], [80]]), (80, 112, 128)):
        assert (positions == torch.tensor([0, 1, 2, 3, *range(seen - 60, seen)])).all()


def test_streaming_with_a_protected_prompt_keeps_it_and_the_latest():
    positions = kept(make("streaming"), protection="prompt")[:, 0]
    for event, seen in zip(positions, (80, 112, 128)):
        assert (event == torch.tensor([*range(24), *range(seen - 40, seen)])).all()


def test_streaming_with_a_budget_of_nothing_but_sinks_and_recent():
    positions = kept(make("streaming"), REQUESTS[:1], schedule=[[96]], keep=20, recent=16)
    assert (positions == torch.tensor([0, 1, 2, 3, *range(80, 96)])).all()


# keydiff, knorm


def test_keydiff_is_invariant_to_scale_and_rotation():
    policy = make("keydiff")
    rotation = torch.linalg.qr(torch.randn(32, 32)).Q
    scale = 0.5 + torch.rand(2, 2, 256, 1)
    for change in (lambda keys: keys * scale, lambda keys: keys @ rotation):
        changed = [with_keys(tokens, change) for tokens in REQUESTS]
        assert torch.allclose(scores_of(policy), scores_of(policy, changed), atol=1e-6)
        assert torch.equal(kept(policy), kept(policy, changed))


def test_keydiff_copies_of_a_direction_lower_its_rank():
    tokens = REQUESTS[0]
    crowded = with_keys(tokens, torch.clone)
    crowded.keys[:, :, 40:60] = crowded.keys[:, :, 7:8]
    plain, lowered = (scores_of(make("keydiff"), [t])[..., :40] for t in (tokens, crowded))
    ranks = [(s > s[..., 7:8]).sum(dim=-1) for s in (plain, lowered)]
    assert (ranks[1] >= ranks[0]).all()
    assert (ranks[1] > ranks[0]).any()


@pytest.mark.parametrize("name", ["keydiff", "knorm"])
def test_equal_keys_keep_the_youngest(name):
    tokens = with_keys(REQUESTS[0], lambda keys: keys[:, :, :1].expand_as(keys))
    assert (kept(make(name), [tokens], schedule=[[96]]) == torch.arange(32, 96)).all()


def test_keydiff_without_a_mean_direction_is_finite():
    keys = torch.cat([REQUESTS[0].keys[:, :, :40], -REQUESTS[0].keys[:, :, :40]], dim=2)
    zero = with_keys(REQUESTS[0], lambda _: torch.zeros(2, 2, 80, 32))
    for tokens in (with_keys(REQUESTS[0], lambda _: keys), zero):
        assert scores_of(make("keydiff"), [tokens]).isfinite().all()


def test_knorm_keeps_the_smallest_norms():
    tokens = REQUESTS[0]
    positions = kept(make("knorm"), [tokens], schedule=[[80]], protection="sink:4")[0, 0]
    norms = tokens.keys[:, :, 4:64].norm(dim=-1)
    smallest = norms.argsort(dim=-1)[..., : 64 - 20].sort(dim=-1).values + 4
    assert torch.equal(positions[..., 4:48], smallest)


def test_knorm_keeps_the_younger_of_keys_that_differ_by_rounding():
    tokens = REQUESTS[0]
    norms = tokens.keys.norm(dim=-1)
    tied = torch.full_like(norms, 3.0)
    tied[:, :, 5::2] *= 1 + 1e-6
    keys = tokens.keys / norms[..., None] * tied[..., None]
    positions = kept(make("knorm"), [Tokens(keys, tokens.values, tokens.queries, 0, 8)], schedule=[[80]])
    assert (positions[0, 0] == torch.arange(16, 80)).all()


def test_knorm_reads_nothing_but_norms():
    changed = [
        Tokens(
            tokens.keys * torch.randint(0, 2, tokens.keys.shape).mul(2).sub(1),
            torch.randn_like(tokens.values),
            torch.randn_like(tokens.queries),
            tokens.seed + 1,
            tokens.prompt_len,
        )
        for tokens in REQUESTS
    ]
    assert torch.equal(kept(make("knorm")), kept(make("knorm"), changed))


# lagkv


def test_lagkv_is_invariant_to_each_channels_scale_and_shift():
    policy = make("lagkv", partition=8)
    scale, shift = 0.5 + torch.rand(2, 2, 1, 32), 3 * torch.randn(2, 2, 1, 32)
    changed = [with_keys(tokens, lambda keys: keys * scale + shift) for tokens in REQUESTS]
    assert torch.equal(kept(policy), kept(policy, changed))


def test_lagkv_has_no_order_in_the_last_whole_partition():
    """Of 80 entries, 4 sinks and 9 partitions of 8: slots 68 .. 75 are the last whole one, a reference and no more."""
    policy = make("lagkv", partition=8)
    order = torch.cat([torch.arange(68), 68 + torch.randperm(8), torch.arange(76, 256)])
    shuffled = [replace(t, keys=t.keys[:, :, order], values=t.values[:, :, order]) for t in REQUESTS]
    scores = scores_of(policy)
    assert torch.equal(scores, scores_of(policy, shuffled))
    assert (scores[..., :4] == HUGE).all()
    assert (scores[..., 68:] == HUGE).all()
    for first in range(4, 68, 8):
        ranks = scores[..., first : first + 8].sort(dim=-1).values
        assert torch.equal(ranks, (torch.arange(8) / 8).expand_as(ranks))


def test_lagkv_keeps_the_younger_of_equal_entries():
    tokens = replace(REQUESTS[0], keys=torch.ones(2, 2, 256, 32), values=torch.ones(2, 2, 256, 32))
    scores = scores_of(make("lagkv", partition=8), [tokens])
    assert torch.equal(scores[..., 4:12], (torch.arange(8) / 8).expand(2, 1, 2, 8))


def test_lagkv_takes_what_rounding_leaves_of_equal_values_for_equal():
    """Otherwise the range of a few last bits would decide, which are others on two ranks or in another batch."""
    policy, torch_random = make("lagkv", partition=8), torch.Generator().manual_seed(0)
    equal = [replace(t, values=t.values[:, :, :1].expand_as(t.values).clone()) for t in REQUESTS]
    noise = [1 + 1e-6 * torch.randn(t.values.shape, generator=torch_random) for t in equal]
    rounded = [replace(t, values=t.values * x) for t, x in zip(equal, noise, strict=True)]
    assert torch.equal(kept(policy, equal), kept(policy, rounded))


def test_lagkv_wants_a_budget_above_what_it_does_not_rank():
    policy = make("lagkv")
    with pytest.raises(ValueError, match=r"256 entries kept .* raise budget_tokens above 260"):
        Budget(17, 16).check(policy, Protection(), recent=16)
    Budget(18, 16).check(policy, Protection(), recent=16)
    with pytest.raises(ValueError, match="above 288"):
        Budget(18, 16).check(policy, Protection("sink", 32), recent=16)
