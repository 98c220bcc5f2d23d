"""Every option of engine, request and policy: a value of the wrong type or outside its range is a ValueError that names
the option, and what is accepted works."""

import math
import types
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from tests.calibrations import CALIBRATED, MADE_UP
from tests.eviction.dense_event import dense_event, make_tokens
from tests.tiny_models import VOCAB, save_tiny_model, save_tiny_tokenizer
from zipage import LLM, EngineConfig, SamplingParams
from zipage.checks import at_least, checked, closest, shown
from zipage.eviction import registry
from zipage.eviction.policy import Policy

INF = math.inf
SHIPPED = [name for name, place in registry.POLICIES.items() if isinstance(place, str)]
JUNK = [
    *(None, True, False, 0, 1, -1, 8, 2**31, 2**63, -(2**63) - 1, 10**400, 10**5000),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e-46, 1e-40, 1e-300, 1e39, 1e308, INF, -INF, math.nan),
    *("", "8", "0.5", "false", "full", "sink:4", "nothing", "cpu", "\ud800", b"full", b"", [], [1], ["a"], [None], ()),
    *({}, {"a": 1}, {1: 2}, set(), object(), object, int, len, 1j, torch.tensor(1), torch.tensor(0.5), torch.float32),
    *(np.int64(8), np.uint8(8), np.float32(0.5), np.float64(INF), np.bool_(True), np.array(8), np.array([8, 8])),
    *(Path("full"), range(3), "sink:" + "9" * 5000, [2**80], [True], [1.5], "stop"),
]


def is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, exactly: a bool is no int, an int no float."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(is_of(value, kind) for kind in arguments)
    if origin is tuple:
        return type(value) is tuple and all(is_of(item, arguments[0]) for item in value)
    if origin is not None:
        return isinstance(value, origin)
    return type(value) is hint and not (hint is float and not math.isfinite(np.float32(value)))


def tried(make, *names: str):
    """What `make` accepts of `JUNK`. What it refuses is a ValueError of one short line that holds one of `names`."""
    for junk in JUNK:
        try:
            yield make(junk)
        except ValueError as error:
            message = str(error)
            assert any(name in message for name in names), message
            assert "\n" not in message
            assert len(message) < 500


@pytest.mark.parametrize("name", [f.name for f in fields(SamplingParams)])
def test_options_of_a_request(name):
    hint = get_type_hints(SamplingParams)[name]
    for params in tried(lambda junk: SamplingParams(**{name: junk}), f"SamplingParams.{name}="):
        assert is_of(getattr(params, name), hint)


@pytest.mark.parametrize("policy", ["full", "random"])
@pytest.mark.parametrize("name", [f.name for f in fields(EngineConfig)])
def test_options_of_the_engine(name, policy):
    good = {"model": "m", "policy": policy, "budget_tokens": 1024}
    also = {"policy": "policy '", "policy_options": "policy 'random': unknown option", "protection": "sink:"}
    also |= dict.fromkeys(("budget_tokens", "recent_tokens"), "recent=")
    hint = get_type_hints(EngineConfig)[name]
    for config in tried(lambda junk: EngineConfig.from_kwargs(**good | {name: junk}), f"{name}=", also.get(name, name)):
        value = getattr(config, name)
        assert is_of(value, hint) or (name == "policy_options" and value == {})


OPTIONS = [(name, option) for name in SHIPPED for option in registry.find(name).known_options()]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_options_of_a_policy(name, option):
    policy = registry.find(name)
    field = policy.known_options()[option].name
    hint = get_type_hints(policy)[field]
    given = MADE_UP if name in CALIBRATED else {}
    for make in (lambda x: registry.make(name, given | {option: x}), lambda x: policy(**given | {field: x})):
        for made in tried(make, f"{name}.{option}=", f"{name}.{option}: give the calibration file"):
            assert is_of(getattr(made, field), hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 2**63}, "top_k=9223372036854775808: must be an integer of 64 bits"),
        ({"temperature": 10**400}, "must be a finite number of at most 3.4e"),
        ({"temperature": 1e39}, "temperature=1e\\+39: must be a finite number"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty=1e-46: must be in"),
        ({"repetition_penalty": 1e38}, "repetition_penalty=1e\\+38: must be in"),
        ({"n": 10**8}, "n=100000000: must be in \\[1, 16384\\]"),
        ({"logprobs": 21}, r"logprobs=21: must be in \[0, 20\], or None"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens=4: must be at most max_tokens=3"),
        ({"detokenize": False, "stop": "x"}, "detokenize=False: stop=.* needs the text; use stop_token_ids"),
        ({"presence_penalty": 2.1}, r"presence_penalty=2.1: must be in \[-2, 2\]"),
        ({"logit_bias": {"a": 1}}, "logit_bias={'a': 1}: each key must be an integer, or None"),
        ({"temprature": 1}, "unknown option 'temprature'; did you mean temperature"),
        ({"ignore_eos": "false"}, "ignore_eos='false': must be True or False"),
        ({"temperature": None}, "temperature=None: must be a number"),
        ({"stop": ["a", ""]}, r"stop=\['a', ''\]: each item must be a text that is not empty"),
        ({"stop_token_ids": [True]}, r"stop_token_ids=\[True\]: each item must be an integer"),
        ({"seed": 1.0}, "seed=1.0: must be an integer, or None"),
    ],
    ids=str,
)
def test_what_is_said_of_a_request(options, message):
    with pytest.raises(ValueError, match=f"SamplingParams.*{message}"):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("budgt_tokens", "budget_tokens"),
        ("budget", "budget_tokens"),
        ("budgets", "budget_tokens"),
        ("max-len", "max_model_len"),
        ("tokens_budget", "budget_tokens"),
        ("tokens", None),  # of which there are two
        ("budget_blocks", None),
        ("", None),
        ("_", None),
    ],
)
def test_a_slip_of_the_pen_or_some_of_the_words_tell_what_was_meant(name, meant):
    assert closest(name, ["recent_tokens", "budget_tokens", "max_model_len", "max_num_seqs"]) == meant


def test_none_is_no_stop_and_numpys_scalars_are_python_s():
    params = SamplingParams(stop=None, stop_token_ids=None)
    assert (params.stop, params.stop_token_ids) == ((), ())
    params = SamplingParams(
        n=np.int32(2), temperature=np.float32(0.5), top_p=1, seed=np.uint64(7), stop_token_ids=np.array([3, 4])
    )
    kinds = [type(value) for value in (params.n, params.temperature, params.top_p, params.seed)]
    assert kinds == [int, float, float, int]
    assert params.stop_token_ids == (3, 4)
    assert SamplingParams(stop="END").stop == SamplingParams(stop=["END"]).stop == ("END",)
    assert EngineConfig(model=Path("folder")).model == "folder"


def test_tiny_temperatures_are_greedy():
    assert SamplingParams(temperature=1e-40) == SamplingParams(temperature=0) == SamplingParams(temperature=9e-6)
    assert SamplingParams(temperature=1e-5).temperature == 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokeniser": "x"}, "unknown option 'tokeniser'; known: model, "),
        ({"tokenizer": "x"}, "tokenizer='x' is not supported: the tokenizer is the model folder's own"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' is not supported: the KV cache has the model's dtype"),
        ({"max_num_seq": 8}, "did you mean max_num_seqs"),
        ({"policy": "random_attention"}, "it is policy='random' with protection='prompt'"),
        ({"policy": "os:system"}, "system must be a subclass of zipage.eviction.policy.Policy"),
        ({"policy": "zipage.eviction.policy:Policy"}, "Policy must be a subclass .* and implements rank"),
        ({"policy": "tests.test_checks:Nameless"}, "sets name, variant and paper"),
        ({"policy": ".:x"}, "cannot be loaded"),
        (
            {"policy": "zipage", "budget_tokens": 512, "policy_options": {"tau": INF}},
            "zipage.tau=inf: must be a finite",
        ),
        (
            {"policy": "zipage", "budget_tokens": 512, "policy_options": {"tau": 1e-46}},
            "must be positive, at least 1.2e",
        ),
        ({"policy_options": {1: 2}}, "policy_options={1: 2}: each key must be a text"),
        ({"device": "cuda:x"}, "device='cuda:x': must be auto, cpu, cuda or cuda:N"),
        ({"layer_stride": 1.5}, "layer_stride=1.5: must be an integer, or None"),
        ({"model": None}, "model=None: must be a text"),
    ],
    ids=str,
)
def test_what_is_said_of_the_engine(options, message):
    with pytest.raises(ValueError, match=message):
        LLM(**{"model": "m"} | options)


class Nameless(Policy):
    def rank(self, event):
        return event.slots


@dataclass(frozen=True, kw_only=True)
class Own(Policy):
    """A user's policy, whose `__post_init__` hides the base's."""

    name: ClassVar[str] = "own"
    variant: ClassVar[str] = "own"
    paper: ClassVar[str] = ""

    power: float = 1.0
    kind: Literal["a", "b"] = "a"
    width: Annotated[int, at_least(2)] | None = None
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._require("power", self.power >= 0, "at least 0")

    def rank(self, event):
        return event.slots


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": "2"}, "own.power='2': must be a number"),
        ({"power": INF}, "own.power=inf: must be a finite number"),
        ({"power": -1}, "own.power=-1.0: must be at least 0"),
        ({"kind": "c"}, "own.kind='c': must be one of a, b"),
        ({"width": 1}, "own.width=1: must be at least 2, or None"),
        ({"sizes": 3}, "own.sizes=3: must be a list"),
    ],
    ids=str,
)
def test_a_policy_of_ones_own_is_checked_by_its_annotations(options, message):
    with pytest.raises(ValueError, match=message):
        registry.make("tests.test_checks:Own", options)
    good = registry.make("tests.test_checks:Own", {"power": 2, "kind": "b", "width": None, "sizes": [1, 2]})
    assert (good.power, good.sizes) == (2.0, (1, 2))


def test_what_no_check_knows_is_taken_as_it_is():
    assert checked("x", len, Any) is len
    assert checked("x", [1], list[str]) == [1]
    with pytest.raises(ValueError, match="x=5: must be a list"):
        checked("x", 5, list[str])


# What is accepted costs no neighbour.

EXTREMES = [
    {"temperature": 1e-5},
    {"temperature": 3e38},
    {"temperature": 3e38, "top_k": 3},
    {"temperature": 1e-5, "repetition_penalty": 1e-6},
    {"temperature": 1e-5, "repetition_penalty": 1e6, "top_p": 0.5},
    {"top_k": 2**63 - 1},
    {"top_p": 1e-300},
    {"min_p": 1e-300},
    {"min_p": 1.0},
    {"top_k": 1, "top_p": 1e-46, "min_p": 1.0, "repetition_penalty": 1e6},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"n": 20},
    {"max_tokens": 2**63 - 1, "stop_token_ids": list(range(300))},
    {"stop": ["x" * 100_000, "\ud800", "\ufffd"], "logprobs": True},
    {"budget_tokens": 2**63 - 1},
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))
    save_tiny_tokenizer(folder)
    options = {"block_size": 16, "num_blocks": 256, "max_num_seqs": 64, "debug": True, "seed": 2**63 - 1}
    return LLM(folder, device="cpu", policy="random", budget_tokens=32, recent_tokens=4, **options)


@pytest.mark.parametrize("options", EXTREMES, ids=lambda options: str(options)[:60])
def test_what_is_accepted_costs_no_neighbour(llm, options):
    neighbour = SamplingParams(temperature=1.0, max_tokens=12, seed=5, ignore_eos=True)
    alone = llm.generate([[1, 2, 3]], neighbour, use_tqdm=False)[0].outputs[0].token_ids
    extreme = SamplingParams(**{"max_tokens": 12} | options)
    before, asked, after = llm.generate([[1, 2, 3], [4, 5], [1, 2, 3]], [neighbour, extreme, neighbour], use_tqdm=False)
    assert asked.error is None
    assert all(sample.finish_reason in ("stop", "length") for sample in asked.outputs)
    assert before.outputs[0].token_ids == after.outputs[0].token_ids == alone


@pytest.mark.parametrize("options", [{"temperature": 1e-40}, {"temperature": 1e-5, "seed": 3}])
def test_the_coldest_draws_are_greedy(llm, options):
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    cold = SamplingParams(max_tokens=30, ignore_eos=True, **options)
    first, second = llm.generate([[1, 2, 3]] * 2, [greedy, cold], use_tqdm=False)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 2]], [None]), r"sampling_params\[0\]=None: must be a SamplingParams"),
        (([[1, 2]], 5), "sampling_params=5: must be a SamplingParams, or None"),
        (([[1, 2]], {}), "sampling_params={}: must be a SamplingParams, or None"),
        ((None,), "prompts=None: must be a text, a list of token ids, or a list of either"),
        ((5,), "prompts=5: must be a text"),
        ((b"12",), "prompts=b'12': must be a text"),
        ((np.array(5),), "prompts=array.5.: must be a text"),
    ],
    ids=str,
)
def test_what_generate_is_given_is_checked_before_anything_is_queued(llm, arguments, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(*arguments, use_tqdm=False)
    assert not llm.has_unfinished_requests()


@pytest.mark.parametrize("prompt", [None, [1.5], ["x"], [True], {"a": 1}, b"12", [10**5000], [-1], []], ids=shown)
def test_a_prompt_that_is_none_costs_itself(llm, prompt):
    bad, good = llm.generate([prompt, [3]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert bad.error
    assert good.error is None


@pytest.mark.parametrize(
    "options", [{"sampling_params": {}}, {"sampling_params": "x"}, {"request_id": 5}, {"request_id": b"x"}], ids=str
)
def test_what_add_request_is_given_is_named(llm, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        llm.add_request([1], **options)
    assert not llm.has_unfinished_requests()


def test_a_stop_token_outside_the_vocabulary_is_refused(llm):
    (output,) = llm.generate([[1]], SamplingParams(stop_token_ids=[VOCAB]), use_tqdm=False)
    assert f"stop_token_ids: {VOCAB} is outside the vocabulary of {VOCAB}" in output.error


def test_a_request_names_registered_policies_only(llm, tmp_path, monkeypatch):
    """A place, "package.module:Class", would let whoever sends requests import any module."""
    (tmp_path / "imported_by_a_request.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (output,) = llm.generate([[1, 2]], SamplingParams(policy="imported_by_a_request:Policy"), use_tqdm=False)
    assert "must be the name of a registered policy" in output.error


# What a policy hands over is checked too.


class Ranks(Policy):
    """Ranks with what it is given, and stores what it is given."""

    name, variant, paper = "ranks", "any", ""
    result: object = None
    stored: object = None

    @property
    def state(self):
        return self.stored is not None

    def rank(self, event):
        if isinstance(self.stored, torch.Tensor):
            event.store(self.stored)
        return self.result


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (None, "None"),
        ([1.0], r"\[1.0\]"),
        (torch.zeros(2, 3), r"one of torch.float32 \[2, 3\] on cpu"),
        (torch.zeros(2, 1, 2, 1, 96), r"one of torch.float32 \[2, 1, 2, 1, 96\] on cpu"),
        (torch.zeros(2, 1, 2, 96, dtype=torch.complex64), "one of torch.complex64"),
        (torch.zeros(2, 1, 2, 96, device="meta"), "one of torch.float32 .* on meta"),
    ],
    ids=["none", "list", "shape", "dimensions", "complex", "device"],
)
def test_a_policy_is_told_what_rank_must_return(monkeypatch, result, found):
    what = r"a real tensor \[L, R, H, N\] = \[2, 1, 2, 96\] on cpu, or one that broadcasts to it, not "
    event = dense_event(registry.make("knorm"), [make_tokens(11)], [96])
    monkeypatch.setattr(Ranks, "result", result)
    with pytest.raises(ValueError, match=f"ranks: rank must return {what}{found}"):
        Ranks().score(event)
    monkeypatch.setattr(Ranks, "stored", torch.zeros(3, 96))
    with pytest.raises(ValueError, match=f"event.store takes {what}one of torch.float32"):
        Ranks().score(event)


def test_a_policy_with_state_must_store_one(monkeypatch):
    event = dense_event(registry.make("knorm"), [make_tokens(11)], [96])
    monkeypatch.setattr(Ranks, "result", event.slots)
    assert Ranks().score(event).dtype == torch.float32
    monkeypatch.setattr(Ranks, "stored", "promised")
    with pytest.raises(ValueError, match=r"ranks: has state, so rank must hand the new one to event\.store"):
        Ranks().score(event)
