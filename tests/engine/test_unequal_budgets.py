"""Unequal budgets from end to end: what must not change a token, what stays, and what memory that takes."""

from functools import cache
from itertools import product

import numpy as np
import pytest

from tests import calibrations
from tests.engine.compressed import (
    UNBOUNDED,
    Recorder,
    check_look,
    generation_of,
    greedy,
    looks,
    make_llm,
    pause_now_and_then,
    random_prompts,
    record_events,
    tokens_of,
)
from tests.eviction.cases import CASES, SMALL_CHUNK, Case
from tests.eviction.dense_allocation import UnequalSimulation
from tests.tiny_models import VOCAB, save_tiny_model
from zipage import LLM
from zipage.models.decoder import Decoder
from zipage.worker.tiled_attention import TiledAttention

NUM_LAYERS = 2
LENGTHS = (9, 17, 33, 70)
SNAPKV, ZIPAGE, R_KV = Case("snapkv"), Case("zipage", SMALL_CHUNK), Case("r_kv")
KINDS = {
    "pyramid": {"beta": 4.0},
    "adaptive": {},
    "threshold": {"tau": 0.02},
}
ROUNDS = ("page", "entry")
ONE_OF_EACH = [
    case
    for case in {case.policy: case for case in reversed(CASES)}.values()
    if case.make().scope == "token" and not case.make().shared_layers
]
TAUS = {"zipage": -0.0092, "h2o": 0.5, "kvzap": 0.0}
"""Where other scores than shares of attention are cut."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS, VOCAB)


@pytest.fixture(scope="module")
def full_tokens(folder, prompts):
    return tokens_of(make_llm(folder, None).generate(prompts, greedy(30), use_tqdm=False))


def unequal(name: str, rounding: str = "page", **options) -> dict:
    """Options of an engine."""
    options = {**KINDS[name], **options, "round": rounding}
    return {"allocation": name, "allocation_options": options, "enable_prefix_caching": False}


COMBINATIONS = list(product(KINDS, ROUNDS, (16, 256), (40, 512), (False, True)))[::5]


@pytest.mark.parametrize("combination", range(len(COMBINATIONS)))
def test_an_unbounded_budget_gives_the_tokens_of_full_kv(folder, prompts, full_tokens, combination):
    name, rounding, block_size, chunk, asynchronous = COMBINATIONS[combination]
    llm = make_llm(
        folder,
        (SNAPKV, ZIPAGE, R_KV)[combination % 3],
        budget=UNBOUNDED,
        block_size=block_size,
        max_num_batched_tokens=chunk,
        async_compression=asynchronous,
        **unequal(name, rounding),
    )
    paused = combination % 2 == 0
    if paused:
        pause_now_and_then(llm)
    assert tokens_of(llm.generate(prompts, greedy(30), use_tqdm=False)) == full_tokens
    assert (llm.stats.pauses > 0) == paused
    assert llm.stats.budget_bound == llm.stats.compressions_ordered == llm.stats.blocks_used == 0


SIMULATED = [
    *product((SNAPKV, ZIPAGE), KINDS, ROUNDS),
    *product((R_KV, Case("snapkv", protection="prompt"), Case("h2o")), ["adaptive"], ROUNDS),
    (Case("h2o"), "threshold", "entry"),
    *product(
        (
            Case("random"),
            Case("keydiff"),
            Case("g_kv"),
            Case("vase", {"mode": "dkv"}),
            Case("lagkv", {"partition": 5, "sink": 2}),
            Case("q_filters", calibrations.MADE_UP),
            Case("expected_attention", calibrations.MADE_UP),
            Case("critical"),
            Case("critical", {"base": "h2o", "decay": 0.5, "phi": 0.3, "norm": "l2"}),
            Case("critical", {"base": "expected_attention", **calibrations.MADE_UP, "vnorm": False}),
            Case("lazy_eviction", {"alpha": 0.01}),
        ),
        ["pyramid"],
        ["entry"],
    ),
    (Case("expected_attention", {"stats": "window", "cov": "pairs"}), "adaptive", "entry"),
    (Case("tova", {"reduce": "group"}), "adaptive", "page"),
    (Case("morphkv"), "adaptive", "entry"),
    *((Case("kvzap", calibrations.MADE_UP), name, "entry") for name in ("adaptive", "threshold")),
]


@pytest.mark.parametrize(("case", "name", "rounding"), SIMULATED, ids=str)
def test_what_each_head_keeps_equals_the_simulation_over_a_generation(folder, case, name, rounding, monkeypatch):
    keep, block = 48, 16
    prompt, new = generation_of(case, keep, block)
    recorder = Recorder()
    monkeypatch.setattr(TiledAttention, "__call__", recorder.wrap(TiledAttention.__call__))
    monkeypatch.setattr(Decoder, "forward", recorder.watch(Decoder.forward))
    options = KINDS[name] | ({"tau": TAUS[case.policy]} if name == "threshold" and case.policy in TAUS else {})
    llm = make_llm(folder, case, budget=keep, trace_positions=True, **unequal(name, rounding, **options))
    events = record_events(llm)
    llm.generate(random_prompts([prompt], VOCAB, seed=3), greedy(new, seed=5), use_tqdm=False)
    sizes = {"seed": 5, "prompt_len": prompt, "keep": keep, "recent": case.recent, "protection": case.protection}
    simulation = UnequalSimulation(policy=case.policy, options=case.options, **recorder.arrays(llm), **sizes)
    assert len(events) == 2
    gains = [keep + block] + [block] * (len(events) - 1)
    expected = simulation.run_unequal(gains, (name, options, rounding), block)
    lengths = set()
    for event, kept in zip(events, expected, strict=True):
        for place, positions in kept.items():
            found = event.kept_positions[place]
            assert found[found >= 0].tolist() == positions, (event.round, place)
            lengths.add(len(positions))
    flat = name == "threshold" and case == ZIPAGE  # scores so much alike that all stay, or none
    assert len(lengths) > 1 or rounding == "page" or flat


BUDGET, NEW = 32, 42
CHANGES = {
    "asynchronous": {"async_compression": True},
    "overlapped": {"async_compression": True, "async_scheduling": True},
    "chunked": {"max_num_batched_tokens": 24},
    "constrained": {"scheduling": "constrained", "num_blocks": 10},
    "tight": {"num_blocks": 7, "headroom": 0},
    "tight-async": {"num_blocks": 7, "headroom": 0, "async_compression": True},
    "strided": {"layer_stride": 1},
    "paused": {},
}


BOUNDED = [("pyramid", "page"), ("adaptive", "page"), ("adaptive", "entry"), ("threshold", "entry")]
IN_TURNS = {
    ("adaptive", "page"): ("overlapped", "constrained", "tight", "tight-async", "paused"),
    ("adaptive", "entry"): ("asynchronous", "chunked", "tight", "strided"),
}
"""Changes of a kind that meets them in pages or by entry: each kind meets each change, and so does each rounding."""


def case_of(kind: tuple[str, str]) -> Case:
    return ZIPAGE if kind[1] == "page" else SNAPKV


@pytest.fixture(scope="module")
def alone(folder, prompts):
    """Of a kind, the tokens of each prompt alone, compressed in place, in ample memory."""

    @cache
    def alone(kind: tuple[str, str]) -> list[list[int]]:
        llm = make_llm(folder, case_of(kind), BUDGET, async_compression=False, **unequal(*kind))
        tokens = [tokens_of(llm.generate([p], greedy(NEW, seed=i), use_tqdm=False))[0] for i, p in enumerate(prompts)]
        assert llm.stats.compressions_applied > 0
        return tokens

    return alone


@pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, change) for kind in BOUNDED for change in IN_TURNS.get(kind, CHANGES)],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_batch_equals_its_requests_alone(folder, prompts, alone, kind, change):
    options = {"async_compression": False} | CHANGES[change] | unequal(*kind)
    llm = make_llm(folder, case_of(kind), BUDGET, **options)
    if change == "paused":
        pause_now_and_then(llm, share=0.3)
    params = [greedy(NEW, seed=i) for i in range(len(prompts))]
    assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == alone(kind)
    stats = llm.stats
    assert stats.compressions_ordered == stats.compressions_applied > 0
    assert stats.blocks_used == stats.query_slots_used == 0
    assert stats.resumes == stats.pauses
    if change == "paused" or ("tight" in change and kind in (("pyramid", "page"), ("adaptive", "page"))):
        assert stats.pauses + stats.preemptions > 0


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_every_policy_ranks_heads_that_hold_next_to_nothing(folder, case):
    """In the steepest pyramid the last layer keeps what must stay, which may be no entry at all."""
    policy = case.make()
    case = Case(case.policy, case.options, policy.num_queries if policy.leaves_window_unscored else 0)
    must = case.recent + 4 * (case.policy == "streaming")

    def tokens(prompts: list) -> list[list[int]]:
        llm = make_llm(folder, case, 32, trace_positions=True, **unequal("pyramid", "entry", beta=1e6))
        events = record_events(llm)
        found = tokens_of(llm.generate(prompts, greedy(26, seed=1), use_tqdm=False))
        assert {event.round for event in events} == {0, 1}
        assert {(event.kept_positions[-1] >= 0).sum(axis=-1).max() for event in events} == {must}
        return found

    first, second = random_prompts((40, 47), VOCAB)
    assert tokens([first, second]) == [*tokens([first]), *tokens([second])]


def test_samples_of_a_prompt_each_hold_their_own(folder):
    llm = make_llm(folder, ZIPAGE, BUDGET, **unequal("adaptive"))
    prompt = random_prompts([40], VOCAB)
    outputs = llm.generate(prompt, greedy(NEW, n=3), use_tqdm=False)
    first, *others = tokens_of(outputs)
    assert others == [first, first]
    assert llm.stats.blocks_used == 0


def test_a_batch_that_fails_in_a_later_layer_goes_on_request_by_request(folder, monkeypatch):
    """With what each head of the layers before it keeps."""
    from zipage.worker import tile_compression

    prompts = random_prompts((5, 17, 33, 17, 70, 100), VOCAB)
    options = {"async_compression": False, "layer_stride": 1} | unequal("adaptive", "entry")
    params = [greedy(NEW, seed=i) for i in range(len(prompts))]
    expected = tokens_of(make_llm(folder, SNAPKV, BUDGET, **options).generate(prompts, params, use_tqdm=False))
    choose, failed = tile_compression.TileCompressor._choose, []

    def failing(self, batch, first, last):
        if first == 1 and len(batch.orders) > 1:
            failed.append(len(batch.orders))
            raise MemoryError("too large")
        return choose(self, batch, first, last)

    monkeypatch.setattr(tile_compression.TileCompressor, "_choose", failing)
    llm = make_llm(folder, SNAPKV, BUDGET, **options)
    assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected
    assert failed
    assert llm.stats.compressions_failed == llm.stats.blocks_used == 0


# Memory


def test_as_many_requests_run_as_under_equal_budgets(folder):
    """At equal entries in all: in whole pages a request never holds more than it does there."""

    def most_running(**options) -> int:
        steps = []
        llm = make_llm(folder, SNAPKV, 64, num_blocks=20, max_num_seqs=32, **options)
        llm.step_listeners.append(steps.append)
        llm.generate(random_prompts([20] * 12, VOCAB), greedy(110), use_tqdm=False)
        steady = [step for step in steps if step.num_waiting]
        return sum(step.num_running for step in steady)

    uniform = most_running(enable_prefix_caching=False)
    for name in ("pyramid", "adaptive"):
        assert most_running(**unequal(name)) >= 0.97 * uniform > 0, name


def test_a_threshold_returns_what_it_does_not_keep(folder):
    llm = make_llm(folder, SNAPKV, 64, **unequal("threshold", tau=100.0))
    events = record_events(llm)
    llm.generate(random_prompts([30], VOCAB), greedy(100), use_tqdm=False)
    assert {(event.entries_after, event.blocks_after) for event in events} == {(16, 1)}
    assert events[0].blocks_before == 5
    assert {event.blocks_before for event in events[1:]} == {2}


def test_a_request_tells_what_it_holds(folder):
    llm = make_llm(folder, SNAPKV, BUDGET, trace_positions=True, **unequal("adaptive", "entry"))
    seen, _ = looks(llm, random_prompts([20, 50], VOCAB), greedy(60))
    heads = llm._core._heads
    told = 0
    for state, held, event in (look for of_request in seen.values() for look in of_request):
        if held is None or event is None:
            if held is not None:
                check_look(state, held, event, heads)
            continue
        told += 1
        counts = (event.kept_positions >= 0).sum(axis=-1)
        lens = (held.positions >= 0).sum(axis=-1)
        assert (lens - counts == state.entries - BUDGET).all()
        assert lens.sum() == np.prod(heads) * state.entries
    assert told


# What does not go together


@pytest.mark.parametrize(
    ("case", "options", "said"),
    [
        (
            SNAPKV,
            {"enable_prefix_caching": True},
            "enable_prefix_caching=True: must be False with allocation='adaptive'",
        ),
        (SNAPKV, {"tensor_parallel_size": 2}, "tensor_parallel_size=2: must be 1 with allocation='adaptive'"),
        (SNAPKV, {"trigger": "pressure"}, "trigger='pressure': must be 'block_full' with allocation='adaptive'"),
        (Case("keydiff"), {}, "allocation='adaptive': the scores of policy 'keydiff' .* do not compare across heads"),
        (Case("tova"), {}, "policy 'tova' with these options do not compare"),
        (Case("zipage", {"max_norm": True}), {}, "policy 'zipage' with these options do not compare"),
        (
            Case("random_shared", {"share": "all"}),
            {"allocation": "pyramid"},
            "keeps whole pages, or the same",
        ),
        (
            Case("page_attention", {"page_size": 16}),
            {"allocation": "pyramid"},
            "keeps whole pages, or the same",
        ),
        (SNAPKV, {"allocation_options": {"beta": 2}}, "unknown option"),
    ],
)
def test_what_does_not_go_together_is_told(folder, case, options, said):
    allocation = {"allocation": "adaptive", "enable_prefix_caching": False}
    with pytest.raises(ValueError, match=said):
        make_llm(folder, case, BUDGET, **allocation | options)


def test_a_request_of_another_policy_is_told(folder):
    llm = make_llm(folder, SNAPKV, BUDGET, **unequal("adaptive"))
    (refused,) = llm.generate([[1, 2, 3]], greedy(4, policy="keydiff"), use_tqdm=False)
    assert "do not compare across heads" in refused.error
    outputs = llm.generate([[1, 2, 3]] * 2, [greedy(60, policy="full"), greedy(60)], use_tqdm=False)
    assert [len(tokens) for tokens in tokens_of(outputs)] == [60, 60]


def test_full_kv_ignores_an_allocation(folder, caplog):
    llm = LLM(str(folder), device="cpu", skip_tokenizer_init=True, num_blocks=8, allocation="pyramid")
    assert "allocation" in caplog.text
    assert len(tokens_of(llm.generate([[1, 2]], greedy(3), use_tqdm=False))[0]) == 3
