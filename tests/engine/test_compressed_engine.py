"""Compressed PagedAttention from end to end: what must not change a token, and that the right entries stay."""

from collections import Counter, defaultdict
from functools import cache
from itertools import product

import pytest

from tests.engine.compressed import (
    UNBOUNDED,
    Recorder,
    count_orders,
    generation_of,
    greedy,
    make_llm,
    pause_now_and_then,
    random_prompts,
    record_events,
    tokens_of,
)
from tests.eviction.cases import CASES, ONE_OF_EACH, Case
from tests.eviction.dense_simulation import Simulation
from tests.tiny_models import VOCAB, save_tiny_model
from zipage.models.decoder import Decoder
from zipage.worker.paged_attention import PagedAttention

NUM_LAYERS = 2
"""With one more, all here takes half as long again and shows the same."""

LENGTHS = (9, 17, 33, 70)
ASKED = (
    *("needs_queries", "num_states", "calibration_arrays", "predicts", "output_norm", "leaves_window_unscored"),
    *("page", "drops_blocks", "shared_heads", "shared_layers", "all_layers"),
)
"""What an engine asks of a policy. Policies that answer the same are of one kind: they only rank differently."""


def kinds() -> list[list[Case]]:
    """Of each kind its policies."""
    found = defaultdict(list)
    for case in ONE_OF_EACH:
        found[tuple(getattr(case.make(), name) for name in ASKED)].append(case)
    return [*found.values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS, VOCAB)


# An unbounded budget


NEW_TOKENS = 30
COMBINATIONS = [
    (block_size, chunk, *flags)
    for block_size, chunk, *flags in product((16, 64, 256), (40, 512), (False, True), (False, True), (False, True))
    if (sum(flags) + (chunk == 512)) % 2 == 0
]
"""Half of them all, with any three values together somewhere."""


@pytest.fixture(scope="module")
def full_tokens(folder, prompts):
    return tokens_of(make_llm(folder, None).generate(prompts, greedy(NEW_TOKENS), use_tqdm=False))


@pytest.mark.parametrize("combination", range(len(COMBINATIONS)))
def test_an_unbounded_budget_gives_the_tokens_of_full_kv(folder, prompts, full_tokens, combination):
    block_size, chunk, hit, asynchronous, paused = COMBINATIONS[combination]
    case = ONE_OF_EACH[combination % len(ONE_OF_EACH)]
    options = {"page_size": block_size} if case.make().drops_blocks else {}
    case = Case(case.policy, case.options | options, case.recent, case.protection)
    llm = make_llm(
        folder,
        case,
        budget=UNBOUNDED,
        block_size=block_size,
        max_num_batched_tokens=chunk,
        async_compression=asynchronous,
        num_blocks=4096 // block_size,
    )
    if hit:
        llm.generate(prompts, greedy(NEW_TOKENS), use_tqdm=False)
    if paused:
        pause_now_and_then(llm)
    outputs = llm.generate(prompts, greedy(NEW_TOKENS), use_tqdm=False)
    assert tokens_of(outputs) == full_tokens
    assert (sum(output.metrics.cached_tokens for output in outputs) > 0) == (hit and block_size < max(LENGTHS))
    assert (llm.stats.pauses > 0) == paused
    assert llm.stats.resumes == llm.stats.pauses == sum(output.metrics.pauses for output in outputs)
    assert llm.stats.budget_bound == llm.stats.compressions_ordered == 0


# A budget that binds


@pytest.mark.parametrize(
    ("case", "interval"),
    [*((case, None) for case in CASES), *((kind[0], 40) for kind in kinds())],
    ids=lambda value: "interval" if isinstance(value, int) else str(value or "block"),
)
def test_what_each_head_keeps_equals_the_simulation_over_a_generation(folder, case, interval, monkeypatch):
    keep, size = 48, 16 if interval is None else 48
    prompt, new = generation_of(case, keep, size)
    recorder = Recorder()
    monkeypatch.setattr(PagedAttention, "__call__", recorder.wrap(PagedAttention.__call__))
    monkeypatch.setattr(Decoder, "forward", recorder.watch(Decoder.forward))
    llm = make_llm(folder, case, budget=keep, interval=interval, trace_positions=True)
    events = record_events(llm)
    tokens = random_prompts([prompt], VOCAB, seed=3)
    llm.generate(tokens, greedy(new, seed=5), use_tqdm=False)
    arrays = recorder.arrays(llm)
    assert arrays["keys"].shape[2] == prompt + new - 1
    simulation = Simulation(
        policy=case.policy,
        options=case.options,
        **arrays,
        seed=5,
        prompt_len=prompt,
        keep=keep,
        recent=case.recent,
        protection=case.protection,
    )
    expected = simulation.run([keep + size] * len(events))
    assert [event.num_tokens for event in events] == [keep + size + 1 + i * size for i in range(len(events))]
    assert len(events) == 2
    for event, kept in zip(events, expected, strict=True):
        assert event.entries_before == keep + size
        assert event.entries_after == keep
        assert event.blocks_before - event.blocks_after == size // 16
        for (layer, head), positions in kept.items():
            assert event.kept_positions[layer, head].tolist() == positions, (event.round, layer, head)


BUDGET, BOUNDED_TOKENS = 32, 34
BOUNDED_LENGTHS = (24, 28, 33, 70)
"""The first two are compressed once, the others twice."""
BINDING = {
    "asynchronous": {"async_compression": True},
    "chunked": {"max_num_batched_tokens": 24},
    "constrained": {"scheduling": "constrained", "num_blocks": 10},
    "tight": {"num_blocks": 7, "headroom": 0},
    "tight-async": {"num_blocks": 7, "headroom": 0, "async_compression": True},
    "strided": {"layer_stride": 1},
    "no-prefix-cache": {"enable_prefix_caching": False},
}


PAUSED = {"paused, sync": False, "paused, async": True}
PREFIX_HITS = "prefix hits"


def pairs(*changes: str) -> list[tuple[Case, str]]:
    """Every other change with each kind of policy; the policies of a kind take turns, and each meets several changes.

    A kind of many policies meets all changes.
    """
    numbered = {change: number for number, change in enumerate([*BINDING, *PAUSED, PREFIX_HITS])}
    return [
        (kind[numbered[change] % len(kind)], change)
        for place, kind in enumerate(kinds())
        for change in changes
        if len(kind) > 1 or (numbered[change] + place) % 2 == 0
    ]


@pytest.fixture(scope="module")
def bounded_prompts():
    return random_prompts(BOUNDED_LENGTHS, VOCAB)


def each_kind(*changes: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("case", "change"), pairs(*changes), ids=str)


@pytest.fixture(scope="module")
def alone(folder, bounded_prompts):
    """Of a case, the tokens of each prompt alone, compressed in place, in ample memory."""

    @cache
    def alone(place: int) -> list[list[int]]:
        llm = make_llm(folder, ONE_OF_EACH[place], BUDGET, async_compression=False)
        tokens = [
            tokens_of(llm.generate([p], greedy(BOUNDED_TOKENS, seed=i), use_tqdm=False))[0]
            for i, p in enumerate(bounded_prompts)
        ]
        assert llm.stats.compressions_applied == 1 + 1 + 2 + 2
        return tokens

    return lambda case: alone(ONE_OF_EACH.index(case))


def test_every_policy_meets_several_changes():
    met = pairs(*BINDING, *PAUSED, PREFIX_HITS)
    policies, changes = Counter(str(case) for case, _ in met), Counter(change for _, change in met)
    assert policies.keys() == set(map(str, ONE_OF_EACH))
    assert changes.keys() == {*BINDING, *PAUSED, PREFIX_HITS}
    assert min(policies.values()) > 1
    assert min(changes.values()) > 6


@each_kind(*BINDING)
def test_a_batch_equals_its_requests_alone(folder, bounded_prompts, alone, case, change):
    prompts = bounded_prompts
    llm = make_llm(folder, case, BUDGET, **{"async_compression": False} | BINDING[change])
    params = [greedy(BOUNDED_TOKENS, seed=i) for i in range(len(prompts))]
    assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == alone(case)
    stats = llm.stats
    assert stats.compressions_ordered == stats.compressions_applied > 0
    assert stats.budget_bound == len(prompts)
    assert stats.entries_kept == BUDGET * stats.compressions_applied
    assert stats.blocks_used == stats.query_slots_used == 0
    if "tight" in change:
        assert stats.pauses + stats.preemptions > 0


WAVE = {
    "in place": {"async_compression": False},
    "beside": {"async_compression": True},
    "overlapped": {"async_compression": True, "async_scheduling": True},
}


@pytest.mark.parametrize("case", [c for c in ONE_OF_EACH if c.policy in ("zipage", "page_attention")], ids=str)
def test_a_wave_that_is_spread_keeps_what_its_requests_keep_alone(folder, case):
    """Eight requests that are due together, every 16 steps: two behind a step."""
    prompts = random_prompts([40] * 8, VOCAB, seed=4)
    params = [greedy(30, seed=i) for i in range(8)]
    alone = []
    llm = make_llm(folder, case, BUDGET, async_compression=False, trace_positions=True, enable_prefix_caching=False)
    expected = record_events(llm)
    for prompt, one in zip(prompts, params, strict=True):
        alone += tokens_of(llm.generate([prompt], one, use_tqdm=False))
    for how, options in WAVE.items():
        # As many blocks as eight requests may hold, and no more.
        llm = make_llm(folder, case, BUDGET, trace_positions=True, num_blocks=8 * 3, **options)
        events, orders = record_events(llm), count_orders(llm)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert tokens_of(outputs) == alone, how
        assert max(orders) == 2, how
        assert {event.round for event in events} == {0, 1}, how
        assert llm.stats.pauses == llm.stats.preemptions == 0
        places = {output.request_id: place for place, output in enumerate(outputs)}
        events.sort(key=lambda event: (places[event.request_id], event.round))
        for one, other in zip(expected, events, strict=True):
            assert (one.kept_positions == other.kept_positions).all(), how


@each_kind(*PAUSED)
def test_paused_equals_unpaused(folder, bounded_prompts, alone, case, change):
    prompts = bounded_prompts
    llm = make_llm(folder, case, BUDGET, async_compression=PAUSED[change])
    pause_now_and_then(llm, share=0.4)
    params = [greedy(BOUNDED_TOKENS, seed=i) for i in range(len(prompts))]
    assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == alone(case)
    assert llm.stats.resumes == llm.stats.pauses > 10


@each_kind(PREFIX_HITS)
def test_prefix_hits_change_nothing(folder, bounded_prompts, alone, case, change):
    prompts = bounded_prompts
    llm = make_llm(folder, case, BUDGET, max_num_batched_tokens=sum(BOUNDED_LENGTHS))
    params = [greedy(BOUNDED_TOKENS, seed=i) for i in range(len(prompts))]
    # The second half comes a step later, while the first hold their prompts' blocks, which are compressed in all.
    outputs = llm.generate(prompts * 2, params * 2, use_tqdm=False)
    assert tokens_of(outputs) == alone(case) * 2
    assert sum(output.metrics.cached_tokens for output in outputs) > 0


@pytest.fixture(scope="module")
def unbounded_tokens(folder, bounded_prompts):
    return tokens_of(make_llm(folder, None).generate(bounded_prompts, greedy(BOUNDED_TOKENS), use_tqdm=False))


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_a_budget_binds(alone, unbounded_tokens, case):
    """Otherwise the tests above would compare full KV with itself."""
    assert any(a != b or len(set(a)) > 10 for a, b in zip(alone(case), unbounded_tokens, strict=True))


# Several blocks between two compressions

INTERVALS = {
    "one by one": {},
    "overlapped": {"async_scheduling": True, "async_compression": True},
    "tight": {"num_blocks": 16, "headroom": 0},
    "tight, overlapped": {"num_blocks": 16, "headroom": 0, "async_scheduling": True, "async_compression": True},
    "constrained": {"scheduling": "constrained", "num_blocks": 16},
    "paused": {},
}


@pytest.mark.parametrize("case", [c for c in ONE_OF_EACH if c.policy in ("zipage", "h2o", "page_attention")], ids=str)
def test_an_interval_in_a_batch_equals_its_requests_alone(folder, case):
    """Budget of two blocks and three to come; samples that share their prompt, in pools that are short."""
    prompts = random_prompts((74, 60, 77, 107), VOCAB)
    params = [greedy(54, seed=i, n=2) for i in range(len(prompts))]
    llm = make_llm(folder, case, BUDGET, interval=40, async_compression=False, enable_prefix_caching=False)
    expected = [tokens_of(llm.generate([p], one, use_tqdm=False)) for p, one in zip(prompts, params, strict=True)]
    left = Counter()
    for name, options in INTERVALS.items():
        llm = make_llm(folder, case, BUDGET, interval=40, **{"async_compression": False} | options)
        if name == "paused":
            pause_now_and_then(llm, share=0.2)
        events = record_events(llm)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [tokens_of([output]) for output in outputs] == expected, name
        compressions = [event for event in events if event.kind == "compress"]
        assert {event.entries_after for event in compressions} == {BUDGET}
        assert {(event.blocks_before, event.blocks_after) for event in compressions if event.round} == {(5, 2)}
        assert sum(output.metrics.cached_tokens for output in outputs) > 0, "samples share their prompt"
        assert llm.stats.blocks_used == llm.stats.query_slots_used == 0
        if "tight" in name:
            left += Counter(pauses=llm.stats.pauses, preemptions=llm.stats.preemptions)
    assert left["pauses"]
    assert left["preemptions"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_whoever_was_passed_over_goes_on_when_the_others_have_ended(folder, asynchronous):
    """Both are due at once, and only the first is compressed behind that step. Then there is no other step to run."""
    llm = make_llm(folder, Case("h2o"), 48, async_compression=asynchronous)
    first, second = (llm.add_request(prompt, greedy(20)) for prompt in random_prompts((64, 64), VOCAB))
    llm.step()
    assert llm.stats.compressions_ordered == 1
    llm.abort(first)
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert [len(tokens) for tokens in tokens_of([o for o in outputs if o.request_id == second])] == [20]
