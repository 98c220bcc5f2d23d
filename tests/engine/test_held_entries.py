"""What an engine tells of requests that run: their state, and the positions that each head holds."""

import numpy as np
import pytest

from tests.engine.compressed import check_look, greedy, looks, make_llm, pause_now_and_then, random_prompts, tokens_of
from tests.eviction.cases import Case
from tests.tiny_models import VOCAB, save_tiny_model

PROMPTS = random_prompts([40, 90], VOCAB)
KEEP, NEW, HEADS = 48, 60, (2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=HEADS[0])


@pytest.mark.parametrize("options", [{}, {"async_compression": False}, {"async_scheduling": True}], ids=str)
@pytest.mark.parametrize("case", [Case("zipage", {"chunk": 32}), Case("page_random", {"page_size": 16})], ids=str)
def test_what_is_held_is_what_was_kept_and_what_came_after(folder, case, options):
    llm = make_llm(folder, case, budget=KEEP, trace_positions=True, max_num_batched_tokens=64, **options)
    pause_now_and_then(llm)
    seen, tokens = looks(llm, PROMPTS, greedy(NEW))
    states = [state for found in seen.values() for state, _, _ in found]
    for found in seen.values():
        for state, held, event in found:
            check_look(state, held, event, HEADS)
    assert {(state.policy, state.budget_tokens) for state in states} == {(case.policy, KEEP)}
    statuses = {state.status for state in states}
    assert {"running", "paused"} <= statuses
    assert ("compressing" in statuses) == llm.config.async_compression
    assert llm.snapshot().requests == []

    unwatched = make_llm(folder, case, budget=KEEP, max_num_batched_tokens=64, **options)
    assert tokens_of(unwatched.generate(PROMPTS, greedy(NEW), use_tqdm=False)) == tokens, "to look changes nothing"


def test_full_kv_holds_all(folder):
    seen, _ = looks(make_llm(folder, None), PROMPTS, greedy(NEW))
    for (state, held, _), *_ in seen.values():
        assert (state.policy, state.budget_tokens, state.protected) == ("full", None, 0)
        assert (held.positions == np.arange(held.num_tokens - 1)).all()


def test_a_request_that_is_none(folder):
    llm = make_llm(folder, None)
    name = llm.add_request(PROMPTS[0], greedy(NEW, n=2, seed=1))
    assert [(s.sample_index, s.status, s.entries, s.blocks) for s in llm.snapshot().requests] == [
        (0, "waiting", 0, 0),
        (1, "waiting", 0, 0),
    ]
    llm.step()
    assert llm.held_entries(name, 1) is None, "it waits for its sibling to compute the prompt"
    llm.step()
    assert llm.held_entries(name, 1) is not None
    assert llm.held_entries(name, 2) is None
    assert llm.held_entries("nobody") is None
    assert llm.abort(name)
    assert llm.held_entries(name) is None
    llm.shutdown()
    for ask in (llm.snapshot, lambda: llm.held_entries(name)):
        with pytest.raises(RuntimeError, match="was shut down"):
            ask()
