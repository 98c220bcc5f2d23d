"""What takes long for one request must not keep the others waiting."""

import gc
import threading

import pytest

from tests.serve.running import MODEL, wait_until
from zipage.serve import api as api_module
from zipage.serve import completions, schemas
from zipage.serve.errors import ApiError

BODY = {"model": MODEL, "prompt": "x=1+2", "max_tokens": 8, "seed": 1}


def test_bad_words_are_not_encoded_between_two_steps(start, monkeypatch):
    server = start()
    inputs, threads = server.engine.llm._inputs, []
    encode = inputs._encode
    monkeypatch.setattr(
        inputs, "_encode", lambda text, **kw: threads.append(threading.current_thread().name) or encode(text, **kw)
    )
    answer = server.post("/v1/completions", BODY | {"bad_words": ["12", "x="]})
    assert answer.status_code == 200
    assert len(threads) == 5  # bare and after a space, and the prompt
    assert all(name.startswith("tokenizer") for name in threads)
    server.check_empty()


def test_no_short_text_waits_for_a_long_one(start, monkeypatch):
    """Nor for what a chat template makes of one."""
    server = start()
    goes_on = threading.Event()

    def slowed(tokenize):
        def slow(given, **options):
            if len(str(given)) > 1000:
                goes_on.wait(20)
            return tokenize(given, **options)

        return slow

    for name in ("tokenize", "tokenize_chat"):
        monkeypatch.setattr(server.engine.llm, name, slowed(getattr(server.engine.llm, name)))
    text, statuses = "x" * 300_000, []
    chat = [{"role": "user", "content": text}]
    asked = ("/v1/completions", {"prompt": text}), ("/tokenize", {"prompt": text}), ("/tokenize", {"messages": chat})
    tasks = [
        threading.Thread(target=lambda path=path, body=body: statuses.append(server.post(path, body).status_code))
        for path, body in (*asked, ("/v1/chat/completions", {"messages": chat}))
    ]
    for task in tasks:
        task.start()
    try:
        wait_until(lambda: server.gate.num_inside == 4)
        short = [{"role": "user", "content": "x"}]
        assert server.post("/v1/completions", BODY, timeout=5).status_code == 200
        assert server.post("/tokenize", {"prompt": "x"}, timeout=5).status_code == 200
        assert server.post("/tokenize", {"messages": short}, timeout=5).status_code == 200
        assert server.post("/v1/chat/completions", {"messages": short, "max_tokens": 2}, timeout=5).status_code == 200
        assert not statuses
    finally:
        goes_on.set()
        for task in tasks:
            task.join(30)
    assert sorted(statuses) == [200, 200, 400, 400]
    server.check_empty()


def test_long_bodies_are_not_read_in_the_event_loop(server, monkeypatch):
    """Ten thousand messages are a good part of a second in which nobody else would get a token."""
    threads, parse = [], api_module.parse
    monkeypatch.setattr(
        api_module, "parse", lambda *args: threads.append(threading.current_thread().name) or parse(*args)
    )
    for count in (1, 10_000):
        messages = [{"role": "user", "content": ""}] * count
        assert server.post("/tokenize", {"messages": messages}).status_code == 200
    assert threads == [server._thread.name, "tokenizer of long texts_0"]


def test_too_many_prompts_are_counted_and_not_read(server, monkeypatch):
    monkeypatch.setattr(completions, "readers", None)
    error = server.post("/v1/completions", {"prompt": [[1]] * 1000}).json()["error"]
    assert error["param"] == "n"
    assert "at most 128 samples" in error["message"]


@pytest.mark.parametrize("option", [{"continue_final_message": True, "add_generation_prompt": False}, {}])
def test_a_refusal_does_not_say_the_messages_again(start, option):
    """transformers' does, and so do templates that name a role which they don't know."""
    template = (
        "{{ raise_exception('No ' + messages[0].role) if messages[0].role != 'user' }}{{ messages[0].content[:9] }}"
    )
    server = start(chat_template=template)
    long = "x" * 100_000
    messages = [{"role": "user" if option else long, "content": long}]
    answer = server.post("/v1/chat/completions", {"messages": messages} | option)
    assert answer.status_code == 400
    assert "the chat template refuses the messages" in answer.text
    assert len(answer.text) < 1000


def test_a_million_lists_are_not_searched_for_cycles_while_they_are_read(monkeypatch):
    enabled, read = [], schemas.from_json
    monkeypatch.setattr(schemas, "from_json", lambda *args, **kw: enabled.append(gc.isenabled()) or read(*args, **kw))
    schemas.parse(schemas.CompletionRequest, b'{"prompt": "x"}')
    with pytest.raises(ApiError, match="not JSON"):
        schemas.parse(schemas.CompletionRequest, b"{")
    assert enabled == [False, False]
    assert gc.isenabled()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_logprobs_are_not_written_in_the_event_loop(server, monkeypatch, path):
    """Those of long samples take seconds, in which nobody else would get a token."""
    threads, dumps = [], api_module.dumps
    monkeypatch.setattr(api_module, "dumps", lambda value: threads.append(threading.current_thread()) or dumps(value))
    body = {"max_tokens": 4, "n": 2, "logprobs": 3, "prompt": "x"}
    if "chat" in path:
        body = {"max_tokens": 4, "n": 2, "logprobs": True, "messages": [{"role": "user", "content": "x"}]}
    answer = server.post(path, body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert len(threads) == 4  # head, two choices, usage
    assert server._thread not in threads
