"""How much to think: `reasoning_effort` and `chat_template_kwargs` as templates read them."""

import time

import pytest

from tests.serve.running import ENGINE, MODEL, REASONER, RunningServer
from zipage import LLM, SamplingParams

TEXT = "{{ messages[0].content }}\n"
SWITCH = TEXT + "{% if enable_thinking is defined and not enable_thinking %}-{% else %}+{% endif %}"
LEVELS = "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
LEVELS += TEXT + "{{ reasoning_effort }}"
BOTH = SWITCH + "{{ reasoning_effort }}"
MESSAGES = [{"role": "user", "content": "a=1"}]
EFFORT, KWARGS = "reasoning_effort", "chat_template_kwargs"


@pytest.fixture(scope="module", params=["switch", "levels", "both"])
def server(request):
    template = {"switch": SWITCH, "levels": LEVELS, "both": BOTH}[request.param]
    server = RunningServer(chat_template=template)
    server.kind = request.param
    yield server
    server.check_empty()
    server.stop()


CASES = {
    "switch": [
        ({}, "+"),
        ({EFFORT: None}, "+"),
        ({EFFORT: "none"}, "-"),
        ({KWARGS: {"enable_thinking": False}}, "-"),
        ({KWARGS: {"enable_thinking": True}}, "+"),
        ({EFFORT: "none", KWARGS: {"enable_thinking": False}}, "-"),
    ],
    "levels": [
        ({}, "medium"),
        *(({EFFORT: name}, name) for name in ("none", "minimal", "low", "medium", "high", "xhigh", "max")),
        ({KWARGS: {EFFORT: "low"}}, "low"),
        ({EFFORT: "low", KWARGS: {EFFORT: "low"}}, "low"),
    ],
    "both": [
        ({EFFORT: "low"}, "+low"),
        ({EFFORT: "none"}, "-none"),
        ({EFFORT: "high", KWARGS: {"enable_thinking": True}}, "+high"),
        ({KWARGS: {"enable_thinking": False}}, "-"),
    ],
}
REFUSALS = {
    "switch": [
        ({EFFORT: "low"}, EFFORT, "knows no levels, but reads enable_thinking: give 'none' or leave it out"),
        ({EFFORT: "none", KWARGS: {"enable_thinking": True}}, EFFORT, "has another enable_thinking: give one of them"),
        ({KWARGS: {EFFORT: "low"}}, KWARGS, "the chat template reads no 'reasoning_effort': leave it out"),
    ],
    "levels": [
        ({EFFORT: "lots"}, EFFORT, "'none', 'minimal', 'low', 'medium', 'high', 'xhigh' or 'max'"),
        ({EFFORT: "low", KWARGS: {EFFORT: "high"}}, EFFORT, "has another reasoning_effort: give one of them"),
        ({KWARGS: {"enable_thinking": False}}, KWARGS, "the chat template reads no 'enable_thinking': leave it out"),
    ],
    "both": [
        ({EFFORT: "high", KWARGS: {"enable_thinking": False}}, EFFORT, "has another enable_thinking: give one of them"),
    ],
}


def test_what_the_template_makes_of_it(server, offline):
    for options, expected in CASES[server.kind]:
        body = {"messages": MESSAGES, **options}
        made = server.post("/tokenize", body).json()["tokens"]
        assert server.post("/detokenize", {"tokens": made}).json()["prompt"] == f"a=1\n{expected}", options
    body |= {"model": MODEL, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    answer = server.post("/v1/chat/completions", body).json()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (output,) = offline.generate(f"a=1\n{expected}", params, use_tqdm=False)
    assert answer["choices"][0]["message"]["content"] == output.outputs[0].text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_what_it_can_t_read_is_refused(server, path):
    for options, param, message in REFUSALS[server.kind]:
        answer = server.post(path, {"messages": MESSAGES, **options})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), options
        assert message in error["message"]


def test_a_server_whose_template_reads_neither(start):
    server = start(chat_template=TEXT)
    answer = server.post("/v1/chat/completions", {"messages": MESSAGES, EFFORT: "none"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "reasoning_effort='none': the chat template reads no reasoning_effort: leave it out"
    )


def test_without_a_template_that_is_what_is_said(start):
    server = start()
    server.engine.llm.get_tokenizer().chat_template = None
    answer = server.post("/v1/chat/completions", {"messages": MESSAGES, EFFORT: "low"})
    assert "the tokenizer has no chat template" in answer.json()["error"]["message"]


def test_of_several_templates_the_default_one_counts(start):
    templates = {
        "default": SWITCH + "</think>",
        "rag": "{{ messages[0].content }}{{ documents }}{{ reasoning_effort }}",
    }

    def make() -> LLM:
        llm = LLM(REASONER, **ENGINE)
        llm.get_tokenizer().chat_template = templates
        return llm

    server = start(make)
    tokens = server.post("/tokenize", {"messages": MESSAGES, EFFORT: "none"}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == "a=1\n-</think>"
    for options, param in (({KWARGS: {"documents": []}}, KWARGS), ({EFFORT: "low"}, EFFORT)):
        answer = server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1, **options})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    templates["default"] += "<think>"
    options = {"messages": MESSAGES, "max_tokens": 1, "temperature": 0}
    message = server.post("/v1/chat/completions", options).json()["choices"][0]["message"]
    assert (bool(message["reasoning_content"]), message["content"]) == (True, None)


def test_a_token_of_the_tokenizer_is_not_a_request_s_to_set(start):
    server = start(chat_template="{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}")
    body = {"messages": MESSAGES * 2000, KWARGS: {"eos_token": "abc " * 10_000}}
    begin = time.monotonic()
    for path in ("/v1/chat/completions", "/tokenize"):
        error = server.post(path, body).json()["error"]
        assert error["param"] == KWARGS
        assert error["message"] == "chat_template_kwargs: eos_token is the tokenizer's to say: leave it out"
    assert time.monotonic() - begin < 5
    assert server.post("/tokenize", {"messages": MESSAGES}).status_code == 200
