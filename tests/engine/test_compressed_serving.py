"""Serving requests with bounded caches: what a user sees and may ask for."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from tests.engine.compressed import greedy, make_llm, pause_now_and_then, random_prompts, record_events, tokens_of
from tests.eviction.cases import SMALL_CHUNK, Case
from tests.tiny_models import VOCAB, save_tiny_model
from zipage import LLM, SamplingParams
from zipage.eviction.policy import Policy
from zipage.scheduling.request import Status

ZIPAGE = Case("zipage", SMALL_CHUNK)
RANDOM = Case("random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_long_thought_stays_inside_its_blocks(tmp_path, asynchronous):
    save_tiny_model("qwen3", tmp_path, num_hidden_layers=1, max_position_embeddings=40_960)
    llm = make_llm(tmp_path, ZIPAGE, num_blocks=10, max_num_seqs=2, debug=False, async_compression=asynchronous)
    used = []
    llm.step_listeners.append(lambda step: used.append(step.blocks_used))
    outputs = llm.generate(random_prompts([20, 30], VOCAB), greedy(600), use_tqdm=False)
    assert [len(tokens) for tokens in tokens_of(outputs)] == [600, 600]
    assert max(used) == 2 * 5
    assert llm.stats.preemptions == llm.stats.pauses == 0
    assert [output.metrics.compressions for output in outputs] == [(20 + 598 - 64) // 16, (30 + 598 - 64) // 16]


def test_counters_events_and_steps_tell_the_same(folder):
    llm = make_llm(folder, ZIPAGE, num_blocks=9, headroom=0)
    events, steps = record_events(llm), []
    llm.step_listeners.append(steps.append)
    outputs = llm.generate(random_prompts([5, 17, 33, 9, 40, 20], VOCAB), greedy(90), use_tqdm=False)
    stats = llm.stats
    kinds = [event.kind for event in events]
    assert kinds.count("compress") == stats.compressions_applied == sum(step.num_compressed for step in steps) > 0
    assert kinds.count("pause") == stats.pauses == sum(step.num_paused for step in steps)
    assert kinds.count("resume") == stats.resumes == sum(step.num_resumed for step in steps)
    assert kinds.count("preempt") == stats.preemptions == sum(step.num_preempted for step in steps)
    assert stats.pauses + stats.preemptions > 0
    assert sum(step.num_stalled for step in steps) > 0
    compressions = [event for event in events if event.kind == "compress"]
    assert stats.entries_evicted == sum(event.entries_before - event.entries_after for event in compressions)
    assert stats.blocks_returned == sum(event.blocks_before - event.blocks_after for event in compressions)
    assert all(event.kept_positions is None for event in events)
    for number, output in enumerate(outputs):
        mine = [event.round for event in compressions if event.request_id == output.request_id]
        assert mine == list(range(output.metrics.compressions)), number
    assert stats.budget_bound == sum(output.metrics.compressions > 0 for output in outputs)
    assert max(step.query_slots_used for step in steps) == llm.memory_plan.num_query_slots == 1


def test_samples_keep_one_protected_prompt(folder):
    llm = make_llm(folder, Case("zipage", SMALL_CHUNK, protection="prompt"), budget=96, max_num_seqs=4)
    heads = set()

    def look(_step) -> None:
        running = [request for request in llm._core.scheduler.running if request.status is Status.RUNNING]
        if len(running) == 4 and all(request.num_compressions > 1 for request in running):
            heads.add(tuple(tuple(request.block_ids[:3]) for request in running))

    llm.step_listeners.append(look)
    llm.generate(random_prompts([50], VOCAB), greedy(150, n=4, seed=1), use_tqdm=False)
    assert heads
    assert all(len(set(tables)) == 1 for tables in heads)


def test_samples_of_a_random_policy_draw_apart(folder):
    llm = make_llm(folder, RANDOM, trace_positions=True)
    events = record_events(llm)
    llm.generate(random_prompts([20], VOCAB), greedy(70, n=2, seed=1), use_tqdm=False)
    first = [event.kept_positions for event in events if event.round == 0]
    assert len(first) == 2
    assert (first[0] != first[1]).any()


def watch_blocks(llm: LLM) -> dict[tuple[str, int], int]:
    """Most blocks that each sample has held at the begin of a step, with those of a compression under way."""
    held: dict[tuple[str, int], int] = {}
    advance = llm._core.scheduler.advance

    def look(plan):
        fresh = {order.request: len(order.fresh) for order in llm._core.scheduler.compressions.in_flight.values()}
        for request in llm._core.scheduler.running:
            key, blocks = (request.request_id, request.index), len(request.block_ids) + fresh.get(request, 0)
            held[key] = max(held.get(key, 0), blocks)
        advance(plan)

    llm._core.scheduler.advance = look
    return held


@pytest.mark.parametrize(
    ("options", "params", "most"),
    [
        ({}, greedy(100), [5, 7, 5]),  # N_max is 5; a prompt of 7 blocks is held whole before its first compression
        ({}, greedy(100, budget_tokens=32), [3, 7, 3]),
        ({}, greedy(100, policy="full"), [8, 13, 7]),
        ({"trigger": "pressure"}, greedy(100), [8, 13, 7]),
        ({"num_blocks": 8, "headroom": 0}, greedy(40), [4, 7, 3]),
        ({"async_compression": False}, greedy(100), [5, 7, 5]),
    ],
)
def test_blocks_are_counted_as_they_were_held(folder, options, params, most):
    llm = make_llm(folder, ZIPAGE, **options)
    held = watch_blocks(llm)
    outputs = llm.generate(random_prompts([20, 100, 5], VOCAB), params, use_tqdm=False)
    peaks = [output.outputs[0].metrics.peak_blocks for output in outputs]
    assert peaks == list(held.values())
    assert peaks == [output.metrics.peak_blocks for output in outputs]
    assert peaks == most
    slots = [output.outputs[0].metrics.query_slot for output in outputs]
    assert slots == [params.policy is None] * 2 + [params.policy is None and "num_blocks" not in options]


def test_blocks_that_a_compression_takes_beside_shared_ones_count(folder):
    llm = make_llm(folder, ZIPAGE)
    held = watch_blocks(llm)
    (output,) = llm.generate(random_prompts([50], VOCAB), greedy(100, n=3), use_tqdm=False)
    peaks = {(output.request_id, sample.index): sample.metrics.peak_blocks for sample in output.outputs}
    assert peaks == held
    assert output.metrics.peak_blocks == max(peaks.values()) > 5


def test_budget_and_policy_of_one_request(folder):
    llm = make_llm(folder, ZIPAGE)
    prompts = random_prompts([20], VOCAB) * 5
    params = [
        greedy(100),
        greedy(100, budget_tokens=32),
        greedy(100, policy="full"),
        greedy(100, policy="random", seed=0),
        greedy(100, policy="page_random"),
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    # 118 entries come in all: at 80, or 48, and then every 16 the next needs room.
    assert [output.metrics.compressions for output in outputs[:4]] == [3, 5, 0, 3]
    assert "page_size=256 is not the block_size=16" in outputs[4].error
    full = make_llm(folder, None).generate(prompts[:1], greedy(100), use_tqdm=False)
    alone = make_llm(folder, RANDOM).generate(prompts[:1], greedy(100, seed=0), use_tqdm=False)
    assert tokens_of(outputs[2:3]) == tokens_of(full)
    assert tokens_of(outputs[3:4]) == tokens_of(alone)


def test_protection_of_one_request(folder):
    prompts = random_prompts([20], VOCAB) * 4
    wanted = [None, "prompt", "sink:4", "none"]
    bare, guarded = make_llm(folder, RANDOM), make_llm(folder, Case("random", protection="prompt"))
    seen: dict[str, list[int]] = {}
    for llm in (bare, guarded):
        params = [greedy(100, seed=0, protection=protection) for protection in wanted]
        none, prompt, sink, also_none = tokens_of(llm.generate(prompts, params, use_tqdm=False))
        own = prompt if llm is guarded else also_none
        assert none == own
        for protection, tokens in zip(wanted[1:], (prompt, sink, also_none)):
            assert seen.setdefault(protection, tokens) == tokens
    assert len({tuple(tokens) for tokens in seen.values()}) == 3
    with pytest.raises(ValueError, match=r"SamplingParams\.protection='sink:0': must be none, prompt or sink:N"):
        SamplingParams(protection="sink:0")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(protection="sink:60"), "less than protection=sink:60 and recent_tokens=16 together"),
        (SamplingParams(policy="zipag"), "did you mean 'zipage'"),
        (SamplingParams(policy="zipage"), "needs scores and 16 queries a request, .* engine of policy 'random'"),
        (SamplingParams(policy="tova"), "needs 1 queries a request"),
        (SamplingParams(budget_tokens=16), "budget_tokens=16 leaves nothing to choose beside recent_tokens=16"),
    ],
)
def test_a_request_that_cannot_be_bounded_costs_itself_only(folder, params, message):
    llm = make_llm(folder, RANDOM)
    good, bad = llm.generate([[1, 2, 3], [4, 5, 6]], [greedy(5), params], use_tqdm=False)
    assert good.error is None
    with pytest.raises(ValueError, match=message):
        raise ValueError(bad.error)


def test_a_truncated_prompt_is_counted(folder):
    llm = make_llm(folder, Case("random", protection="prompt"))
    llm.generate(random_prompts([20, 64], VOCAB), greedy(4), use_tqdm=False)
    assert llm.stats.prompts_truncated == 1


def test_pressure_loses_nothing_in_ample_memory(folder):
    prompts = random_prompts([20, 70, 5], VOCAB)
    llm = make_llm(folder, ZIPAGE, trigger="pressure")
    outputs = llm.generate(prompts, greedy(120), use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(make_llm(folder, None).generate(prompts, greedy(120), use_tqdm=False))
    assert llm.stats.compressions_ordered == llm.stats.budget_bound == 0


@pytest.mark.parametrize("case", [ZIPAGE, RANDOM, Case("page_attention", {"page_size": 16})], ids=str)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_pressure_compresses_where_memory_is_short(folder, case, asynchronous):
    llm = make_llm(folder, case, trigger="pressure", num_blocks=16, async_compression=asynchronous)
    steps = []
    llm.step_listeners.append(steps.append)
    outputs = llm.generate(random_prompts([20, 70, 5, 30], VOCAB), greedy(100), use_tqdm=False)
    assert [len(tokens) for tokens in tokens_of(outputs)] == [100] * 4
    assert llm.stats.compressions_applied == llm.stats.compressions_ordered > 0
    assert max(step.blocks_used for step in steps) == 16
    assert llm.stats.blocks_used == 0


def test_a_budget_beyond_the_pool_ends_with_it(folder):
    llm = make_llm(folder, RANDOM, budget=512, num_blocks=6)
    output = llm.generate([[1, 2, 3]], greedy(300), use_tqdm=False)[0]
    assert (output.outputs[0].finish_reason, len(output.outputs[0].token_ids)) == ("capacity", 93)
    assert llm.stats.budget_bound == 0


def test_an_abort_in_the_middle_of_a_compression(folder):
    llm = make_llm(folder, ZIPAGE, async_compression=True)
    request_id = llm.add_request([1, 2, 3], greedy(300))
    other = llm.add_request([4, 5, 6, 7], greedy(100))
    while not llm.stats.num_compressing:
        llm.step()
    assert llm.abort(request_id)
    done = []
    while llm.has_unfinished_requests():
        done += llm.step()
    reasons = {output.request_id: output.outputs[0].finish_reason for output in done}
    assert reasons == {request_id: "abort", other: "length"}
    assert llm.stats.blocks_used == llm.stats.num_compressing == 0


def test_an_abort_of_the_last_request_in_the_middle_of_a_compression(folder):
    llm = make_llm(folder, ZIPAGE, async_compression=True)
    request_id = llm.add_request([1, 2, 3], greedy(300))
    while not llm.stats.num_compressing:
        llm.step()
    llm.abort(request_id)
    assert llm.stats.blocks_used == llm.stats.num_compressing == 0
    assert [output.request_id for output in llm.step()] == [request_id]
    assert llm.step() == []


def test_an_abort_while_paused(folder):
    llm = make_llm(folder, ZIPAGE)
    request_id = llm.add_request([1, 2, 3], greedy(300))
    pause_now_and_then(llm, share=1.0)
    llm.step()
    assert llm.stats.pauses == 1
    assert llm.abort(request_id)
    assert llm.step()[0].outputs[0].finish_reason == "abort"
    assert llm.stats.blocks_used == llm.stats.query_slots_used == 0


def test_stop_strings_streams_and_shutdown(folder):
    llm = make_llm(folder, RANDOM, async_compression=True)
    tokens = [event.token_id for event in llm.stream([1, 2, 3], greedy(100))]
    assert tokens == tokens_of(make_llm(folder, RANDOM).generate([[1, 2, 3]], greedy(100), use_tqdm=False))[0]
    llm.add_request([1, 2, 3], greedy(100))
    llm.shutdown()
    assert llm.step()[0].outputs[0].finish_reason == "abort"
    assert llm.stats.blocks_used == 0


def test_the_plan_says_what_it_reserves(folder, caplog):
    with caplog.at_level("INFO", logger="zipage"):
        llm = make_llm(folder, ZIPAGE, num_blocks=None, kv_cache_memory_bytes=2**22)
    plan = llm.memory_plan
    assert plan.max_blocks_per_request == 5
    expected = 2**22 // (5 * plan.block_bytes + plan.query_slot_bytes)
    assert plan.num_query_slots == min(8, expected)
    assert plan.num_blocks == (2**22 - plan.num_query_slots * plan.query_slot_bytes) // plan.block_bytes
    assert f"{plan.num_query_slots} query slots" in caplog.text


def test_a_policy_of_ones_own(folder):
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        device="cpu",
        block_size=16,
        num_blocks=32,
        policy="examples.my_policy:MyPolicy",
        budget_tokens=64,
        debug=True,
    )
    llm.generate([[1, 2, 3]], greedy(100), use_tqdm=False)
    assert llm.stats.compressions_applied == 2


UNRANKED = f"{__name__}:Unranked"


@dataclass(frozen=True, kw_only=True)
class Unranked(Policy):
    """Ranks one entry of one head NaN, from the second compression of a request on."""

    name: ClassVar[str] = "unranked"
    variant: ClassVar[str] = "NaN"
    paper: ClassVar[str] = ""
    slot: int = 20

    def rank(self, event):
        scores = event.key_norms().clone()
        for request, rounds in enumerate(event.rounds):
            scores[0, request, -1, self.slot] = float("nan") if rounds else 0.0
        return scores


def test_a_rank_that_is_no_number_is_an_error_in_debug_mode_and_counted_otherwise(folder, caplog):
    case = Case(UNRANKED)
    (output,) = make_llm(folder, case).generate([[1, 2, 3]], greedy(100), use_tqdm=False)
    assert "policy 'unranked' ranked entries NaN" in output.error
    caplog.clear()
    for asynchronous in (False, True):
        llm = make_llm(folder, case, debug=False, async_compression=asynchronous)
        llm.generate([[1, 2, 3], [4, 5]], greedy(118), use_tqdm=False)
        assert (llm.stats.compressions_applied, llm.stats.compressions_misranked) == (6, 4)
        assert caplog.text.count("policy 'unranked' ranked entries NaN") == 1
        caplog.clear()


@pytest.mark.parametrize("slot", [2, 79])
def test_entries_that_must_stay_need_no_rank(folder, slot):
    """The first of a protected prompt and the latest."""
    llm = make_llm(folder, Case(UNRANKED, {"slot": slot}, protection="prompt"))
    llm.generate([[1, 2, 3]], greedy(100), use_tqdm=False)
    assert llm.stats.compressions_applied == 2
    assert llm.stats.compressions_misranked == 0
