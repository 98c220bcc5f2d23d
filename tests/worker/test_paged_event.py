"""Compression of a paged cache against the dense simulation, against itself in other batches, and in shared blocks."""

from dataclasses import replace

import pytest
import torch

from tests.eviction.cases import CASES, ONE_OF_EACH, SMALL_CHUNK, Case, every_case
from tests.eviction.dense_event import Tokens, make_tokens
from tests.eviction.dense_simulation import Simulation
from tests.worker.paged_cache import PagedCache
from zipage.worker import compressor
from zipage.worker.compressor import compress

KEEP = 64
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
# Per event, the entries of each request; None sits it out. After an event a request gets one more block.
SCHEDULES = {
    16: [[96, 73, None], [80, 80, 107], [80, 80, 80], [80, None, 80]],
    64: [[128, None], [128, 150], [128] * 2],
}
REQUESTS = [make_tokens(seed, total=320, prompt_len=prompt) for seed, prompt in ((1, 24), (2, 70), (3, 5))]

on_every_device = pytest.mark.parametrize("device", DEVICES)


def schedule_of(case: Case, block_size: int) -> list[list[int | None]]:
    """Pages are compressed when the last one is full, so their requests come with whole pages."""
    page = case.make().page
    return [[n and n // page * page for n in lens] for lens in SCHEDULES[block_size]]


def make_cache(case: Case, requests: list[Tokens], block_size: int, device: str, **options) -> PagedCache:
    return PagedCache(requests, block_size, KEEP, case.recent, case.protection, device=device, **options)


def step(cache: PagedCache, policy, lens: list[int | None], **options) -> list[int]:
    """Grow the requests to `lens` and compress them in one launch; returns those that took part."""
    batch = [i for i, n in enumerate(lens) if n is not None]
    for i in batch:
        cache.grow(i, lens[i])
    cache.compress(policy, batch, **options)
    return batch


def bits(x: torch.Tensor) -> torch.Tensor:
    """A copy whose NaNs compare."""
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32).clone()


def simulation_of(case: Case, tokens: Tokens) -> Simulation:
    return Simulation(
        policy=case.policy,
        options=case.options,
        keys=tokens.keys.double().numpy(),
        values=tokens.values.double().numpy(),
        queries=tokens.queries.double().numpy(),
        hidden=tokens.hidden.double().numpy(),
        seed=tokens.seed,
        prompt_len=tokens.prompt_len,
        keep=KEEP,
        recent=case.recent,
        protection=case.protection,
    )


def assert_equal_after(simulation: Simulation, n: int, cache: PagedCache, policy, i: int) -> None:
    """What request `i` holds is what `simulation` keeps at its next event, of n entries."""
    (expected,) = simulation.run([n])
    tokens, protected = cache.all_tokens[i], cache.protected(policy, i)
    k, v, positions, _ = cache.entries(i)
    for (layer, head), kept in expected.items():
        where = simulation.t, i, layer, head
        assert positions[layer, head].tolist() == kept, where
        assert torch.equal(k[layer, head], tokens.keys[layer, head, kept]), where
        assert torch.equal(v[layer, head], tokens.values[layer, head, kept]), where
        if policy.state:
            assert simulation.cache[layer, head].carried[:protected] == [None] * protected
            all_carried = zip(*simulation.states((layer, head))[protected:], strict=True)
            for have, want in zip(cache.states(i)[: policy.num_states], all_carried, strict=True):
                carried = torch.tensor([-1.0 if x is None else float(x) for x in want])
                torch.testing.assert_close(have[layer, head, protected:], carried, rtol=1e-4, atol=1e-6)


@on_every_device
@pytest.mark.parametrize(("case", "block_size"), [(c, 16) for c in CASES] + [(c, 64) for c in ONE_OF_EACH], ids=str)
def test_kept_entries_equal_the_simulation(case, block_size, device):
    policy = case.make()
    requests = REQUESTS[: len(SCHEDULES[block_size][0])]
    cache = make_cache(case, requests, block_size, device)
    simulations = [simulation_of(case, tokens) for tokens in requests]
    for lens in schedule_of(case, block_size):
        for i in step(cache, policy, lens):
            assert_equal_after(simulations[i], lens[i], cache, policy, i)


def test_a_window_of_more_queries_than_a_word_has_bits():
    case = Case("lazy_eviction", {"alpha": 0.02, "window": 40})
    cache, simulation = make_cache(case, REQUESTS[:1], 16, "cpu", ring=40), simulation_of(case, REQUESTS[0])
    for n in (96, 80, 80):
        step(cache, case.make(), [n])
        assert_equal_after(simulation, n, cache, case.make(), 0)


@on_every_device
@every_case
def test_a_batch_and_strides_change_nothing(case, device):
    policy = case.make()
    requests = [make_tokens(seed, layers=3, prompt_len=prompt) for seed, prompt in ((4, 24), (5, 70))]
    schedule = [lens[:2] for lens in schedule_of(case, 16)[:3]]
    together = make_cache(case, requests, 16, device)
    others = [(make_cache(case, requests, 16, device), {"stride": stride}) for stride in (1, 2)]
    alone = [make_cache(case, [tokens], 16, device) for tokens in requests]
    for lens in schedule:
        for i in step(together, policy, lens):
            step(alone[i], policy, [lens[i]])
        for cache, options in others:
            step(cache, policy, lens, **options)
        for i in range(2):
            for k, v, positions, scores in [alone[i].entries(0), *(cache.entries(i) for cache, _ in others)]:
                expected = together.entries(i)
                assert torch.equal(positions, expected[2])
                assert torch.equal(k, expected[0])
                assert torch.equal(v, expected[1])
                if policy.state:
                    torch.testing.assert_close(scores, expected[3], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("limit", "launches"), [(3 * 2 * 96, 1), (2 * 2 * 96, 2), (2 * 2 * 96 - 1, 3), (1, 3)])
def test_without_a_stride_a_launch_is_bounded_by_its_entries(monkeypatch, limit, launches):
    monkeypatch.setattr(compressor, "LAUNCH_ENTRIES", limit)
    calls = []
    choose = compressor.choose
    monkeypatch.setattr(compressor, "choose", lambda *args: calls.append(args) or choose(*args))
    cache = make_cache(Case("knorm"), [make_tokens(4, layers=3)], 16, "cpu")
    cache.grow(0, 80)
    event = cache.event(Case("knorm").make(), [0])
    assert event.shape == (3, 1, 2, 96)
    compress(Case("knorm").make(), event, [cache.positions], event.block_tables, max_keep=KEEP)
    assert len(calls) == launches


def with_prefix_of(first: Tokens, other: Tokens, length: int) -> Tokens:
    """`other`, whose first `length` tokens are those of `first`."""

    def joined(a, b, dim):
        return torch.cat([a.narrow(dim, 0, length), b.narrow(dim, length, b.shape[dim] - length)], dim)

    keys, values = joined(first.keys, other.keys, 2), joined(first.values, other.values, 2)
    queries, hidden = joined(first.queries, other.queries, 1), joined(first.hidden, other.hidden, 1)
    return replace(other, keys=keys, values=values, queries=queries, hidden=hidden)


@on_every_device
@pytest.mark.parametrize(
    ("case", "dtype"), [(c, torch.float32) for c in CASES] + [(c, torch.bfloat16) for c in ONE_OF_EACH], ids=str
)
def test_sharers_of_blocks_are_compressed_as_if_alone(case, dtype, device):
    policy = case.make()
    first = make_tokens(6)
    requests = [first, *(with_prefix_of(first, make_tokens(seed), 48) for seed in (7, 8))]
    cache = make_cache(case, requests, 16, device, dtype=dtype)
    alone = [make_cache(case, [tokens], 16, device, dtype=dtype) for tokens in requests]
    cache.grow(0, 48)
    for i in (1, 2):
        cache.share(0, i, 48)
    shared = list(cache.requests[0].blocks)
    before = [bits(x[:, shared]) for x in cache.everything]
    # The first two are compressed in one launch while the third still holds the blocks, which are its own afterwards.
    for lens in ([96, 80, None], [80, 80, 96], [80, 80, 80]):
        for i in step(cache, policy, lens):
            if lens[2] is None:
                after = [bits(x[:, shared]) for x in cache.everything]
                assert all(map(torch.equal, before, after))
                assert not set(cache.requests[i].blocks) & set(shared)
            step(alone[i], policy, [lens[i]])
            k, v, positions, scores = cache.entries(i)
            expected = alone[i].entries(0)
            assert torch.equal(positions, expected[2])
            assert torch.equal(k, expected[0])
            assert torch.equal(v, expected[1])
            if policy.state:
                torch.testing.assert_close(scores, expected[3], rtol=1e-5, atol=1e-7)


PINNED = [
    *(Case("zipage", {"pooling": "always", **SMALL_CHUNK}, protection=rule) for rule in ("prompt", "sink:37")),
    *(Case(name, protection="prompt") for name in ("zipage", "h2o", "g_kv", "random", "snapkv")),
    *(Case(name, protection="sink:32") for name in ("h2o", "g_kv", "keydiff")),
]


@on_every_device
@pytest.mark.parametrize("case", PINNED, ids=str)
def test_protected_blocks_stay_shared_and_unwritten_over_events(case, device):
    policy = case.make()
    first = make_tokens(6, total=320, prompt_len=40)
    requests = [first, *(with_prefix_of(first, make_tokens(seed, 320, prompt_len=40), 32) for seed in (7, 8))]
    cache = make_cache(case, requests, 16, device, pinned=True)
    simulations = [simulation_of(case, tokens) for tokens in requests]
    cache.grow(0, 32)
    for i in (1, 2):
        cache.share(0, i, 32)
    shared = list(cache.requests[0].blocks)
    before = [bits(x[:, shared]) for x in cache.everything]
    for lens in ([96, 80, None], [80, 80, 96], [80, 80, 80], [73, None, 80]):
        for i in step(cache, policy, lens):
            assert cache.requests[i].blocks[:2] == shared
            assert_equal_after(simulations[i], lens[i], cache, policy, i)
        assert all(map(torch.equal, before, [bits(x[:, shared]) for x in cache.everything]))


WINDOWS = [case for case in CASES if case.make().needs_queries and case.protection == "none"]


@on_every_device
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_a_wider_ring_of_queries_changes_nothing(case, device):
    policy = case.make()
    exact = make_cache(case, REQUESTS, 16, device, ring=policy.num_queries)
    wide = make_cache(case, REQUESTS, 16, device, ring=23)
    for lens in schedule_of(case, 16):
        for i in step(exact, policy, lens):
            wide.grow(i, lens[i])
        batch = [i for i, n in enumerate(lens) if n is not None]
        wide.compress(policy, batch)
        for i in batch:
            assert torch.equal(wide.entries(i)[2], exact.entries(i)[2])


@on_every_device
@pytest.mark.parametrize("case", [Case("zipage", {"chunk": 32}), Case("vase"), Case("knorm")], ids=str)
def test_what_a_compression_returns(case, device):
    policy = case.make()
    cache = make_cache(case, REQUESTS, 16, device)
    lens = [96, 73, 50]
    for i, n in enumerate(lens):
        cache.grow(i, n)
    event = cache.event(policy, [0, 1, 2])
    old = [cache.entries(i)[2] for i in range(3)]
    tables = event.block_tables[:, :4].contiguous()
    kept = compress(policy, event, [cache.positions], tables, max_keep=KEEP).kept
    assert kept.dtype == torch.int32
    assert kept.shape == (2, 3, 2, KEEP)
    for i, (one, num_kept) in enumerate(zip(cache.requests, (64, 64, 50), strict=True)):
        one.n = num_kept
        slots = kept[:, i, :, :num_kept].cpu().long()
        assert (slots >= 0).all()
        assert (kept[:, i, :, num_kept:] == -1).all()
        assert torch.equal(cache.entries(i)[2], old[i].gather(2, slots).int())


@on_every_device
def test_dense_copies_are_zero_past_the_entries(device):
    policy = Case("h2o").make()
    cache = make_cache(Case("h2o"), REQUESTS, 16, device)
    lens = [40, 73, 96]
    for i, n in enumerate(lens):
        cache.grow(i, n)
    cache.scores.nan_to_num_(nan=0.5)
    event = cache.event(policy, [0, 1, 2])
    for dense, source in ((event.keys(), "keys"), (event.values(), "values")):
        for row, n in enumerate(lens):
            assert torch.equal(dense[:, row, :, :n].cpu(), getattr(REQUESTS[row], source)[:, :, :n])
            assert (dense[:, row, :, n:] == 0).all()
    for row, n in enumerate(lens):
        assert (event.carried_states()[0][:, row, :, :n] == 0.5).all()
        assert (event.carried_states()[0][:, row, :, n:] == 0).all()
    assert (event.stored == -1).all()


def test_mean_pooling_divides_by_the_width_and_stops_at_the_limit():
    cache = make_cache(Case("snapkv"), REQUESTS[:1], 16, "cpu")
    cache.grow(0, 20)
    event = cache.event(Case("snapkv").make(), [0])
    scores = torch.ones(event.shape)
    out = event.pool(scores, 5, "mean", event.window_start)
    assert out[0, 0, 0, :6].tolist() == pytest.approx([0.6, 0.8, 0.8, 0.6, 1, 1])
    assert torch.equal(event.pool(scores, 5, "max", event.window_start), scores)


@pytest.mark.parametrize(
    ("policy", "change", "arguments", "message"),
    [
        (Case("snapkv"), {"window": 8}, {}, "reads 16 queries"),
        (Case("h2o"), {"state_caches": []}, {}, "give event.state_caches"),
        (Case("knorm"), {}, {"stride": 0}, "at least 1"),
        (Case("h2o"), {}, {"states": "scores"}, "moves anyway"),
    ],
)
def test_arguments_that_do_not_go_together(policy, change, arguments, message):
    cache = make_cache(policy, REQUESTS[:1], 16, "cpu")
    cache.grow(0, 80)
    event = replace(cache.event(policy.make(), [0]), **change)
    arguments = {"states": [cache.positions], "dst_tables": event.block_tables, "max_keep": KEEP, **arguments}
    if arguments["states"] == "scores":
        arguments["states"] = [cache.scores]
    with pytest.raises(ValueError, match=message):
        compress(policy.make(), event, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 1}, "slice the caches"),
        ({"forced": torch.zeros(1, 80, dtype=torch.bool)}, "max_blocks"),
        ({"q_cache": None}, "give q_cache"),
        ({"window": 17}, "the window is 17"),
    ],
)
def test_an_event_that_does_not_fit_its_cache(change, message):
    cache = make_cache(Case("snapkv"), REQUESTS[:1], 16, "cpu")
    cache.grow(0, 80)
    event = cache.event(Case("snapkv").make(), [0])
    with pytest.raises(ValueError, match=message):
        replace(event, **change)


@pytest.mark.parametrize("device", DEVICES)
def test_each_layer_is_scored_by_its_own_scale(device):
    """Queries four times as large are a scale four times as large."""
    case = next(case for case in CASES if case.policy == "snapkv")
    cache = make_cache(case, REQUESTS[:2], 16, device)
    for i, n in enumerate((96, 73)):
        cache.grow(i, n)
    event = cache.event(case.make(), [0, 1])
    first, *rest = event.scales
    scaled = replace(event, scales=(first, *(4 * scale for scale in rest))).attention()
    event.q_cache[1:] *= 4
    assert torch.equal(bits(scaled), bits(event.attention()))
