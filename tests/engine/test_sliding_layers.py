"""Models with sliding layers: these hold a window in blocks of their own, and policies evict from full layers."""

from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.paged_prefill import attend_reference
from tests import calibrations
from tests.engine.compressed import (
    UNBOUNDED,
    Recorder,
    check_look,
    greedy,
    looks,
    make_llm,
    pause_now_and_then,
    random_prompts,
    record_events,
    tokens_of,
)
from tests.eviction.cases import SMALL_CHUNK, Case
from tests.eviction.dense_simulation import Simulation
from tests.tiny_models import VOCAB, save_tiny_model
from zipage.models.decoder import Decoder
from zipage.models.loading.safetensors_folder import SafetensorsFolder
from zipage.worker.mixed_attention import MixedAttention

WINDOW = 24
OPTIONS = {
    "gpt_oss": {"num_hidden_layers": 4},  # every other layer is full
    "gemma3_text": {"num_hidden_layers": 5, "sliding_window_pattern": 3, "attn_logit_softcapping": 20.0},  # one is
}
FULL = {"gpt_oss": [1, 3], "gemma3_text": [2]}
LENGTHS = (5, 17, 33, 17, 70, 100)
RANKED = (
    "zipage",
    "snapkv",
    "h2o",
    "tova",
    "streaming",
    "r_kv",
    "g_kv",
    "morphkv",
    "keydiff",
    "knorm",
    "vase",
    "lagkv",
)
RANKED += ("lazy_eviction", "random", "random_shared")

each_family = pytest.mark.parametrize("folder", sorted(OPTIONS), indirect=True)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / request.param
    save_tiny_model(request.param, path, **OPTIONS[request.param])
    weights = load_file(path / "model.safetensors")
    # Sinks that take about half of what there is, or nobody would miss them.
    raised = {name: x + 4.0 if name.endswith("sinks") else x for name, x in weights.items()}
    save_file(raised, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def folder_of_gemma(tmp_path_factory):
    return save_tiny_model("gemma3_text", tmp_path_factory.mktemp("gemma"), **OPTIONS["gemma3_text"])


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS, VOCAB)


@each_family
def test_an_unbounded_budget_gives_the_tokens_of_full_kv(folder, prompts):
    full = tokens_of(make_llm(folder, None).generate(prompts, greedy(30), use_tqdm=False))
    llm = make_llm(folder, Case("lazy_eviction"), budget=UNBOUNDED, num_blocks=1024, max_num_seqs=128)
    params = [greedy(30, policy=policy) for policy in RANKED for _ in prompts]
    assert tokens_of(llm.generate(prompts * len(RANKED), params, use_tqdm=False)) == full * len(RANKED)


@each_family
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_windows_longer_than_any_request_take_no_memory_and_tokens_are_the_same(folder, prompts, async_scheduling):
    """Windows of 24 entries lie in three blocks of 16. Requests of 32 tokens have two, and fill them to the last."""
    prompts, options = prompts[:2] + prompts[3:4], {"num_blocks": 64, "async_scheduling": async_scheduling}
    params = [greedy(32 - len(prompt)) for prompt in prompts]
    expected, short = (make_llm(folder, None, max_model_len=longest, **options) for longest in (64, 32))
    assert short.memory_plan.num_sliding_blocks == 2 * short.memory_plan.num_windows
    outputs = short.generate(prompts, params, use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(expected.generate(prompts, params, use_tqdm=False))
    assert {output.outputs[0].metrics.peak_sliding_blocks for output in outputs} == {2}


CASES = [
    ("gpt_oss", Case("zipage", SMALL_CHUNK, recent=8, protection="prompt"), {}),
    ("gpt_oss", Case("r_kv", protection="sink:4"), {"interval": 32}),
    ("gpt_oss", Case("lazy_eviction", {"alpha": 0.01}), {"layer_stride": 1}),
    ("gpt_oss", Case("critical"), {"async_compression": True}),
    ("gpt_oss", Case("page_attention", {"page_size": 4, "native": False}, protection="prompt"), {}),
    ("gpt_oss", Case("zipage", SMALL_CHUNK, recent=8), {"budget": 16}),  # less than the window
    ("gpt_oss", Case("page_attention", {"page_size": 16}), {}),
    ("gemma3_text", Case("snapkv", {"softmax": "cut"}), {"layer_stride": 2, "max_num_batched_tokens": 24}),
    ("gemma3_text", Case("h2o"), {"trigger": "pressure", "num_blocks": 5}),
]


@pytest.mark.parametrize(
    ("folder", "case", "options"), CASES, indirect=["folder"], ids=lambda value: str(value) if value else "plain"
)
def test_full_layers_keep_what_the_simulation_keeps_and_sliding_ones_their_window(folder, case, options, monkeypatch):
    """And what comes of attention is that of a dense model whose full layers have lost the others."""
    prompt, new, keep = 40, 76, options.get("budget", 48)
    recorder = Recorder()
    monkeypatch.setattr(MixedAttention, "__call__", recorder.wrap(MixedAttention.__call__))
    monkeypatch.setattr(Decoder, "forward", recorder.watch(Decoder.forward))
    llm = make_llm(folder, case, **{"budget": keep} | options, trace_positions=True)
    events, full, cache = record_events(llm), FULL[folder.name], llm._core.runner.cache
    llm.generate(random_prompts([prompt], VOCAB, seed=3), greedy(new, seed=5), use_tqdm=False)
    events = [event for event in events if event.kind == "compress"]
    assert len(events) >= 2
    decoder = llm._core.runner.decoder
    assert {len(x) for x in (cache.k, cache.positions, cache.queries, *cache.scores)} == {len(full)}
    assert len(cache.sliding.k) == len(decoder.layers) - len(full)
    assert cache.sliding.positions is cache.sliding.queries is None
    arrays = recorder.arrays(llm)
    simulation = Simulation(
        policy=case.policy, options=case.options, **{name: array[full] for name, array in arrays.items()}, seed=5,
        prompt_len=prompt, keep=keep, recent=case.recent, protection=case.protection,
        scale=decoder.spec.attention[full[0]].scale, soft_cap=decoder.spec.attention[full[0]].soft_cap,
        sinks=np.stack([decoder.forms[i].sinks.double().numpy() for i in full]) if folder.name == "gpt_oss" else None,
    )  # fmt: skip
    heads = range(arrays["keys"].shape[1])
    for event, kept in zip(events, simulation.run([event.entries_before for event in events]), strict=True):
        assert len(event.kept_positions) == len(full)
        for place in product(range(len(full)), heads):
            assert event.kept_positions[place].tolist() == kept[place], (event.round, place)
    for layer, head, position in product(range(len(decoder.layers)), heads, range(prompt, prompt + new - 1)):
        seen = list(range(position + 1))[-WINDOW if layer not in full else 0 :]
        past = [event for event in events if event.num_tokens <= position + 1]
        if layer in full and past:
            seen = [*past[-1].kept_positions[full.index(layer), head], *range(past[-1].num_tokens - 1, position + 1)]
        group = arrays["queries"].shape[2] // len(heads)
        own = slice(head * group, (head + 1) * group)
        found = torch.stack([torch.cat(recorder.outputs[layer])[position, own]])
        query, keys, values = (
            torch.from_numpy(x).float()
            for x in (
                arrays["queries"][layer, position, own][None],
                arrays["keys"][layer, head, seen],
                arrays["values"][layer, head, seen],
            )
        )
        expected = attend_reference(
            query, keys, values, decoder.spec.attention[layer].scale, len(seen), decoder.forms[layer].of_heads(own)
        )
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


BOUNDED_TOKENS = 40
BINDING = {
    "chunked, strided, overlapped": {
        "max_num_batched_tokens": 24,
        "layer_stride": 1,
        "async_compression": True,
        "async_scheduling": True,
    },
    "tight": {"num_blocks": 11, "headroom": 0, "swap_space": 0.1},
    "paused": {"async_compression": True},
}


@pytest.mark.parametrize(
    ("folder", "case"),
    [("gpt_oss", Case("zipage", SMALL_CHUNK, protection="prompt")), ("gemma3_text", Case("h2o"))],
    indirect=["folder"],
    ids=str,
)
def test_a_batch_equals_its_requests_alone(folder, case):
    prompts = random_prompts((30, 33, 45, 70, 100), VOCAB)
    params = [greedy(BOUNDED_TOKENS, seed=i, n=1 + i % 2) for i in range(len(prompts))]
    llm = make_llm(folder, case, 48, async_compression=False, enable_prefix_caching=False)
    alone = [tokens_of(llm.generate([p], one, use_tqdm=False)) for p, one in zip(prompts, params, strict=True)]
    full = tokens_of(make_llm(folder, None).generate(prompts, params, use_tqdm=False))
    assert [tokens for each in alone for tokens in each] != full
    for name, options in BINDING.items():
        llm = make_llm(folder, case, 48, **{"async_compression": False} | options)
        if name == "paused":
            pause_now_and_then(llm, share=0.3)
        if "chunked" in name:  # what it leaves of prompts is found again
            llm.generate(prompts, params, use_tqdm=False)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [tokens_of([output]) for output in outputs] == alone, name
        assert llm.stats.budget_bound == sum(map(len, alone)) * (1 + ("chunked" in name)), name
        assert sum(output.metrics.cached_tokens for output in outputs) > 0, "samples share their prompt"
        assert llm.stats.blocks_used == llm.stats.query_slots_used == 0, name
        assert llm.stats.resumes == llm.stats.pauses
        if name == "paused":
            assert llm.stats.pauses > 10
        if "tight" in name:
            assert llm.stats.pauses + llm.stats.preemptions > 0


@each_family
def test_a_request_may_ask_for_less_than_the_window(folder):
    llm = make_llm(folder, Case("zipage", SMALL_CHUNK, recent=8), budget=48)
    asked = greedy(60, budget_tokens=16), greedy(60, policy="random"), greedy(60, budget_tokens=32)
    outputs = llm.generate([[1] * 9] * 3, list(asked), use_tqdm=False)
    assert [len(tokens) for tokens in tokens_of(outputs)] == [60] * 3
    assert llm.stats.budget_bound == 3


def test_what_is_held_is_told_of_full_layers(folder_of_gemma):
    llm = make_llm(folder_of_gemma, Case("knorm"), budget=48, trace_positions=True)
    seen, _ = looks(llm, random_prompts([40], VOCAB), greedy(60))
    for found in seen.values():
        for state, held, event in found:
            check_look(state, held, event, (len(FULL["gemma3_text"]), 2))
    assert state.compressions > 0


REFUSED = [
    (Case("expected_attention", {"stats": "window"}), {}, r"policy=expected_attention: attention with window=24 \(lay"),
    (
        Case("kvzap", {"calibration": "none"}),
        {},
        r"policy=kvzap: attention with window=24 \(layer 0\) is not supported",
    ),
    (
        Case("zipage", SMALL_CHUNK),
        {"allocation": "pyramid", "enable_prefix_caching": False},
        r"allocation='pyramid': attention with window=24 \(layer 0\) is not supported: leave allocation at 'uniform'",
    ),
]


@pytest.mark.parametrize("folder", ["gpt_oss"], indirect=True)
@pytest.mark.parametrize(("case", "options", "message"), REFUSED, ids=str)
def test_what_does_not_go_with_sliding_layers_says_so_and_reads_no_weight(folder, case, options, message, monkeypatch):
    calibrations.given(case.options, case.policy, folder)
    monkeypatch.setattr(SafetensorsFolder, "read", None)
    with pytest.raises(ValueError, match=f"^{message}"):
        make_llm(folder, case, **{"budget": 48} | options)


def test_values_behind_a_norm_are_not_weighed(tmp_path):
    folder = save_tiny_model("gemma3_text", tmp_path, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"^policy=critical: .* gemma3_text has a norm behind it: take another policy"):
        make_llm(folder, Case("critical"), budget=48)


def test_where_all_layers_have_a_window_there_is_nothing_to_choose(tmp_path):
    folder = save_tiny_model("gemma3_text", tmp_path, num_hidden_layers=1)
    assert make_llm(folder, None)._core.runner.cache.sliding is None
    with pytest.raises(ValueError, match=r"^policy=knorm: each layer of the model has a window, .*: set policy=full"):
        make_llm(folder, Case("knorm"))
