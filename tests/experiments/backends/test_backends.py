"""Other engines behind the harness's protocol: what they answer, what they refuse, what they are told."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

from experiments.backends import BACKENDS
from experiments.backends.transformers import TransformersBackend
from experiments.backends.vllm import VllmBackend
from experiments.reasoner.tokenizer import VOCABULARY, build_tokenizer
from experiments.running.scenarios import TimedRequest, serve
from zipage import LLM, SamplingParams

PROMPTS = [[10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34, 35, 36]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    set_seed(0)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    build_tokenizer(64).save_pretrained(folder)
    return str(folder)


def answers(backend, params: SamplingParams, prompts=PROMPTS):
    requests = [TimedRequest(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    outputs = serve(backend, requests, progress=False).outputs
    return [outputs[str(i)] for i in range(len(prompts))]


def transformers(model: str, **options) -> TransformersBackend:
    return BACKENDS["transformers"](model=model, device="cpu", dtype="float32", **options)


# transformers


@pytest.mark.parametrize("max_num_seqs", [1, 2, 8])
def test_greedy_answers_are_those_of_our_engine(model, max_num_seqs):
    params = SamplingParams(temperature=0.0, max_tokens=12)
    ours = LLM(model, device="cpu", dtype="float32", block_size=16, num_blocks=32)
    expected = answers(ours, params)
    found = answers(transformers(model, max_num_seqs=max_num_seqs), params)
    for a, b in zip(found, expected, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        assert a.outputs[0].text == b.outputs[0].text
        assert a.outputs[0].finish_reason == b.outputs[0].finish_reason
        assert a.metrics.output_tokens == len(a.outputs[0].token_ids)


def test_an_end_token_ends_one_row_and_not_the_others(model):
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    free = [output.outputs[0].token_ids for output in answers(transformers(model), params)]
    stop = free[0][4]
    stopped = answers(transformers(model), SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(stop,)))
    for output, tokens in zip(stopped, free, strict=True):
        ends = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert output.outputs[0].token_ids == tokens[:ends]
        assert output.outputs[0].finish_reason == ("stop" if stop in tokens else "length")


def test_samples_differ_and_repeat_themselves(model):
    params = SamplingParams(temperature=1.0, n=3, max_tokens=8, seed=5)
    first, second = (answers(transformers(model), params, PROMPTS[:2]) for _ in range(2))
    texts = [[sample.token_ids for sample in output.outputs] for output in first]
    assert texts == [[sample.token_ids for sample in output.outputs] for output in second]
    assert len({tuple(tokens) for tokens in texts[0]}) > 1
    assert [sample.index for sample in first[0].outputs] == [0, 1, 2]
    state = torch.random.get_rng_state()
    answers(transformers(model), params, PROMPTS[:1])
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is its own"


def test_batches_hold_as_many_rows_as_asked(model):
    backend = transformers(model, max_num_seqs=4)
    steps = []
    backend.step_listeners.append(steps.append)
    answers(backend, SamplingParams(temperature=0.0, n=2, max_tokens=3, ignore_eos=True))
    assert [step.num_prefill for step in steps if step.num_prefill] == [4, 2]
    assert [step.num_waiting for step in steps if step.num_prefill] == [2, 0]
    assert [step.num_decode for step in steps if step.num_decode] == [4, 4, 2, 2]
    assert backend.stats.steps == len(steps) == 6
    assert backend.stats.output_tokens == 18
    assert not backend.has_unfinished_requests()


def test_times_are_in_order(model):
    for output in answers(transformers(model), SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)):
        metrics = output.outputs[0].metrics
        assert 0 <= metrics.queued <= metrics.ttft <= metrics.e2e
        assert metrics.ttft + 4 * metrics.tpot <= metrics.e2e + 1e-6


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"policy": "zipage", "budget_tokens": 64}, "policy=zipage: backend=transformers keeps full KV"),
        ({"interval": 128}, "interval=128: backend=transformers has no such option; leave it out"),
        ({"load_format": "dummy"}, "backend=transformers reads folders with weights alone"),
        ({"block_size": 32}, "block_size=32: backend=transformers has no such option; leave it out"),
        ({"enforce_eager": True}, "enforce_eager=True: backend=transformers has no such option"),
    ],
)
def test_transformers_refuses_what_it_has_not(model, options, line):
    with pytest.raises(ValueError, match=line):
        transformers(model, **options)


@pytest.mark.parametrize(
    ("prompt", "options", "line"),
    [
        ([5] * 64, {}, "the prompt has 64 tokens, the model reads 64"),
        ([5], {"logprobs": True}, "sampling.logprobs=1"),
        ([5], {"logprobs": 0}, "sampling.logprobs=0"),
        ([5], {"bad_words": ["x"]}, "sampling.bad_words"),
        ([5], {"stop": ("a",)}, "sampling.stop"),
        ([5], {"budget_tokens": 64}, "keeps full KV"),
    ],
)
def test_a_refused_request_costs_itself(model, prompt, options, line):
    backend = transformers(model)
    with pytest.raises(ValueError, match=line):
        backend.add_request(prompt, SamplingParams(**options), "a")
    assert not backend.has_unfinished_requests()


# vLLM, by a stand-in


class StandIn(ModuleType):
    """The part of vLLM that the adapter touches: every request gets two tokens a sample, one a step."""

    __version__ = "0.0"

    def __init__(self) -> None:
        super().__init__("vllm")
        self.options, self.asked, self.made = {}, {}, {}
        self.SamplingParams = SimpleNamespace
        self.sampling_params = ModuleType("vllm.sampling_params")
        self.sampling_params.RequestOutputKind = SimpleNamespace(DELTA="delta")

    def LLM(self, **options):
        self.options = options
        return SimpleNamespace(llm_engine=self, get_tokenizer=lambda: "tokenizer")

    def add_request(self, request_id, prompt, params):
        self.asked[request_id] = (prompt, params)
        self.made[request_id] = 0

    def step(self):
        updates = []
        for request_id in list(self.made):
            self.made[request_id] += 1
            number, params = self.made[request_id], self.asked[request_id][1]
            end = number == 2
            reason = "length" if end else None
            outputs = [
                SimpleNamespace(index=i, token_ids=[10 * i + number], text=f"{i}{number} ", finish_reason=reason)
                for i in range(params.n)
            ]
            for output in outputs:
                output.stop_reason = None
            updates.append(SimpleNamespace(request_id=request_id, outputs=outputs, finished=end))
            if end:
                del self.made[request_id]
        return updates


@pytest.fixture
def vllm(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", stand_in.sampling_params)
    return stand_in


def test_vllm_answers_are_gathered(vllm):
    backend = BACKENDS["vllm"](model="m", device="cuda")
    steps = []
    backend.step_listeners.append(steps.append)
    outputs = answers(backend, SamplingParams(temperature=0.5, top_k=7, n=2, seed=3, stop="x", max_tokens=2))
    assert [[s.token_ids for s in output.outputs] for output in outputs] == [[[1, 2], [11, 12]]] * 3
    assert outputs[0].outputs[1].text == "11 12 "
    assert outputs[0].outputs[0].finish_reason == "length"
    assert outputs[0].metrics.output_tokens == 4
    assert outputs[0].outputs[0].metrics.ttft <= outputs[0].outputs[0].metrics.e2e
    prompt, params = vllm.asked["2"]
    assert prompt == {"prompt_token_ids": PROMPTS[2]}
    assert (params.temperature, params.top_k, params.n, params.seed, params.max_tokens) == (0.5, 7, 2, 3, 2)
    assert params.stop == ["x"]
    assert [(step.num_prefill, step.num_decode) for step in steps] == [(6, 0), (0, 6)]
    assert backend.stats.output_tokens == 12
    assert backend.get_tokenizer() == "tokenizer"


GIVEN = {"model": "m", "device": "cuda", "max_num_seqs": 9, "kv_cache_memory_bytes": 10**9}
CHOSEN = {
    "block_size": 32,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": False,
    "async_scheduling": False,
    "enforce_eager": True,
}
"""Options that vLLM has too, at other values than our defaults."""


def test_vllm_is_left_its_own_defaults(vllm):
    backend = BACKENDS["vllm"](**GIVEN, skip_tokenizer_init=True)
    assert (vllm.options["max_num_seqs"], vllm.options["kv_cache_memory_bytes"]) == (9, 10**9)
    assert vllm.options["skip_tokenizer_init"]
    assert not set(CHOSEN) & set(vllm.options)
    assert str(backend.memory_plan) == f"left to vLLM 0.0, which chooses its own {', '.join(CHOSEN)}"


@pytest.mark.parametrize("option", CHOSEN)
def test_vllm_gets_what_was_chosen(vllm, option):
    backend = BACKENDS["vllm"](**GIVEN, **{option: CHOSEN[option]})
    assert {name: vllm.options[name] for name in CHOSEN if name in vllm.options} == {option: CHOSEN[option]}
    assert option not in str(backend.memory_plan)


def test_vllm_has_blocks_of_its_own(vllm):
    blocks = GIVEN | {"kv_cache_memory_bytes": None, "num_blocks": 77}
    with pytest.raises(ValueError, match="num_blocks=77: backend=vllm has blocks of its own size"):
        BACKENDS["vllm"](**blocks)
    BACKENDS["vllm_matched"](**blocks)
    assert vllm.options["num_gpu_blocks_override"] == 77


@pytest.mark.parametrize(("given", "expected"), [(None, True), (True, True), (False, False)])
def test_matched_vllm_has_what_ours_has_on_cuda(vllm, given, expected):
    """The overlapped loop too: left out, ours is on there."""
    backend = BACKENDS["vllm_matched"](**GIVEN, **CHOSEN | {"async_scheduling": given})
    assert {name: vllm.options[name] for name in CHOSEN} == CHOSEN | {"async_scheduling": expected}
    assert str(backend.memory_plan) == "left to vLLM 0.0"


def test_vllm_refuses_what_it_has_not(vllm, monkeypatch):
    with pytest.raises(ValueError, match=r"hardware\.device=cpu: backend=vllm needs a GPU"):
        VllmBackend(model="m", device="cpu")
    with pytest.raises(ValueError, match="backend=vllm_matched keeps full KV"):
        VllmBackend(matched=True, model="m", device="cuda", policy="zipage", budget_tokens=64)
    with pytest.raises(ValueError, match="debug=True: backend=vllm has no such option; leave it out"):
        VllmBackend(model="m", device="cuda", debug=True)
    with pytest.raises(ValueError, match=r"hardware\.device=cuda:1: .* CUDA_VISIBLE_DEVICES=1"):
        VllmBackend(model="m", device="cuda:1")
    backend = VllmBackend(model="m", device="cuda")
    for options, line in (({"logprobs": True}, "sampling.logprobs"), ({"policy": "zipage"}, "keeps full KV")):
        with pytest.raises(ValueError, match=line):
            backend.add_request([1], SamplingParams(**options), "a")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="vLLM is not installed here"):
        VllmBackend(model="m", device="cuda")
