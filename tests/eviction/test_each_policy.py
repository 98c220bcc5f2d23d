"""What each policy alone promises."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import binom, chisquare

from tests.eviction import dense_simulation
from tests.eviction.dense_event import Run, Tokens, dense_event, make_tokens, raw_redundancy, select
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


# zipage


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


# vase


def repeated(tokens, count):
    """The same entries under `count` seeds."""
    return [replace(tokens, seed=seed) for seed in range(count)]


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


# pages


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


@pytest.mark.parametrize("chunk", [0, 8, 48])
def test_zipage_takes_only_chunks_that_the_kernels_take(chunk):
    with pytest.raises(ValueError, match=f"zipage.chunk={chunk}: must be a power of two from 16"):
        make("zipage", chunk=chunk)
