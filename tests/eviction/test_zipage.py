"""What the policy zipage promises."""

from dataclasses import replace

import pytest
import torch

from tests.eviction import dense_simulation
from tests.eviction.dense_event import dense_event, raw_redundancy
from tests.eviction.policy_runs import REQUESTS, kept, make, scores_of, with_keys


def test_zipage_attention_alone_is_snapkv_with_the_maximum_over_the_group():
    zipage = make("zipage", lambda_=1.0, global_=False, pooling="never")
    snapkv = make("snapkv", group="max", pooling="never")
    assert torch.equal(scores_of(zipage), scores_of(snapkv))
    assert torch.equal(kept(zipage), kept(snapkv))


def test_zipage_alpha_zero_is_no_global_score():
    assert torch.equal(kept(make("zipage", alpha=0.0)), kept(make("zipage", global_=False)))
    assert not torch.equal(kept(make("zipage", lambda_=0.9)), kept(make("zipage", lambda_=0.9, global_=False)))


def test_zipage_redundancy_alone_ignores_the_scale_of_keys_and_the_queries():
    policy = make("zipage", lambda_=0.0)
    scale = 0.5 + torch.rand(2, 2, 256, 1)
    changed = [
        replace(with_keys(tokens, lambda keys: keys * scale), queries=torch.randn_like(tokens.queries))
        for tokens in REQUESTS
    ]
    assert torch.equal(kept(policy), kept(policy, changed))


def test_zipage_one_chunk_is_full_redundancy():
    assert torch.equal(kept(make("zipage")), kept(make("zipage", redundancy="full")))
    assert not torch.equal(kept(make("zipage", chunk=32)), kept(make("zipage", redundancy="full")))


def test_zipage_pools_at_the_first_event_only():
    first, never, always = (kept(make("zipage", lambda_=1.0, pooling=p)) for p in ("first", "never", "always"))
    assert torch.equal(first[0], always[0])
    assert not torch.equal(first[0], never[0])
    assert not torch.equal(first[1], always[1])


def test_zipage_stores_the_score_of_every_entry_before_pooling_and_redundancy():
    policy = make("zipage")
    event = dense_event(policy, REQUESTS, [80, 80])
    policy.score(event)
    assert torch.equal(event.new_state, event.attention("all", group="max", window="mean"))


def test_zipage_the_stored_score_of_a_protected_entry_reaches_nobody():
    policy = make("zipage", pooling="always")
    plain, poisoned = (dense_event(policy, REQUESTS[:1], [80], protection="sink:20") for _ in range(2))
    for event, value in ((plain, 0.0), (poisoned, 1e6)):
        event.carried = torch.tensor([64])
        event.rounds = [1]
        event.state_entries = torch.rand(event.shape, generator=torch.Generator().manual_seed(0))
        event.state_entries[..., :20] = value
    assert torch.equal(policy.score(plain), policy.score(poisoned))
    assert torch.equal(plain.new_state, poisoned.new_state)
    poisoned = replace(poisoned, protected=torch.tensor([19]))
    assert not torch.equal(policy.score(plain), policy.score(poisoned))


def test_zipage_max_norm_alone_changes_no_ranking():
    options = {"lambda_": 1.0, "pooling": "never", "global_": False}
    assert torch.equal(kept(make("zipage", max_norm=True, **options)), kept(make("zipage", **options)))


def test_zipage_max_norm_divides_attention_and_redundancy_by_their_maxima():
    options = {"global_": False, "pooling": "never", "redundancy": "full"}
    attention = scores_of(make("zipage", lambda_=1.0, **options))
    redundancy = -scores_of(make("zipage", lambda_=0.0, **options))
    expected = 0.3 * attention / attention.amax(-1, keepdim=True) - 0.7 * redundancy / redundancy.amax(-1, keepdim=True)
    actual = scores_of(make("zipage", lambda_=0.3, max_norm=True, **options))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-7)
    assert not torch.equal(
        kept(make("zipage", lambda_=0.3, max_norm=True, **options)),
        kept(make("zipage", lambda_=1.0, max_norm=True, **options)),
    )


@pytest.mark.parametrize("chunk", [0, 8, 48])
def test_zipage_takes_only_chunks_that_the_kernels_take(chunk):
    with pytest.raises(ValueError, match=f"zipage.chunk={chunk}: must be a power of two from 16"):
        make("zipage", chunk=chunk)


def cluster(count):
    """`count` copies of one key among keys orthogonal to it and to each other: [n, d] and the copies' slots."""
    slots = [3, 4, 9, 10, 14][:count]
    keys = torch.eye(16)
    keys[slots] = keys[3].clone()
    return keys, slots


@pytest.mark.parametrize(("count", "sums"), [(2, [0, 0]), (3, [2, 1, 0]), (5, [4, 4, 4, 3, 0])])
def test_sums_of_a_cluster_of_identical_keys(count, sums):
    keys, slots = cluster(count)
    raw = raw_redundancy(keys, None)
    assert raw[slots].tolist() == sums
    assert raw.sum() == sum(sums)
    assert dense_simulation.raw_sums(list(keys.double().numpy())) == raw.tolist()
