"""OpenAI's own client against the shipped reasoner: what it gets is what `LLM` gives."""

import json
import math

import openai
import pytest

from tests.serve.running import MODEL, wait_until
from zipage import Logprob, SamplingParams
from zipage.serve import logprobs

PROMPT = "x=1+2"
MESSAGES = [{"role": "user", "content": "a=3+4\nb=a*2\nb?"}]


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(model=MODEL, prompt=prompt, **{"seed": 3, "max_tokens": 8} | options)


def chat(client, messages=MESSAGES, **options):
    options = {"seed": 3, "max_completion_tokens": 8} | options
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def generate(llm, prompt=PROMPT, **options):
    (output,) = llm.generate(prompt, SamplingParams(**{"seed": 3, "max_tokens": 8} | options), use_tqdm=False)
    assert output.error is None
    return output


def joined(chunks) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
    return texts


# The same tokens as offline


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, {}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"extra_body": {"top_k": 3}}, {"top_k": 3}),
        ({"extra_body": {"min_p": 0.2}}, {"min_p": 0.2}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": -1.0}, {"frequency_penalty": -1.0}),
        ({"extra_body": {"repetition_penalty": 1.3}}, {"repetition_penalty": 1.3}),
        ({"logit_bias": {"7": 100}}, {"logit_bias": {7: 100}}),
        ({"extra_body": {"bad_words": ["s"]}}, {"bad_words": ["s"]}),
        ({"extra_body": {"min_tokens": 6}}, {"min_tokens": 6}),
        ({"n": 3}, {"n": 3}),
        ({"stop": "s"}, {"stop": "s"}),
        ({"stop": ["w", "ss"]}, {"stop": ["w", "ss"]}),
        ({"stop": "s", "extra_body": {"include_stop_str_in_output": True}},
         {"stop": "s", "include_stop_str_in_output": True}),
        ({"extra_body": {"stop_token_ids": [28]}}, {"stop_token_ids": [28]}),
        ({"logit_bias": {"1": 100}, "extra_body": {"ignore_eos": True, "skip_special_tokens": False}},
         {"logit_bias": {1: 100}, "ignore_eos": True, "skip_special_tokens": False}),
    ],
    ids=lambda value: json.dumps(value, default=str)[:40],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_completion_is_that_of_generate(client, offline, asked, options, stream):
    output = generate(offline, **options)
    answer = complete(client, stream=stream, **asked)
    if stream:
        chunks = list(answer)
        assert joined(chunks) == {sample.index: sample.text for sample in output.outputs}
        ends = [choice for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    else:
        assert [choice.text for choice in answer.choices] == [sample.text for sample in output.outputs]
        ends = answer.choices
        assert answer.usage.completion_tokens == output.metrics.output_tokens
    told = {choice.index: (choice.finish_reason, choice.stop_reason) for choice in ends}
    assert told == {sample.index: (sample.finish_reason, sample.stop_reason) for sample in output.outputs}


def test_token_ids_are_a_prompt(client, offline):
    ids = offline.tokenize(PROMPT).token_ids
    assert complete(client, ids).choices[0].text == complete(client).choices[0].text


def test_several_prompts_with_several_samples(client, offline):
    prompts = [PROMPT, "a=3*3\n"]
    expected = [sample.text for prompt in prompts for sample in generate(offline, prompt, n=2).outputs]
    answer = complete(client, prompts, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == sum(len(offline.tokenize(prompt).token_ids) for prompt in prompts)
    ids = [offline.tokenize(prompt).token_ids for prompt in prompts]
    assert joined(complete(client, ids, n=2, stream=True)) == dict(enumerate(expected))


def test_seeds_repeat_and_differ(client):
    texts = [complete(client, seed=seed, max_tokens=16).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_default_is_sixteen_tokens_of_a_completion(client):
    assert client.completions.create(model=MODEL, prompt=PROMPT).usage.completion_tokens <= 16


# Chat


def test_a_chat_is_that_of_chat(client, offline):
    (output,) = offline.chat(MESSAGES, SamplingParams(seed=3, max_tokens=8, n=2), use_tqdm=False)
    answer = chat(client, n=2)
    assert answer.object == "chat.completion"
    assert [choice.message.content for choice in answer.choices] == [sample.text for sample in output.outputs]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    chunks = list(chat(client, n=2, stream=True))
    assert joined(chunks) == {sample.index: sample.text for sample in output.outputs}
    roles = [(choice.index, choice.delta.role) for chunk in chunks for choice in chunk.choices if choice.delta.role]
    assert sorted(roles) == [(0, "assistant"), (1, "assistant")]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_chat_goes_to_its_own_end(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 16


def test_an_answer_of_the_client_is_a_message(client):
    message = chat(client, temperature=0).choices[0].message
    again = chat(client, [*MESSAGES, message, *MESSAGES])
    assert again.usage.prompt_tokens > 2 * len(MESSAGES[0]["content"])
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    assert chat(client, parts, temperature=0).choices[0].message.content == message.content


def test_the_final_message_is_continued(client, offline):
    messages = [*MESSAGES, {"role": "assistant", "content": "b="}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    (output,) = offline.chat(messages, SamplingParams(seed=3, max_tokens=8), use_tqdm=False, **options)
    assert chat(client, messages, extra_body=options).choices[0].message.content == output.outputs[0].text


def test_max_tokens_is_the_old_name(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3)
    assert answer.usage.completion_tokens == 3


def test_a_stopped_chat_stream(client):
    whole = chat(client, stop="=", max_completion_tokens=40).choices[0]
    chunks = list(chat(client, stop="=", max_completion_tokens=40, stream=True))
    assert joined(chunks) == {0: whole.message.content}
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


# Usage and log-probabilities


def test_usage_ends_a_stream_where_asked_for(client):
    chunks = list(complete(client, n=2, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    usage, whole = chunks[-1].usage, complete(client, n=2).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert all(chunk.usage is None for chunk in complete(client, stream=True))


def test_usage_comes_with_every_chunk_where_asked_for(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True, "stream": True, "stream_options": options}
    lines = server.post("/v1/completions", body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    counts = [json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"] for line in lines[:-2]]
    assert counts == [1, 2, 3, 4, 5, 5]


def test_cached_tokens_of_a_repeated_prompt(client):
    prompt = "".join(f"{name}=1+2\n" for name in "abcdefgh")
    complete(client, prompt)
    details = complete(client, prompt).usage.prompt_tokens_details
    assert details.cached_tokens == 32
    chunks = list(complete(client, prompt, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 32


def test_logprobs_of_a_completion(client, offline):
    sample = generate(offline, logprobs=2).outputs[0]
    scores = complete(client, logprobs=2).choices[0].logprobs
    tokens = [next(iter(of.values())) for of in sample.logprobs]
    assert scores.tokens == [one.decoded_token for one in tokens]
    assert scores.token_logprobs == pytest.approx([one.logprob for one in tokens], abs=1e-4)
    assert [set(top) for top in scores.top_logprobs] == [
        {one.decoded_token for one in of.values()} for of in sample.logprobs
    ]
    assert scores.text_offset == list(range(len(tokens)))
    streamed = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=2, stream=True)]
    for name in ("tokens", "text_offset"):
        assert [value for one in streamed for value in getattr(one, name)] == getattr(scores, name)
    assert complete(client).choices[0].logprobs is None


def test_logprobs_of_a_chat(client):
    content = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert len(token.top_logprobs) == 3
        assert [one.logprob for one in token.top_logprobs] == sorted(
            [o.logprob for o in token.top_logprobs], reverse=True
        )
        assert token.bytes == list(token.token.encode())
    chunks = [choice for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True) for choice in chunk.choices]
    streamed = [token for choice in chunks if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]
    alone = chat(client, logprobs=True).choices[0].logprobs.content
    assert [token.top_logprobs for token in alone] == [[]] * 8


def test_no_probability_is_json():
    tokens = [{5: Logprob(-math.inf, 9, "a"), 6: Logprob(0.0, 1, "b")}]
    of_completion, of_chat = logprobs.of_completion(tokens, 1), logprobs.of_chat(tokens, 1)
    assert of_completion["token_logprobs"] == [of_chat["content"][0]["logprob"]] == [-9999.0]
    assert of_completion["top_logprobs"] == [{"a": -9999.0, "b": 0.0}]
    assert [one["token"] for one in of_chat["content"][0]["top_logprobs"]] == ["b"]
    assert logprobs.of_completion([], 1)["text_offset"] == []


# Budgets


def evicted(server) -> float:
    wait_until(lambda: server.is_empty)
    return server.metric("zipage:entries_evicted_total")


@pytest.mark.parametrize(
    ("asked", "binds"),
    [
        ({}, False),
        ({"budget_tokens": 32}, True),
        ({"budget_tokens": 32, "policy": "random"}, True),
        ({"budget_tokens": 32, "policy": "streaming", "protection": "sink:2"}, True),
        ({"budget_tokens": 32, "protection": "prompt"}, True),
        ({"budget_tokens": 32, "policy": "full"}, False),
    ],
    ids=str,
)
def test_budget_policy_and_protection_of_a_request(server, client, offline, asked, binds):
    before = evicted(server)
    answer = complete(client, max_tokens=48, extra_body={"ignore_eos": True} | asked)
    assert (evicted(server) > before) == binds
    output = generate(offline, max_tokens=48, ignore_eos=True, **asked)
    assert (output.metrics.compressions > 0) == binds
    assert answer.choices[0].text == output.outputs[0].text


# Errors and aborts


@pytest.mark.parametrize(
    ("options", "error", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"extra_body": {"policy": "h2o"}}, openai.BadRequestError, "policy"),
        ({"extra_body": {"policy": "os:path"}}, openai.BadRequestError, "policy"),
        ({"extra_body": {"budget_tokens": 16}}, openai.BadRequestError, "budget_tokens"),
        ({"extra_body": {"protection": "all"}}, openai.BadRequestError, "protection"),
        ({"prompt": "x" * 512}, openai.BadRequestError, "prompt"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
    ],
    ids=str,
)
def test_errors_name_the_field(client, options, error, param):
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": MODEL, "prompt": PROMPT} | options)
    assert caught.value.param == param
    assert caught.value.message


@pytest.mark.parametrize("kind", [complete, chat])
def test_leaving_a_stream_returns_its_blocks(server, client, kind):
    aborted = server.metric("zipage:requests_aborted_total")
    options = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    options |= {} if kind is complete else {"max_completion_tokens": 400}
    stream = kind(client, n=2, stream=True, **options)
    next(iter(stream))
    assert not server.is_empty
    stream.close()
    server.check_empty()
    assert server.metric("zipage:requests_aborted_total") == aborted + 1


def test_a_bad_request_touches_no_other(client, offline):
    stream = complete(client, stream=True, max_tokens=30, extra_body={"ignore_eos": True})
    first = next(iter(stream)).choices[0].text
    with pytest.raises(openai.BadRequestError):
        complete(client, extra_body={"policy": "nothing"})
    with pytest.raises(openai.BadRequestError):
        complete(client, ["x", "x", "y" * 600])
    expected = generate(offline, max_tokens=30, ignore_eos=True).outputs[0].text
    assert first + joined(stream)[0] == expected


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == (MODEL, 512)
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
