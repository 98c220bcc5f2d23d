"""What vLLM's users type: it works as there, or one line says that it is not supported."""

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.tiny_models import VOCAB, save_tiny_model, save_tiny_tokenizer
from zipage import LLM, SamplingParams
from zipage.config import EngineConfig
from zipage.unsupported import CALL_OPTIONS, LLM_OPTIONS, NOTHING, PROMPT_KEYS, SAMPLING_OPTIONS

USER = {"role": "user", "content": "hi"}
RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    save_tiny_tokenizer(folder)
    return folder


def make_llm(folder, **options) -> LLM:
    return LLM(folder, device="cpu", block_size=16, num_blocks=64, max_num_seqs=8, debug=True, **options)


@pytest.fixture(scope="module")
def llm(folder):
    return make_llm(folder)


def params_of(**options) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True} | options)


def sample_of(llm, prompt=(1, 2, 3), **options):
    (output,) = llm.generate([list(prompt)], params_of(**options), use_tqdm=False)
    assert output.error is None
    return output.outputs[0]


# Calls


def test_sampling_params_and_params_are_one(llm):
    params = params_of(max_tokens=3)
    by_position, by_name, by_alias = (
        llm.generate([1, 2], params, use_tqdm=False),
        llm.generate([1, 2], sampling_params=params, use_tqdm=False),
        llm.generate([1, 2], params=params, use_tqdm=False),
    )
    assert by_position[0].outputs[0].token_ids == by_name[0].outputs[0].token_ids == by_alias[0].outputs[0].token_ids
    for call in (llm.generate, llm.add_request, llm.stream):
        with pytest.raises(ValueError, match="two names for the same"):
            call([1, 2], sampling_params=params, params=params)
    assert len(list(llm.stream([1, 2], sampling_params=params))) == 3
    llm.add_request([1, 2], sampling_params=params, request_id="x")
    while llm.has_unfinished_requests():
        outputs = llm.step()
    assert outputs[0].outputs[0].token_ids == by_name[0].outputs[0].token_ids


def test_prompts_may_be_dictionaries(llm):
    params = params_of(max_tokens=3)
    ids = llm.get_tokenizer().encode("hello")
    prompts = [{"prompt": "hello"}, {"prompt_token_ids": ids}, {"prompt": "hello", "prompt_token_ids": ids}, "hello"]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["hello", None, "hello", "hello"]
    assert {tuple(output.prompt_token_ids) for output in outputs} == {tuple(ids)}
    assert len(llm.generate({"prompt": "hello"}, params, use_tqdm=False)) == 1
    bad = [{"prompt": 5}, {}, {"prompt": "x", "multi_modal_data": {"image": 1}}, {"promt": "x"}]
    errors = [output.error for output in llm.generate(bad, params, use_tqdm=False)]
    for error, part in zip(errors, ('as "prompt"', 'as "prompt"', "multi_modal_data=.* not supported", "did you mean")):
        assert re.search(part, error)


def test_chat_is_the_template_s_text(llm):
    params = params_of(max_tokens=3)
    (one,) = llm.chat([USER], params, use_tqdm=False)
    assert one.prompt == RENDERED
    assert one.prompt_token_ids == llm.get_tokenizer().encode(RENDERED)
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    several = llm.chat([[USER], [parts], [{"role": "user", "content": [{"type": "image_url"}]}], []], params, False)
    assert [output.prompt for output in several] == [RENDERED, RENDERED, None, None]
    assert several[0].outputs[0].token_ids == several[1].outputs[0].token_ids == one.outputs[0].token_ids
    assert "not supported: messages are text" in several[2].error
    assert "no messages" in several[3].error
    (bare,) = llm.chat([USER], params, False, add_generation_prompt=False)
    assert bare.prompt == RENDERED.removesuffix("<|im_start|>assistant\n")
    template = "{{ messages[0].content }}{{ mood }}"
    (own,) = llm.chat([USER], params, False, chat_template=template, chat_template_kwargs={"mood": "!"})
    assert own.prompt == "hi!"
    for name in ("messages", "self", "tokenize", "chat_template", "add_generation_prompt"):
        with pytest.raises(ValueError, match=f"chat_template_kwargs: '{name}' is no variable of the template"):
            llm.chat([USER], params, False, chat_template_kwargs={name: "x"})
    with pytest.raises(ValueError, match="chat_template_kwargs: the chat template reads no 'mood': leave it out"):
        llm.chat([USER], params, False, chat_template_kwargs={"mood": "!"})
    (quick,) = llm.chat([USER], params, False, chat_template_kwargs={"enable_thinking": False})
    assert quick.prompt == f"{RENDERED}No thoughts.\n"
    (failed,) = llm.chat([USER], params, False, chat_template="{{ raise_exception('no') }}")
    assert "the chat template refuses the messages" in failed.error
    assert llm.chat([], params, use_tqdm=False) == []
    for messages in ("hi", USER, [5], None):
        with pytest.raises(ValueError, match=r"messages=.*: must be a list of messages"):
            llm.chat(messages, params, use_tqdm=False)


def test_chat_needs_a_template(folder):
    llm = make_llm(folder)
    llm.get_tokenizer().chat_template = None
    assert "no chat template" in llm.chat([USER], use_tqdm=False)[0].error
    bare = make_llm(folder, skip_tokenizer_init=True)
    assert "skip_tokenizer_init" in bare.chat([USER], use_tqdm=False)[0].error
    assert "use logit_bias" in bare.generate([1], SamplingParams(bad_words=["x"]), use_tqdm=False)[0].error


# What is not supported


def says(where: str, name: str) -> str:
    return rf"{where}: {name}='x' is not supported: \w"


@pytest.mark.parametrize("name", sorted(LLM_OPTIONS))
def test_an_option_of_vllms_engine_is_refused_by_name(name):
    with pytest.raises(ValueError, match=says("LLM", name)):
        LLM("m", **{name: "x"})
    for nothing in (None, False, NOTHING.get(name)):
        assert EngineConfig.from_kwargs(model="m", **{name: nothing}) == EngineConfig(model="m")


@pytest.mark.parametrize("name", sorted(SAMPLING_OPTIONS))
def test_an_option_of_vllms_sampling_is_refused_by_name(name):
    with pytest.raises(ValueError, match=says("SamplingParams", name)):
        SamplingParams(**{name: "x"})
    assert SamplingParams(**{name: None}) == SamplingParams()


@pytest.mark.parametrize("name", sorted(CALL_OPTIONS))
def test_an_argument_of_vllms_calls_is_refused_by_name(llm, name):
    calls = {"generate": ([1, 2],), "chat": ([USER],), "add_request": ([1, 2],)}
    for call, arguments in calls.items():
        with pytest.raises(ValueError, match=says(call, name)):
            getattr(llm, call)(*arguments, **{name: "x"})
    assert not llm.has_unfinished_requests()


def test_what_is_supported_is_not_listed_as_unsupported():
    assert not LLM_OPTIONS.keys() & EngineConfig.__dataclass_fields__.keys()
    assert not SAMPLING_OPTIONS.keys() & SamplingParams.__dataclass_fields__.keys()
    assert not PROMPT_KEYS.keys() & {"prompt", "prompt_token_ids"}


@pytest.mark.parametrize("options", [LLM_OPTIONS, SAMPLING_OPTIONS, CALL_OPTIONS, PROMPT_KEYS])
def test_no_refusal_sends_to_an_option_that_is_refused_too(options):
    refused = {name for name in LLM_OPTIONS | SAMPLING_OPTIONS if "_" in name}
    for name, instead in options.items():
        assert not refused & set(re.findall(r"\w+", instead)), f"{name}: {instead}"


# Options of a request


def test_spellings_of_nothing():
    params = SamplingParams(stop=None, stop_token_ids=None, bad_words=None, top_k=-1, logprobs=False)
    assert params == SamplingParams()
    assert SamplingParams(logprobs=True).logprobs == 1
    assert hash(SamplingParams(logit_bias={1: 2.0}, n=2)) == hash(SamplingParams(n=2))


def test_without_max_tokens_the_context_is_the_end(folder):
    sample = sample_of(make_llm(folder, max_model_len=32), max_tokens=None)
    assert (sample.finish_reason, len(sample.token_ids)) == ("length", 29)


def test_logprobs_are_dictionaries_by_token(llm):
    tokenizer = llm.get_tokenizer()
    for k in (0, 1, 5, 20):
        sample = sample_of(llm, temperature=1.0, seed=4, logprobs=k)
        assert len(sample.logprobs) == 20
        for token, of in zip(sample.token_ids, sample.logprobs, strict=True):
            assert next(iter(of)) == token
            assert len(of) in (max(1, k), k + 1)
            ranked = sorted(of.values(), key=lambda entry: entry.rank)
            assert [entry.rank for entry in ranked][:k] == list(range(1, k + 1))
            assert [entry.logprob for entry in ranked] == sorted((e.logprob for e in ranked), reverse=True)
            assert all(entry.decoded_token == tokenizer.decode([key]) for key, entry in of.items())
            assert math.fsum(math.exp(entry.logprob) for entry in ranked) < 1 + 1e-5
        chosen = [of[token].logprob for token, of in zip(sample.token_ids, sample.logprobs)]
        assert sample.cumulative_logprob == sum(chosen)
    assert sample_of(llm).logprobs is sample_of(llm).cumulative_logprob is None
    events = list(llm.stream([1, 2, 3], params_of(temperature=1.0, seed=4, logprobs=20)))
    assert [event.logprobs for event in events] == sample.logprobs
    assert [event.logprob for event in events] == chosen


def test_each_row_has_the_logprobs_that_it_asks_for(llm):
    params = [params_of(logprobs=k) for k in (3, None, 1)]
    three, none, one = (o.outputs[0] for o in llm.generate([[1, 2, 3]] * 3, params, use_tqdm=False))
    assert [len(of) for of in three.logprobs] == [3] * 20
    assert none.logprobs is None
    for of_three, of_one in zip(three.logprobs, one.logprobs, strict=True):
        (token, first), *_ = of_three.items()
        ((same, only),) = of_one.items()
        assert (token, first.rank, first.decoded_token) == (same, only.rank, only.decoded_token)
        assert first.logprob == pytest.approx(only.logprob, abs=1e-4)  # rows of a batch may round apart


def test_ends_of_the_text(llm):
    whole = sample_of(llm, max_tokens=40)
    stop = whole.text[10:13]
    before = sample_of(llm, max_tokens=40, stop=stop)
    behind = sample_of(llm, max_tokens=40, stop=stop, include_stop_str_in_output=True)
    assert before.text == whole.text[: whole.text.index(stop)]
    assert behind.text == before.text + stop
    assert behind.token_ids == before.token_ids
    token = whole.token_ids[6]
    ended = sample_of(llm, stop_token_ids=[token])
    told = sample_of(llm, stop_token_ids=[token], include_stop_str_in_output=True)
    assert told.text == llm.get_tokenizer().decode(ended.token_ids) != ended.text
    events = list(llm.stream([1, 2, 3], params_of(stop_token_ids=[token], include_stop_str_in_output=True)))
    assert "".join(event.text for event in events) == told.text


def test_without_detokenization_there_are_tokens_alone(llm):
    sample = sample_of(llm, detokenize=False, logprobs=1)
    assert sample.text == ""
    assert sample.token_ids == sample_of(llm).token_ids
    assert all(entry.decoded_token is None for of in sample.logprobs for entry in of.values())
    assert all(event.text == "" for event in llm.stream([1, 2, 3], params_of(detokenize=False)))


@pytest.mark.parametrize("overlaps", [False, True])
def test_min_tokens_puts_every_end_off(folder, overlaps):
    llm = make_llm(folder, async_scheduling=overlaps)
    free = sample_of(llm).token_ids
    ended = sample_of(llm, stop_token_ids=free[3:4])
    late = sample_of(llm, stop_token_ids=free[3:4], min_tokens=12)
    assert len(ended.token_ids) <= 4
    assert free[3] not in late.token_ids[:12]
    text = sample_of(llm).text
    early, sample = sample_of(llm, stop=text[0]), sample_of(llm, stop=text[0], min_tokens=12)
    assert (early.text, len(early.token_ids)) == ("", 1)
    assert len(sample.token_ids) > 12
    assert sample.text.startswith(text[0])
    assert text.startswith(sample.text)


def test_bias_and_bad_words(llm):
    free = sample_of(llm).token_ids
    banned = sample_of(llm, logit_bias={free[0]: -100.0}).token_ids
    assert free[0] not in banned
    assert sample_of(llm, logit_bias={7: 100.0}).token_ids == [7] * 20
    text = sample_of(llm).text
    word = text.lstrip()[:1] or text[:1]
    sample = sample_of(llm, bad_words=[word])
    (bad,) = llm.get_tokenizer().encode(word)
    assert bad in free
    assert bad not in sample.token_ids
    pair = llm.get_tokenizer().decode(free[4:6])
    first, second = llm.get_tokenizer().encode(pair)[:2]
    tokens = sample_of(llm, bad_words=[pair]).token_ids
    assert (first, second) not in list(pairwise(tokens))
    (output,) = llm.generate([[1]], SamplingParams(logit_bias={VOCAB: 1}), use_tqdm=False)
    assert f"logit_bias: {VOCAB} is outside the vocabulary" in output.error


@pytest.mark.parametrize("overlaps", [False, True])
def test_penalties_survive_preemption_and_leave_the_neighbours_alone(folder, overlaps):
    asking = {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.1, "bad_words": ["a"]}
    params = [params_of(max_tokens=60, **(asking if i % 2 else {})) for i in range(6)]
    prompts = [[i, i + 1, i + 2] * 5 for i in range(6)]
    roomy, tight = make_llm(folder), make_llm(folder, async_scheduling=overlaps, max_model_len=128)
    alone = [roomy.generate([p], q, use_tqdm=False)[0].outputs[0].token_ids for p, q in zip(prompts, params)]
    assert [o.outputs[0].token_ids for o in tight.generate(prompts, params, use_tqdm=False)] == alone
    assert len(set(alone[1])) > len(set(sample_of(roomy, prompts[1], max_tokens=60).token_ids))


# Outputs


def test_outputs_and_metrics_have_vllms_names(llm):
    (output,) = llm.generate([[1, 2, 3]], params_of(n=2), use_tqdm=False)
    assert output.finished is True
    assert all(sample.finished() for sample in output.outputs)
    assert output.num_cached_tokens == output.metrics.cached_tokens
    metrics = output.outputs[0].metrics
    times = [getattr(metrics, name) for name in ("arrival_time", "first_scheduled_time", "first_token_time")]
    assert times == sorted(times)
    assert metrics.first_token_time <= metrics.last_token_time == metrics.finished_time == metrics.last_token_ts
    assert (metrics.arrival_time, metrics.scheduled_ts) == (metrics.queued_ts, metrics.first_scheduled_time)
    assert metrics.time_in_queue == metrics.queued
    assert metrics.first_token_latency == metrics.ttft
    assert metrics.num_generation_tokens == 20
    (refused,) = llm.generate([[]], use_tqdm=False)
    assert refused.finished
    assert refused.metrics.first_token_time is None


def test_the_page_names_every_option():
    page = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
    for options in (LLM_OPTIONS, SAMPLING_OPTIONS, CALL_OPTIONS, PROMPT_KEYS):
        for name, instead in options.items():
            rows = [line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line]
            assert any(f"not supported: {instead}" in row for row in rows), name
    for name in (*EngineConfig.__dataclass_fields__, *SamplingParams.__dataclass_fields__):
        assert f"`{name}`" in page
