"""Engines with far fewer query slots than requests: slots change hands all the time, and no token changes."""

import pytest

from tests.engine.compressed import greedy, make_llm, pause_now_and_then, random_prompts, tokens_of
from tests.eviction.cases import SMALL_CHUNK, Case
from tests.tiny_models import VOCAB, save_tiny_model

CASES = [Case("zipage", SMALL_CHUNK, recent=8), Case("snapkv", {"window": 8}), Case("tova")]
"""Windows of a block, of a part of one, and of one query."""
BUDGET, INTERVAL, NEW = 32, 32, 58
LENGTHS = (25, 40, 33, 70, 100, 51)
CHANGES = {
    "one": (1, {}),
    "two": (2, {"async_compression": True, "async_scheduling": True}),
    "chunked": (2, {"max_num_batched_tokens": 24}),
    "paused": (2, {"async_compression": True, "async_scheduling": True}),
    "tight": (2, {"num_blocks": 12, "headroom": 0}),
    "constrained": (2, {"scheduling": "constrained"}),
    "unequal": (2, {"allocation": "pyramid", "allocation_options": {"round": "page"}, "enable_prefix_caching": False}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS, VOCAB)


@pytest.fixture(scope="module", params=CASES, ids=str)
def bounded(request, folder, prompts):
    """A case, and the tokens of each prompt alone, under equal and unequal budgets."""
    expected = {}
    for change in ("one", "unequal"):
        llm = make_llm(folder, request.param, BUDGET, async_compression=False, interval=INTERVAL, **CHANGES[change][1])
        runs = [llm.generate([p], greedy(NEW, seed=i), use_tqdm=False) for i, p in enumerate(prompts)]
        expected[change] = [tokens_of(run)[0] for run in runs]
    return request.param, expected


def few(llm, num_slots: int) -> list[int]:
    """Take all query slots but `num_slots`. Returns, per step, those that changed hands between two requests."""
    slots, holders, lent = llm._core.scheduler.slots, {}, []
    slots.num_slots = num_slots
    slots._free = list(range(num_slots))

    def watch(_step) -> None:
        running = llm._core.scheduler.running
        now = {request.query_slot: request for request in running if request.query_slot >= 0}
        before = [holders.get(slot, request) for slot, request in now.items()]
        pairs = zip(before, now.values(), strict=True)
        lent.append(sum(one is not other and one in running for one, other in pairs))
        holders.clear()
        holders.update(now)

    llm.step_listeners.append(watch)
    return lent


@pytest.mark.parametrize("change", CHANGES)
def test_a_batch_with_few_slots_equals_its_requests_alone(folder, prompts, bounded, change):
    case, expected = bounded
    num_slots, options = CHANGES[change]
    options = {"async_compression": False, "interval": INTERVAL} | options
    params = [greedy(NEW, seed=i) for i in range(len(prompts))]
    llm = make_llm(folder, case, BUDGET, **options)
    lent = few(llm, num_slots)
    if change == "paused":
        pause_now_and_then(llm, share=0.3)
    assert (
        tokens_of(llm.generate(prompts, params, use_tqdm=False))
        == expected["unequal" if change == "unequal" else "one"]
    )
    assert (sum(lent) > 3) == (change != "constrained")
    assert llm.stats.blocks_used == llm.stats.query_slots_used == 0
