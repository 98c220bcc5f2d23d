"""Requests that lose their blocks before a compression and come back by copy: no token changes, nothing leaks."""

from functools import cache
from pathlib import Path

import pytest

from tests.engine.compressed import greedy, make_llm, random_prompts, record_events, tokens_of
from tests.eviction.cases import MADE_UP, SMALL_CHUNK, Case
from tests.tiny_models import VOCAB, save_tiny_model
from zipage import LLM
from zipage.scheduling import swap_space

PROMPTS = random_prompts((5, 33, 17, 40, 21, 70), VOCAB)
TOKENS = 44
LATE = {"budget": 48, "interval": 48}
"""Six blocks between compressions, so that many leave before their first."""
UNEQUAL = {"allocation": "adaptive", "enable_prefix_caching": False}
SETTINGS = {
    "full": (None, {"num_blocks": 14}),
    "chunked": (None, {"num_blocks": 14, "max_num_batched_tokens": 24}),
    "no prefix cache": (None, {"num_blocks": 14, "enable_prefix_caching": False}),
    "large blocks": (None, {"num_blocks": 4, "block_size": 64}),
    "zipage": (Case("zipage", SMALL_CHUNK), {"num_blocks": 12, **LATE}),
    "compressed beside": (Case("snapkv"), {"num_blocks": 12, "async_compression": True, **LATE}),
    "state": (Case("h2o"), {"num_blocks": 12, **LATE}),
    "predictions": (Case("kvzap", MADE_UP), {"num_blocks": 12, **LATE}),
    "pages": (Case("page_random", {"page_size": 16}), {"num_blocks": 12, **LATE}),
    "protected": (Case("random", protection="prompt"), {"num_blocks": 12, **LATE}),
    "sliding": (None, {"num_blocks": 14, "family": "gemma3_text"}),
    "sliding, bounded": (Case("zipage", SMALL_CHUNK), {"num_blocks": 12, "family": "gpt_oss", **LATE}),
    "unequal": (Case("zipage", SMALL_CHUNK), {"num_blocks": 12, **LATE, **UNEQUAL}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a family, a model."""

    @cache
    def made(family: str) -> Path:
        return save_tiny_model(family, tmp_path_factory.mktemp(family), num_hidden_layers=2)

    return made


@pytest.fixture(scope="module")
def folder(folders):
    return folders("qwen3")


@pytest.fixture
def copies_are_free(monkeypatch):
    """A model as tiny as the tests' is computed in no time."""
    monkeypatch.setattr(swap_space, "OPERATIONS_PER_BYTE", 0)


def check_returned(llm: LLM) -> None:
    core = llm._core
    assert llm.stats.blocks_used == llm.stats.query_slots_used == core.scheduler.swap_space.num_used == 0
    assert llm.stats.sliding_blocks_used == 0
    assert not core.runner.swapper.copies
    assert core.runner.swapper.num_free_slabs >= llm.memory_plan.num_host_slabs


PARAMS = [greedy(TOKENS, seed=i) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def in_ample_memory(folders):
    """Of a setting, the tokens where no request has to leave."""

    @cache
    def tokens(setting: str) -> list[list[int]]:
        case, options = SETTINGS[setting]
        ample = {key: value for key, value in options.items() if key not in ("num_blocks", "family")}
        llm = make_llm(folders(options.get("family", "qwen3")), case, **{"async_compression": False} | ample)
        return tokens_of(llm.generate(PROMPTS, PARAMS, use_tqdm=False))

    return tokens


@pytest.mark.parametrize("overlaps", [False, True], ids=["one by one", "overlapped"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_are_those_of_ample_memory(folders, copies_are_free, in_ample_memory, setting, overlaps):
    case, options = SETTINGS[setting]
    options = options.copy()
    llm = make_llm(
        folders(options.pop("family", "qwen3")), case, headroom=0, swap_space=0.01, async_scheduling=overlaps, **options
    )
    events = record_events(llm)
    assert tokens_of(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == in_ample_memory(setting)
    left = [event for event in events if event.kind == "pause" and not event.round]
    assert left, "none that was never compressed has left"
    assert llm.stats.pauses == llm.stats.resumes >= len(left)
    assert llm.stats.bytes_to_host >= llm.stats.bytes_from_host > 0
    if case is None:
        assert llm.stats.preemptions == 0
        copied = sum(event.blocks_before for event in left) * llm.memory_plan.block_bytes
        sliding = llm._core.scheduler.swap_space.sliding_out * llm.memory_plan.sliding_block_bytes
        assert (sliding > 0) == (setting == "sliding")
        assert llm.stats.bytes_to_host == copied + sliding
    check_returned(llm)


def test_samples_share_their_prompt_again(folder, copies_are_free):
    params = [greedy(TOKENS, n=3) for _ in PROMPTS]
    expected = make_llm(folder, None).generate(PROMPTS, params, use_tqdm=False)
    llm = make_llm(folder, None, headroom=0, num_blocks=14, swap_space=0.01)
    assert tokens_of(llm.generate(PROMPTS, params, use_tqdm=False)) == tokens_of(expected)
    assert llm.stats.pauses > 0
    assert llm.stats.bytes_to_host > llm.stats.bytes_from_host, "blocks that others held are not copied back"
    check_returned(llm)


def test_without_room_on_the_host_a_request_is_computed_again(folder, copies_are_free):
    params = greedy(TOKENS)
    expected = make_llm(folder, None).generate(PROMPTS, params, use_tqdm=False)
    llm = make_llm(folder, None, headroom=0, num_blocks=14)
    slab = llm.memory_plan.slab_blocks * llm.memory_plan.block_bytes / 2**30
    counts = []
    for space in (0.0, 1.01 * slab, 100 * slab):
        llm = make_llm(folder, None, headroom=0, num_blocks=14, swap_space=space)
        assert llm.memory_plan.num_host_slabs == round(space / slab)
        assert tokens_of(llm.generate(PROMPTS, params, use_tqdm=False)) == tokens_of(expected)
        counts.append((llm.stats.pauses > 0, llm.stats.preemptions > 0))
        check_returned(llm)
    assert counts == [(False, True), (True, True), (True, False)]


def test_what_is_cheaper_to_compute_again_is(folder):
    """As all is of a tiny model on a GPU."""
    llm = make_llm(folder, None, headroom=0, num_blocks=14, swap_space=0.01)
    llm.generate(PROMPTS, greedy(TOKENS), use_tqdm=False)
    assert llm.stats.preemptions > 0
    assert llm.stats.pauses == 0


@pytest.mark.parametrize("overlaps", [False, True], ids=["one by one", "overlapped"])
def test_an_abort_frees_the_copy(folder, copies_are_free, overlaps):
    llm = make_llm(folder, None, headroom=0, num_blocks=14, swap_space=0.01, async_scheduling=overlaps)
    names = [llm.add_request(prompt, greedy(TOKENS)) for prompt in PROMPTS]
    while not (paused := [s.request_id for s in llm.snapshot().requests if s.status == "paused"]):
        llm.step()
    assert llm._core.scheduler.swap_space.num_used > 0
    llm.abort(paused[0])
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert {output.request_id for output in outputs} >= set(names) - {paused[0]}
    check_returned(llm)


@pytest.mark.parametrize("value", [-1, float("nan"), "4", True])
def test_a_size_that_is_none_is_told(folder, value):
    with pytest.raises(ValueError, match="swap_space"):
        make_llm(folder, None, swap_space=value)
