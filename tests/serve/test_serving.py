"""What a server must bear: full queues, wrong keys, clients that leave, signals, and an engine that fails."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest

from tests.experiments.running.forked import Forked, ForkedPython
from tests.serve.running import ENGINE, MODEL, POLICY, REASONER, answers, free_port, snapshots, wait_until
from zipage import LLM, SamplingParams, processes
from zipage.config import EngineConfig
from zipage.serve import server as server_module
from zipage.serve.cli import serve
from zipage.serve.config import ServeConfig
from zipage.serve.generation import Generation

pytestmark = pytest.mark.usefixtures("forked_children")

ROOT = Path(__file__).parents[2]
BODY = {"model": MODEL, "prompt": "x=1+2", "max_tokens": 8, "seed": 1}
LONG = {"model": MODEL, "prompt": "x=1+2", "max_tokens": 400, "extra_body": {"ignore_eos": True}}


def llm_of(**options) -> LLM:
    return LLM(REASONER, **ENGINE | POLICY | options)


# Limits


def test_a_full_queue_refuses(start):
    server = start(lambda: llm_of(max_num_seqs=1), max_queue=1)
    with server.client() as client:
        running = client.completions.create(**LONG, stream=True)
        next(iter(running))
        waiting = client.completions.create(**BODY, stream=True)
        wait_until(lambda: server.metric("vllm:num_requests_waiting") == 1)
        with pytest.raises(openai.RateLimitError, match="1 samples wait already") as caught:
            client.completions.create(**BODY)
        assert caught.value.response.headers["Retry-After"] == "1"
        assert (caught.value.code, caught.value.type) == ("queue_full", "rate_limit_error")
        running.close()
        assert len(list(waiting)) > 1
        assert len(client.completions.create(**BODY, n=3).choices) == 3  # alone it may wait for itself
    server.check_empty()


def test_a_burst_on_an_idle_server_takes_the_free_places(start):
    server = start(lambda: llm_of(max_num_seqs=4), max_queue=2)

    async def burst() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=BODY) for _ in range(12)))
        return sorted(answer.status_code for answer in answers)

    codes = asyncio.run(burst())
    assert codes.count(200) >= 6
    assert set(codes) <= {200, 429}
    server.check_empty()


def test_keys(start):
    server = start(api_key=["one", "two", "schlüssel"])
    for key in ("one", "two"):
        assert server.client(key).models.list().data
    headers = {"Authorization": "Bearer schlüssel".encode()}
    assert server.http.get("/v1/models", headers=headers).status_code == 200
    for key in ("x", "three", "one,two", "on", "ö"):
        for call in (server.http.get, server.http.post):
            headers = {"Authorization": f"Bearer {key}".encode()}
            response = call("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
    assert server.post("/tokenize", {"prompt": "x"}).status_code == 401
    assert server.http.get("/v1/models", headers={"Authorization": "Basic one"}).status_code == 401
    assert [server.http.get(path).status_code for path in ("/health", "/version", "/metrics")] == [200] * 3


def test_a_key_of_the_environment(start, monkeypatch):
    monkeypatch.setenv("ZIPAGE_API_KEY", "secret")
    server = start()
    assert server.client("secret").models.list().data
    with pytest.raises(openai.AuthenticationError):
        server.client("other").models.list()


def test_large_bodies_are_not_read(start):
    server = start(max_body_bytes=1000)
    assert server.post("/v1/completions", BODY).status_code == 200
    for content in (b"x" * 1001, iter([b"x" * 600] * 2)):
        response = server.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert "--max-body-bytes" in response.json()["error"]["message"]


def test_max_n(start):
    server = start(max_n=3)
    assert server.post("/v1/completions", BODY | {"n": 3}).status_code == 200
    for more in ({"n": 4}, {"prompt": ["x", "y"], "n": 2}):
        error = server.post("/v1/completions", BODY | more).json()["error"]
        assert error["param"] == "n"
        assert "at most 3 samples" in error["message"]


# Clients that leave


def test_clients_that_leave_at_random_leave_nothing_behind(server):
    rng = random.Random(0)
    places = asyncio.Semaphore(24)
    answered: list[int] = []

    async def visit(client: httpx.AsyncClient, number: int) -> None:
        async with places:
            await look_in(client, number)

    async def look_in(client: httpx.AsyncClient, number: int) -> None:
        chat = rng.random() < 0.5
        body = {"model": MODEL, "n": rng.choice([1, 1, 2]), "stream": rng.random() < 0.7, "max_tokens": 12}
        body |= {"messages": [{"role": "user", "content": f"a={number}"}]} if chat else {"prompt": f"a={number}"}
        path, patience, most = f"/v1/{'chat/' * chat}completions", rng.random(), rng.randrange(6)
        try:
            async with asyncio.timeout(patience), client.stream("POST", path, json=body) as response:
                assert response.status_code == 200
                answered.append(number)
                async for _ in response.aiter_lines():
                    most -= 1
                    if most < 0:
                        break
        except TimeoutError:
            pass

    async def visit_all() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            await asyncio.gather(*(visit(client, number) for number in range(200)))

    asyncio.run(visit_all())
    assert len(answered) > 50
    server.check_empty()
    assert server.metric("zipage:kv_blocks_used") == 0
    assert not [one for one in _alive(Generation) if not one._is_complete and not one.is_gone]
    assert server.post("/v1/completions", BODY).status_code == 200


def _alive(kind: type) -> list:
    import gc

    return [one for one in gc.get_objects() if isinstance(one, kind)]


def test_a_client_that_leaves_while_it_waits_is_forgotten(start):
    server = start(lambda: llm_of(max_num_seqs=1))
    with server.client() as client:
        running = client.completions.create(**LONG, stream=True)
        next(iter(running))
        with pytest.raises(httpx.ReadTimeout):
            server.post("/v1/completions", BODY, timeout=0.3)
        wait_until(lambda: server.metric("vllm:num_requests_waiting") == 0)
        assert not server.is_empty
        running.close()
    server.check_empty()


# What else it tells


def test_tokens_there_and_back(server, offline):
    ids = offline.tokenize("x=1+2").token_ids
    answer = server.post("/tokenize", {"prompt": "x=1+2", "return_token_strs": True}).json()
    assert answer == {"count": 5, "max_model_len": 512, "tokens": ids, "token_strs": list("x=1+2")}
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": "x=1+2"}
    messages = [{"role": "user", "content": "x"}]
    assert server.post("/tokenize", {"messages": messages}).json()["tokens"] == offline.tokenize_chat(messages)[1]


def test_metrics_count_what_was_served(server):
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_count")
    names += ("vllm:inter_token_latency_seconds_count", "vllm:e2e_request_latency_seconds_count")
    before = [server.metric(name) for name in names]
    body = BODY | {"ignore_eos": True}
    server.post("/v1/completions", body)
    server.post("/v1/completions", body | {"stream": True})
    after = [server.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after)] == [10, 16, 2, 7, 2]
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.metric("zipage:kv_blocks_total") == 128
    assert "version" in server.http.get("/version").json()


def test_times_count_from_when_a_body_was_there(start, monkeypatch):
    """Not from when its prompt was tokenized, and the engine had ended the step under way."""
    server = start()
    tokenize = server.engine.llm.tokenize
    monkeypatch.setattr(server.engine.llm, "tokenize", lambda prompt: time.sleep(0.5) or tokenize(prompt))
    for number, stream in enumerate((False, True), 1):
        assert server.post("/v1/completions", BODY | {"stream": stream}).status_code == 200
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert server.metric(f"vllm:{name}_seconds_count") == number
            assert 0.5 * number <= server.metric(f"vllm:{name}_seconds_sum") < 5


@pytest.mark.parametrize("replicas", [2, 1])
def test_engines_in_other_processes_serve(start, replicas):
    """Two replicas, or one core that is apart."""
    options = {"data_parallel_size": replicas, "policy": "full", "budget_tokens": None}
    server = start(lambda: server_module.LLMApart(REASONER, **ENGINE | options))
    params = SamplingParams(max_tokens=8, seed=1)
    with server.client() as client:
        running = client.completions.create(**LONG, stream=True)
        name = f"{next(iter(running)).id}-0"
        (told,) = snapshots(server, 1)
        assert [(row["id"], row["status"]) for row in told["requests"]] == [(name, "running")]
        assert told["blocks"]["total"] == replicas * ENGINE["num_blocks"]
        held = server.http.get(f"/live/requests/{name}/held").json()
        assert (held["status"], held["layers"], held["heads"]) == ("running", 8, 2)
        texts = [client.completions.create(**BODY).choices[0].text for _ in range(2)]
        running.close()
    server.check_empty()
    (output,) = LLM(REASONER, **ENGINE).generate("x=1+2", params, use_tqdm=False)
    assert texts == [output.outputs[0].text] * 2


# Its end


def test_what_runs_longer_than_the_grace_is_aborted(start):
    server = start(shutdown_grace=0.1)
    statuses = []
    whole = threading.Thread(target=lambda: statuses.append(server.post("/v1/completions", WHOLE).status_code))
    with server.client() as client:
        stream = client.completions.create(**LONG, stream=True)
        whole.start()
        next(iter(stream))
        wait_until(lambda: server.gate.num_inside == 2)
        server.server._running_loop.call_soon_threadsafe(server.server.drain)
        *_, last = stream
        assert last.choices[0].finish_reason == "abort"
    whole.join()
    assert statuses == [503]


WHOLE = {"model": MODEL, "prompt": "x", "max_tokens": 400, "ignore_eos": True}


def test_an_engine_that_fails(start):
    server = start()
    server.engine.has_failed = lambda: None  # stays, to be asked
    statuses = []
    whole = threading.Thread(target=lambda: statuses.append(server.post("/v1/completions", WHOLE)))
    with server.client() as client:
        stream = client.completions.create(**LONG, stream=True)
        whole.start()
        next(iter(stream))
        wait_until(lambda: server.gate.num_inside == 2)
        server.engine.llm._core.runner.launch = _break
        with pytest.raises(openai.APIError, match=r"the engine has failed: .*it broke"):
            list(stream)
        whole.join()
        assert statuses[0].status_code == 500
        assert statuses[0].json()["error"] | {"message": ""} == {
            "message": "",
            "type": "server_error",
            "param": None,
            "code": "engine_failed",
        }
        response = server.http.get("/health")
        assert response.status_code == 503
        assert "it broke" in response.json()["error"]["message"]
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**BODY)


def _break(plan):
    raise RuntimeError("it broke")


def test_a_killed_process_of_the_engine(start):
    server = start(lambda: server_module.LLMApart(REASONER, **ENGINE))
    server.engine.has_failed = lambda: None
    (replica,) = server.engine.llm._core._replicas
    with server.client() as client:
        stream = client.completions.create(**LONG, stream=True)
        next(iter(stream))
        os.kill(replica.child.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match=r"the engine has failed: .*the engine's process died \(signal 9\)"):
            list(stream)
    assert server.http.get("/health").status_code == 503


def test_a_failed_engine_is_an_exit_status(monkeypatch):
    made = []
    monkeypatch.setattr(server_module, "LLM", lambda **options: made.append(LLM(**options)) or made[-1])
    monkeypatch.setattr(server_module, "SWITCH", sys.getswitchinterval())
    codes, port = [], free_port()
    config = ServeConfig(port=port), EngineConfig(model=REASONER, **ENGINE)
    thread = threading.Thread(target=lambda: codes.append(server_module.run(*config[::-1])))
    thread.start()
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: answers(url))
    made[0]._core.runner.launch = _break
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 500
    thread.join(10)
    assert codes == [1]


def test_an_address_that_is_taken_is_an_exit_status(monkeypatch, caplog):
    monkeypatch.setattr(server_module, "LLM", None)  # the address comes before the model
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert server_module.run(EngineConfig(model=REASONER), ServeConfig(port=port)) == 1
    assert f"port={port}: " in caplog.text


def test_a_template_that_is_no_jinja_is_an_exit_status(caplog, monkeypatch):
    monkeypatch.setattr(server_module, "SWITCH", sys.getswitchinterval())
    config = ServeConfig(port=0, chat_template="{{ messages")
    assert server_module.run(EngineConfig(model=REASONER, **ENGINE), config) == 1
    assert "chat_template='{{ messages': is no Jinja template: line 1: " in caplog.text


def started(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "zipage.serve", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def serve_with_forked_engines() -> int:
    processes.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": ForkedPython})
    return serve()


def forked(arguments: list[str]) -> Forked:
    return Forked(serve_with_forked_engines, [*arguments, "--engine-process"])


@pytest.mark.parametrize("program", [started, forked], ids=["thread", "process"])
def test_a_signal_drains_the_program(program):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    given = [REASONER, "--port", str(port), "--device", "cpu", "--block-size=16", "--num_blocks=64"]
    process = program([*given, "--no-access-log", "--served-model-name", MODEL])
    try:
        wait_until(lambda: process.poll() is not None or answers(url), 60)
        body = WHOLE | {"max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: not answers(url))
            assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 503
            chunks = [first, *filter(None, lines)]
        assert chunks[-1] == "data: [DONE]"
        assert len(chunks) == 61
        assert json.loads(chunks[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(10) == 0
    finally:
        process.kill()
