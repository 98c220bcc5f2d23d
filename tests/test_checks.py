"""Options of any type: each is taken as what it is declared to be, or refused by name."""

import dataclasses
from fractions import Fraction
from typing import Annotated

import numpy as np
import pytest
import torch

from tests.eviction.dense_event import dense_event, make_tokens
from tests.tiny_models import save_tiny_model
from zipage import LLM, EngineConfig, SamplingParams
from zipage.checks import at_least, check_fields, checked
from zipage.eviction import registry
from zipage.eviction.policy import Policy

MANY = [None, "8", "false", "", 8, 0, 1.5, True, float("nan"), float("inf"), 10**400, 2**63, 1e-40, b"x"]
MANY += [[1], ["x"], [None], (), {}, object(), np.int64(8), np.float32(0.5), np.bool_(True), 10**5000]

KINDS = {"policy_options": dict, "stop": tuple, "stop_token_ids": tuple}
"""Of fields whose annotation names no simple type."""


def kinds_of(options, name) -> set[type]:
    hint = next(f.type for f in dataclasses.fields(options) if f.name == name)
    declared = hint.removeprefix("Annotated[").partition(",")[0]
    return {KINDS[name]} if name in KINDS else {kind for kind in (int, float, bool, str) if kind.__name__ in declared}


def attempt(make):
    """What is made, and what a ValueError says instead; any other exception is a failure."""
    try:
        return make(), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("value", MANY, ids=lambda value: f"{type(value).__name__}")
@pytest.mark.parametrize(
    ("options", "name", "given"),
    [
        *((EngineConfig, f.name, {"model": "m"}) for f in dataclasses.fields(EngineConfig)),
        *((SamplingParams, f.name, {}) for f in dataclasses.fields(SamplingParams)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_is_of_its_type_or_refused_by_name(options, name, given, value):
    made, refusal = attempt(lambda: options(**given | {name: value}))
    if refusal:
        assert name in refusal or f"unknown policy {value!r}" in refusal
        assert "\n" not in refusal
        assert len(refusal) < 400
    else:
        result = getattr(made, name)
        assert result is None or type(result) in kinds_of(options, name)


@pytest.mark.parametrize("value", MANY, ids=lambda value: f"{type(value).__name__}")
@pytest.mark.parametrize("name", registry.POLICIES)
def test_so_is_an_option_of_a_policy(name, value):
    for option, f in registry.find(name).known_options().items():
        made, refusal = attempt(lambda option=option: registry.make(name, {option: value}))
        if refusal:
            assert f"{name}.{option}=" in refusal
        else:
            assert type(getattr(made, f.name)) is type(f.default)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 2**63}, "top_k=9223372036854775808: must be in [0, 2**31)"),
        ({"temperature": 10**400}, "temperature=1000"),
        ({"temperature": 1e7}, "must be in [0, 1000000.0]"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty=1e-46: must be in [0.001, 1000.0]"),
        ({"n": 10**9}, "n=1000000000: must be in [1, 16384]"),
        ({"logprobs": 5}, "logprobs=5: must be of type bool"),
        ({"ignore_eos": "false"}, "ignore_eos='false': must be of type bool"),
        ({"stop": ["a", ""]}, "non-empty strings"),
        ({"stop_token_ids": "12"}, "must be a list of values of type int"),
        ({"max_tokens": True}, "max_tokens=True: must be of type int"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_break_a_step_is_refused(options, message):
    with pytest.raises(ValueError, match="SamplingParams") as error:
        SamplingParams(**options)
    assert message in str(error.value)


def test_none_is_no_stop_as_in_vllm():
    params = SamplingParams(stop=None, stop_token_ids=None)
    assert (params.stop, params.stop_token_ids) == ((), ())
    assert SamplingParams(stop="END").stop == ("END",)


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 0, np.float64(1e-9), Fraction(1, 10**9)])
def test_tiny_temperatures_are_greedy(temperature):
    assert SamplingParams(temperature=temperature).temperature == 0.0


def test_numbers_of_numpy_become_pythons():
    params = SamplingParams(n=np.int64(2), temperature=np.float32(0.5), stop_token_ids=[np.int32(3)])
    assert [type(x) for x in (params.n, params.temperature, params.stop_token_ids[0])] == [int, float, int]


def test_fields_of_a_policy_may_say_their_range():
    @dataclasses.dataclass(frozen=True)
    class Options:
        width: Annotated[int, at_least(3)] = 3

    check_fields(Options())
    with pytest.raises(ValueError, match=r"mine\.width=2: must be at least 3"):
        check_fields(Options(2), "mine.")
    with pytest.raises(ValueError, match="power=inf: must be a finite number"):
        checked("power", float("inf"), float)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))
    options = {"device": "cpu", "block_size": 16, "num_blocks": 64, "skip_tokenizer_init": True, "debug": True}
    return LLM(str(folder), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 2]], [None]), r"params\[0\]=None: must be of type SamplingParams"),
        (([[1, 2]], 5), "params=5: must be of type SamplingParams, or None"),
        ((None,), "prompts=None: must be a text, a list of token ids, or a list of either"),
        ((5,), "prompts=5: must be a text"),
        ((b"12",), "prompts=b'12': must be a text"),
    ],
    ids=str,
)
def test_what_generate_is_given_is_checked_before_anything_is_queued(llm, arguments, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(*arguments, use_tqdm=False)
    assert not llm.has_unfinished_requests()


@pytest.mark.parametrize("prompt", [None, [1.5], ["x"], [True], {"a": 1}, b"12", [10**30], [-1], []], ids=str)
def test_a_prompt_that_is_none_costs_itself(llm, prompt):
    bad, good = llm.generate([prompt, [3]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert bad.error
    assert good.error is None


def test_a_request_names_registered_policies_only(llm, tmp_path, monkeypatch):
    """A place, "package.module:Class", would let whoever sends requests import any module."""
    (tmp_path / "imported_by_a_request.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (output,) = llm.generate([[1, 2]], SamplingParams(policy="imported_by_a_request:Policy"), use_tqdm=False)
    assert "unknown policy 'imported_by_a_request:Policy'; known: full, zipage" in output.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "random_attention"}, "it is policy='random' with protection='prompt'"),
        ({"tokenizer": "x"}, "LLM: vLLM's option 'tokenizer' is not supported"),
        ({"quantization": "awq"}, "vLLM's option 'quantization' is not supported"),
        ({"max_seqs": 3}, "did you mean max_num_seqs"),
    ],
)
def test_hints_lead_to_what_is_meant(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_kwargs(model="m", **options)


class Ranks(Policy):
    """Ranks with what it is given."""

    name, variant, paper = "ranks", "any", ""
    result: object = None

    def rank(self, event):
        return self.result


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "ranks.rank returned NoneType: must be a tensor of real numbers on cpu"),
        (
            torch.zeros(2, 3),
            r"rank returned shape \(2, 3\): must be \(2, 1, 2, 96\), which are layers, req",
        ),
        (torch.zeros(2, 1, 2, 96, dtype=torch.complex64), "ranks.rank returned torch.complex64 on cpu"),
        (torch.zeros(2, 1, 2, 96, device="meta"), "ranks.rank returned torch.float32 on meta"),
    ],
)
def test_a_policy_is_told_what_rank_must_return(monkeypatch, result, message):
    event = dense_event(registry.make("knorm"), [make_tokens(11)], [96])
    monkeypatch.setattr(Ranks, "result", result)
    with pytest.raises(ValueError, match=message):
        Ranks().score(event)
