"""What no request may be: each is refused with a 4xx in OpenAI's format that names the field."""

import json
import time

import pytest

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
USER = {"role": "user", "content": "1+2"}

NOT_JSON = [
    b"",
    b"{",
    b"[1]",
    b"null",
    b'"text"',
    b'{"prompt": NaN}',
    b'{"prompt": "\xff"}',
    b"[" * 100_000,
    b'{"prompt": "\\ud800"}',
]

COMPLETION_FIELDS = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": ["x", 1]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [10_000]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": "x" * 600}, "prompt"),
    ({"model": 5}, "model"),
    ({"n": 0}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"n": 129}, "n"),
    ({"n": 10**30}, "n"),
    ({"prompt": ["x"] * 129}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 1025}, "stop"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"stop_token_ids": [99_999]}, "stop_token_ids"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"bad_words": [""]}, "bad_words"),
    ({"budget_tokens": 0}, "budget_tokens"),
    ({"budget_tokens": 16}, "budget_tokens"),
    ({"policy": "r_kvv"}, "policy"),
    ({"policy": "examples.my_policy:MyPolicy"}, "policy"),
    ({"policy": "zipage"}, "policy"),
    ({"policy": "page_random"}, "policy"),
    ({"protection": "sink:0"}, "protection"),
    ({"protection": "sink:60"}, "protection"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"guided_json": {}}, "guided_json"),
    ({"temprature": 1}, "temprature"),
    ({"messages": [USER]}, "messages"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"forced_token_ids": [1]}, "forced_token_ids"),
    ({"return_hidden_states": True}, "return_hidden_states"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
]
CHAT_FIELDS = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [USER, {"role": 5, "content": "x"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "extra": 1}]}, "messages[0]"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0]"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    ({"prompt": "x"}, "prompt"),
    ({"logprobs": 2}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"reasoning_effort": "none"}, "reasoning_effort"),
    ({"reasoning_effort": "hard"}, "reasoning_effort"),
    ({"reasoning_effort": 3}, "reasoning_effort"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"add_generation_prompt": "no"}, "add_generation_prompt"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    *(
        ({"chat_template_kwargs": {name: "x"}}, "chat_template_kwargs")
        for name in ("self", "messages", "conversation", "chat_template", "tokenize", "return_tensors", "truncation")
    ),
]
OTHERS = [
    (TOKENIZE, {}, "prompt"),
    (TOKENIZE, {"prompt": "x", "messages": [USER]}, "prompt"),
    (TOKENIZE, {"prompt": 5}, "prompt"),
    (TOKENIZE, {"prompt": "x", "reasoning_effort": "low"}, "reasoning_effort"),
    (TOKENIZE, {"messages": [USER], "reasoning_effort": "low"}, "reasoning_effort"),
    (TOKENIZE, {"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    (DETOKENIZE, {}, "tokens"),
    (DETOKENIZE, {"tokens": ["a"]}, "tokens"),
    (DETOKENIZE, {"tokens": [99_999]}, "tokens"),
]
BODIES = [
    *((COMPLETIONS, body and {"prompt": "x"} | body, field) for body, field in COMPLETION_FIELDS),
    *((CHAT, body and {"messages": [USER]} | body, field) for body, field in CHAT_FIELDS),
    *OTHERS,
]


def error_of(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    return error


def test_there_are_fifty():
    assert len(BODIES) + len(NOT_JSON) > 50


@pytest.mark.parametrize("raw", NOT_JSON, ids=lambda raw: repr(raw[:20]))
def test_a_body_that_is_no_object(server, raw):
    response = server.http.post(COMPLETIONS, content=raw, headers={"Content-Type": "application/json"})
    error = error_of(response)
    assert "the body" in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("path", "body", "field"), BODIES, ids=lambda value: str(value)[:60])
def test_a_field_that_is_wrong_is_named(server, path, body, field):
    response = server.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert field.partition("[")[0].rpartition(".")[2] in error["message"] or field in ("messages", "prompt")


LARGE = [
    (COMPLETIONS, {"prompt": "x", "stop": [1] * 1_000_000}, "stop"),
    (COMPLETIONS, {"prompt": "x", "stop_token_ids": [""] * 1_000_000}, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(300_000)), "")}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "policy": "a" * 4_000_000}, "policy"),
    (COMPLETIONS, {"prompt": "x", "a" * 4_000_000: 1}, "a" * 100),
    (COMPLETIONS, {"prompt": "x", "model": "a" * 4_000_000}, "model"),
    (COMPLETIONS, {"prompt": [1.5] * 700_000}, "prompt"),
    (CHAT, {"messages": [1] * 1_000_000}, "messages"),
    (TOKENIZE, {"messages": [1] * 1_000_000}, "messages"),
    (DETOKENIZE, {"tokens": [""] * 1_000_000}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "field"), LARGE, ids=[f"{path}, {field[:20]}" for path, _, field in LARGE])
def test_a_large_body_that_is_wrong_costs_little(server, path, body, field):
    """It is read in the event loop, where all others wait."""
    content = json.dumps(body, separators=(",", ":"))
    begin = time.process_time()
    response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    spent = time.process_time() - begin
    assert error_of(response, 404 if field == "model" else 400)["param"] == field
    assert len(response.content) < 1000
    assert spent < 1.5, "seconds of the CPU"


def test_a_slip_of_the_pen_is_answered_with_what_was_meant(server):
    error = error_of(server.post(COMPLETIONS, {"prompt": "x", "budget_token": 32}))
    assert error["message"] == "the body: unknown field 'budget_token'; did you mean budget_tokens?"
    error = error_of(server.post(COMPLETIONS, {"prompt": "x", "policy": "streamin"}))
    assert "did you mean 'streaming'?" in error["message"]


def test_values_that_ask_for_nothing_are_taken(server):
    nothing = {"best_of": 1, "echo": False, "suffix": None, "user": "me", "n": None, "stop": None, "logit_bias": None}
    assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1} | nothing).status_code == 200
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}
    nothing |= {"service_tier": "auto", "parallel_tool_calls": True, "top_logprobs": None, "functions": None}
    answer = server.post(CHAT, {"messages": [USER], "max_completion_tokens": 1} | nothing)
    assert answer.status_code == 200, answer.text


def test_too_long_prompts_have_openai_s_code(server):
    assert error_of(server.post(COMPLETIONS, {"prompt": "x" * 600}))["code"] == "context_length_exceeded"


def test_media_types_methods_and_paths(server):
    error_of(server.http.post(COMPLETIONS, content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    error_of(server.http.get(COMPLETIONS), 405)
    assert error_of(server.http.get("/v1/embeddings"), 404)["type"] == "not_found_error"
