"""What policies that rank by attention promise: snapkv, h2o, tova, r_kv, g_kv and morphkv."""

from dataclasses import replace

import pytest
import torch

from tests.eviction.dense_event import Tokens, dense_event, make_tokens
from tests.eviction.policy_runs import REQUESTS, kept, make, scores_of, scripted, with_keys

# snapkv


def test_snapkv_of_one_query_keeps_the_top_of_its_row():
    policy = make("snapkv", window=1, pooling="never", group="max")
    tokens = replace(REQUESTS[0], queries=REQUESTS[0].queries[:, :, ::2])
    event = kept(policy, [tokens], schedule=[[80]], recent=0)[0, 0]
    for layer in range(2):
        for head in range(2):
            row = tokens.keys[layer, head, :80] @ tokens.queries[layer, 79, head]
            assert event[layer, head].tolist() == sorted(row.topk(64).indices.tolist())


@pytest.mark.parametrize("group", ["mean", "max"])
def test_snapkv_is_invariant_to_the_order_of_a_groups_heads(group):
    swapped = [replace(tokens, queries=tokens.queries[:, :, [1, 0, 3, 2]]) for tokens in REQUESTS]
    assert torch.equal(kept(make("snapkv", group=group)), kept(make("snapkv", group=group), swapped))


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova", "morphkv"])
def test_a_constant_added_to_all_logits_of_a_query_changes_nothing(name):
    shifted = [with_keys(tokens, lambda keys: keys + torch.randn(2, 2, 1, 32)) for tokens in REQUESTS]
    policy = make(name)
    assert torch.allclose(scores_of(policy), scores_of(policy, shifted), atol=1e-5)


def test_snapkv_pool_wider_than_what_is_before_the_window():
    policy = make("snapkv")
    event = dense_event(policy, REQUESTS[:1], [18], keep=17)
    scores = policy.score(event)[..., :18]
    raw = event.attention("all", group="mean", window="mean")
    assert torch.allclose(scores[..., :2], raw[..., :2].sum(-1, keepdim=True) / 5)
    assert torch.equal(scores[..., 2:], raw[..., 2:])


# h2o


def test_h2o_adds_up_over_events():
    policy = make("h2o")
    event = dense_event(policy, REQUESTS[:1], [80])
    gain = torch.rand(80)
    policy.score(scripted(event, gain))
    assert torch.allclose(event.new_state, 16 * gain.expand(event.shape))
    later = dense_event(policy, REQUESTS[:1], [80])
    later.carried = torch.tensor([64])
    later.state_entries = event.new_state
    total = policy.score(scripted(later, gain))
    assert torch.allclose(total[..., :64], 32 * gain[:64].expand(2, 1, 2, 64))
    assert torch.allclose(total[..., 64:], 16 * gain[64:].expand(2, 1, 2, 16))
    assert torch.equal(total, later.new_state)


def test_h2o_that_forgets_everything_is_snapkv_unpooled():
    assert torch.equal(kept(make("h2o", decay=0.0)), kept(make("snapkv", pooling="never")))
    assert not torch.equal(kept(make("h2o")), kept(make("snapkv", pooling="never")))


# tova


def test_tova_keeps_the_same_entries_in_every_head():
    positions = kept(make("tova"))
    assert (positions == positions[:, :, :, :1]).all()
    assert not torch.equal(positions[:, :, 0], positions[:, :, 1])
    grouped = kept(make("tova", reduce="group"))
    assert not (grouped == grouped[:, :, :, :1]).all()


def test_tova_evicts_the_least_attended_even_the_newest():
    tokens = with_keys(REQUESTS[0], torch.clone)
    # The last key points against the last query of every head.
    tokens.keys[:, :, 64] = -10 * tokens.queries[:, 64].view(2, 2, 2, 32).sum(dim=2)
    positions = kept(make("tova"), [tokens], schedule=[[65]], recent=0)[0, 0]
    assert (positions == torch.arange(64)).all()


# r_kv


def test_r_kv_attention_alone_is_snapkv_of_its_logits():
    snapkv = make("snapkv", softmax="group_cut", pool_kind="max", pool_width=7, window=8)
    assert torch.equal(kept(make("r_kv", lambda_=1.0)), kept(snapkv))


def test_r_kv_redundancy_of_orthogonal_keys_is_uniform():
    eye = torch.eye(96).expand(2, 2, 96, 96)
    tokens = Tokens(eye, eye, torch.randn(2, 96, 4, 96), seed=1, prompt_len=4)
    scores = scores_of(make("r_kv", lambda_=0.0), [tokens])
    assert torch.allclose(scores[..., :72], torch.tensor(-1 / 80))


def test_r_kv_label_says_lambda():
    assert make("r_kv").label == "R-KV (lambda=0.1)"
    assert make("r_kv", lambda_=0.5).label == "R-KV (lambda=0.5)"


# g_kv


def test_g_kv_is_invariant_to_the_scale_of_a_heads_attention():
    policy = make("g_kv")
    event, scaled = (dense_event(policy, REQUESTS, [80, 80]) for _ in range(2))
    factor = torch.tensor([2.0, 0.25])[:, None]
    answer = event.attention("all", group="max", window="mean")
    scaled.attention = lambda *_, **__: answer * factor
    assert torch.equal(policy.score(event), policy.score(scaled))
    assert torch.equal(event.new_state, scaled.new_state)


def test_g_kv_an_entry_attended_once_fades_by_alpha_per_event():
    policy = make("g_kv", lambda_=1.0)
    silent = torch.full((80,), 1e-4)
    silent[1] = 1.0
    attended = silent.clone()
    attended[0] = 1.0
    state = None
    for count in range(4):
        event = dense_event(policy, REQUESTS[:1], [80])
        if state is not None:
            event.carried, event.state_entries = torch.tensor([64]), state
        policy.score(scripted(event, silent if count else attended))
        state = event.new_state
        assert torch.allclose(state[..., 0], torch.tensor(0.8**count))
        assert (state[..., 64:] == -1).all()


def test_g_kv_entries_of_the_window_come_back_as_new():
    policy = make("g_kv")
    event = dense_event(policy, REQUESTS, [80, 96])
    policy.score(event)
    assert (event.new_state[:, 0, :, 64:80] == -1).all()
    assert (event.new_state[:, 1, :, 80:] == -1).all()
    assert (event.new_state[:, 1, :, :80] >= 0).all()


# morphkv


def test_morphkv_sum_is_snapkv_with_the_window_cut():
    cut = make("snapkv", softmax="cut", group="max", pooling="never")
    assert torch.equal(kept(make("morphkv")), kept(cut))


def test_morphkv_fuses_are_one_for_one_query():
    fused = [kept(make("morphkv", fuse=fuse, window=1), recent=1) for fuse in ("sum", "max")]
    assert torch.equal(*fused)
    assert not torch.equal(kept(make("morphkv")), kept(make("morphkv", fuse="max")))


@pytest.mark.parametrize("seed", [41, 42, 43])
def test_morphkv_maximum_keeps_what_one_query_looks_at(seed):
    tokens = make_tokens(seed)
    # Among random queries of the window, one per group points at entry 5.
    direction = torch.nn.functional.normalize(torch.randn(2, 2, 32), dim=-1)
    tokens.keys[:, :, 5] = 6 * direction
    tokens.queries[:, 70, ::2] = 16 * direction
    positions = kept(make("morphkv", fuse="max"), [tokens], schedule=[[80]], keep=17)[0, 0]
    assert (positions[..., 0] == 5).all()
