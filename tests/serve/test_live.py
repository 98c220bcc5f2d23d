"""What the server shows of itself, whom it shows it to, and what that costs."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.serve.running import ENGINE, MODEL, POLICY, REASONER, RunningServer, events, snapshots, wait_until
from zipage import LLM
from zipage.eviction import registry
from zipage.serve import live as live_module
from zipage.serve.live import entry_map, excerpt, most_interesting
from zipage.stats import HeldEntries, RequestState

LONG = {"model": MODEL, "prompt": "x=1+2", "max_tokens": 400, "ignore_eos": True, "stream": True}


@contextmanager
def running(server: RunningServer, **fields) -> Iterator[str]:
    """A long request; the engine's id of it. It ends at the end."""
    with server.http.stream("POST", "/v1/completions", json=LONG | fields) as response:
        lines = response.iter_lines()
        yield f"{json.loads(next(lines).removeprefix('data: '))['id']}-0"


def shades(told: dict) -> np.ndarray:
    held = np.frombuffer(base64.b64decode(told["held"]), np.uint8)
    return held.reshape(told["layers"] * told["heads"], told["columns"])


# Snapshots


def test_the_text_grows_and_the_cache_does_not(server):
    with running(server, protection="sink:4") as name:
        wait_until(lambda: server.engine.view.stats.compressions_applied > 0)
        first, *_, last = snapshots(server, 5)
    (before,), (after,) = first["requests"], last["requests"]
    assert (after["id"], after["index"], after["prompt"], after["prompt_tokens"]) == (name, 0, "x=1+2", 5)
    assert (after["policy"], after["budget_tokens"], after["protected"]) == ("r_kv", 64, 4)
    assert after["max_tokens"] == 405
    assert after["tokens"] - before["tokens"] > 20
    assert 64 <= before["entries"] <= 80 >= after["entries"] >= 64
    assert after["compressions"] > before["compressions"] >= 1
    assert last["compressions"] > first["compressions"]
    assert last["entries_evicted"] - first["entries_evicted"] == 16 * (last["compressions"] - first["compressions"])
    assert last["output_tokens"] - first["output_tokens"] == after["tokens"] - before["tokens"]
    assert last["time"] - first["time"] > 0.9
    assert last["blocks"] | {"cached": 0} == {"used": after["blocks"], "total": 128, "cached": 0}
    assert sum(last["counts"].values()) == 1
    assert last["num_more"] == 0


def test_about_is_what_a_page_must_know_to_ask(server):
    with server.http.stream("GET", "/live") as response:
        name, about = next(events(response))
    assert (name, about["model"], about["max_model_len"]) == ("about", MODEL, 512)
    assert about["has_text"]
    assert about["has_template"]
    assert (about["policy"], about["budget_tokens"], about["protection"]) == ("r_kv", 64, "none")
    assert {"full", "r_kv", "random"} <= set(about["policies"])
    for policy in about["policies"]:
        body = {"prompt": "x=1", "max_tokens": 2, "policy": policy, "budget_tokens": 512}  # which all can use
        assert server.post("/v1/completions", body).status_code == 200, policy
    for policy in registry.POLICIES.keys() - about["policies"]:
        body = {"prompt": "x", "policy": policy, "budget_tokens": 512}
        assert server.post("/v1/completions", body).status_code == 400, policy


def state(name: str, tokens: int, status: str = "running") -> RequestState:
    return RequestState(name, 0, status, 1, tokens, 100, tokens, 1, "full", None, 0, 0, 0, 0)


def test_the_longest_are_the_most_interesting():
    states = [
        state("w1", 90, "waiting"),
        state("a", 5),
        state("b", 70),
        state("w2", 3, "waiting"),
        state("p", 9, "paused"),
    ]
    assert [s.request_id for s in most_interesting(states, None, 4)] == ["b", "p", "a", "w1"]
    assert [s.request_id for s in most_interesting(states, "w2", 3)] == ["w2", "b", "p"]


def test_more_run_than_are_shown(server, monkeypatch):
    monkeypatch.setattr(live_module, "MOST_ROWS", 2)
    with running(server, n=3) as first, running(server) as second:
        (told,) = snapshots(server, 1, watch=second)
        assert [row["id"] for row in told["requests"]] == [second, first]
        assert told["num_more"] == 2
        assert sum(told["counts"].values()) == 4


def test_prompts_are_shown_in_short():
    assert excerpt("a\n  b") == "a b"
    text = "".join(f"{number:04}" for number in range(10_000))
    assert excerpt(text) == f"{text[:40]} … {text[-80:]}"
    assert excerpt("x" * 123) == "x" * 123


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"api_key": ["one"]}, True),
        ({"api_key": ["one", "two"]}, False),
        ({"api_key": ["one", "two"], "show_prompts": True}, True),
        ({"api_key": ["one"], "show_prompts": False}, False),
    ],
    ids=str,
)
def test_prompts_are_not_shown_to_other_users(start, config, shown):
    server = start(**config)
    server.http.headers["Authorization"] = "Bearer one"
    with running(server):
        (told,) = snapshots(server, 1)
        assert told["requests"][0]["prompt"] == ("x=1+2" if shown else None)
        assert told["requests"][0]["prompt_tokens"] == 5
    server.http.headers.pop("Authorization")
    for path in ("/live", "/live/requests/x/held"):
        assert server.http.get(path).status_code == 401
    assert server.http.get("/").status_code == 200


# What heads hold


def test_a_map_of_what_each_head_holds(server):
    with running(server) as name:
        whole = server.http.get(f"/live/requests/{name}/held").json()
        assert (shades(whole)[:, : whole["entries"]] == 255).all(), "nothing is evicted yet"
        wait_until(lambda: server.engine.view.stats.output_tokens and rounds(server, name) > 2)
        wait_until(lambda: server.http.get(f"/live/requests/{name}/held?columns=512").json()["held"] is not None)
        told = server.http.get(f"/live/requests/{name}/held?columns=512").json()
        coarse = server.http.get(f"/live/requests/{name}/held?columns=10").json()
    assert (told["id"], told["index"], told["status"], told["prompt_tokens"]) == (name, 0, "running", 5)
    assert (told["layers"], told["heads"], told["columns"]) == (8, 2, told["tokens"])
    assert 64 <= told["entries"] <= 80 < told["tokens"]
    assert set(np.unique(shades(told))) == {0, 255}
    assert ((shades(told) == 255).sum(axis=1) == told["entries"]).all(), "as many in each head"
    assert (shades(told) != shades(told)[0]).any(), "not the same in each head"
    if coarse["held"] is not None:
        assert coarse["columns"] <= 10
        assert coarse["positions_per_column"] * coarse["columns"] >= coarse["tokens"]
        assert {0, 255} < set(np.unique(shades(coarse)))


def rounds(server: RunningServer, name: str) -> int:
    (told,) = snapshots(server, 1, watch=name)
    return told["requests"][0]["compressions"]


def test_shares_of_a_column():
    positions = np.array([[[0, 1, 2, 3, 9], [0, 4, 5, 8, 9]]], dtype=np.int32)
    told = entry_map(HeldEntries(3, 10, positions), most=3)
    assert (told["columns"], told["positions_per_column"], told["entries"]) == (3, 4, 5)
    assert shades(told).tolist() == [[255, 0, 128], [64, 128, 255]]
    one_of_many = entry_map(HeldEntries(1, 10_000, np.array([[[7]]], dtype=np.int32)), most=1)
    assert shades(one_of_many).tolist() == [[1]], "what is there is never nothing"
    all_but_one = entry_map(HeldEntries(1, 10_000, np.arange(9_999, dtype=np.int32)[None, None]), most=1)
    assert shades(all_but_one).tolist() == [[254]]
    none = entry_map(HeldEntries(1, 5, np.zeros((1, 2, 0), dtype=np.int32)), most=8)
    assert shades(none).tolist() == [[0] * 5] * 2


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("{name}/held?index=-1", 400, "index"),
        ("{name}/held?index=x", 400, "index"),
        ("{name}/held?columns=0", 400, "columns"),
        ("{name}/held?columns=1025", 400, "columns"),
        ("{name}/held?columns=%C2%B2", 400, "columns"),
        ("{name}/held?columns=" + "1" * 5000, 400, "columns"),
        ("{name}", 404, None),
    ],
)
def test_what_cannot_be_read(server, path, status, param):
    with running(server) as name:
        response = server.http.get(f"/live/requests/{path.format(name=name)}")
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
    assert len(response.json()["error"]["message"]) < 200


def test_a_request_that_has_ended_or_never_was_has_no_map(server):
    with running(server) as name:
        for who, index in (("nobody", 0), (name, 1)):
            answer = server.http.get(f"/live/requests/{who}/held?index={index}").json()
            assert answer == {"id": who, "index": index, "status": None, "held": None}
    server.check_empty()
    assert server.http.get(f"/live/requests/{name}/held?columns=7").json()["status"] is None


def test_a_request_that_waits_has_no_map(start):
    server = start(lambda: LLM(REASONER, **ENGINE | POLICY | {"max_num_seqs": 1}))
    with running(server):
        whole = threading.Thread(target=lambda: server.post("/v1/completions", LONG | {"max_tokens": 2}))
        whole.start()
        wait_until(lambda: server.engine.view.stats.num_waiting == 1)
        (told,) = snapshots(server, 1)
        waiting = told["requests"][1]
        assert (waiting["status"], waiting["entries"], told["counts"]["waiting"]) == ("waiting", 0, 1)
        answer = server.http.get(f"/live/requests/{waiting['id']}/held").json()
        assert answer == {"id": waiting["id"], "index": 0, "status": "waiting", "held": None}
    whole.join()


# What it costs


class Counted:
    """Calls of an engine's methods that look at what runs."""

    def __init__(self, server: RunningServer, monkeypatch, delay: float = 0.0) -> None:
        self.snapshots = self.reads = 0
        llm = server.engine.llm
        look, read = llm.snapshot, llm.held_entries

        def snapshot():
            self.snapshots += 1
            time.sleep(delay)
            return look()

        def held_entries(*request):
            self.reads += 1
            return read(*request)

        monkeypatch.setattr(llm, "snapshot", snapshot)
        monkeypatch.setattr(llm, "held_entries", held_entries)


def test_a_server_that_nobody_watches_does_not_look(server, monkeypatch):
    counted = Counted(server, monkeypatch)
    server.http.get("/")
    server.post("/v1/completions", LONG | {"stream": False, "max_tokens": 40})
    snapshots(server, 1)
    seen = counted.snapshots
    assert (seen, counted.reads) == (1, 0)
    server.post("/v1/completions", LONG | {"stream": False, "max_tokens": 100})
    wait_until(lambda: server.gate.num_inside == 0)
    time.sleep(2 * live_module.EVERY)
    assert (counted.snapshots, counted.reads) == (seen, 0), "whoever watched is gone"


def test_many_who_watch_share_what_is_read(server, monkeypatch):
    with running(server) as name:
        counted, begin = Counted(server, monkeypatch), time.monotonic()
        threads = [threading.Thread(target=snapshots, args=(server, 4)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        most = (time.monotonic() - begin) / (0.9 * live_module.EVERY) + 1
        assert 3 <= counted.snapshots <= most
        begin = time.monotonic()
        for _ in range(20):
            assert server.http.get(f"/live/requests/{name}/held?columns=64").status_code == 200
        passed = time.monotonic() - begin
        assert 1 <= counted.reads <= passed / live_module.READ_EVERY + 1


def test_an_engine_that_is_busy_holds_up_nobody_else(server, monkeypatch):
    Counted(server, monkeypatch, delay=0.5)
    watching = threading.Thread(target=snapshots, args=(server, 2))
    watching.start()
    times = []
    while watching.is_alive():
        begin = time.monotonic()
        assert server.http.get("/health").status_code == 200
        times.append(time.monotonic() - begin)
    assert len(times) > 10
    assert max(times) < 0.3


def test_so_many_may_watch(server, monkeypatch):
    monkeypatch.setattr(live_module, "MOST_WATCHERS", 1)
    with server.http.stream("GET", "/live") as response:
        told = events(response)
        next(told)
        with server.http.stream("GET", "/live") as refused:
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "5")
    wait_until(lambda: may_watch(server))


def may_watch(server: RunningServer) -> bool:
    with server.http.stream("GET", "/live") as response:
        return response.status_code == 200


# The end


def test_whoever_watches_does_not_hold_up_the_end(start):
    server = start(shutdown_grace=30)
    with server.http.stream("GET", "/live") as response:
        told = events(response)
        next(told)
        begin = time.monotonic()
        server.server._running_loop.call_soon_threadsafe(server.server.drain)
        for _ in told:
            pass
    wait_until(lambda: server.server.should_exit)
    assert time.monotonic() - begin < 5


def test_an_engine_that_failed_is_not_watched(start):
    server = start()
    server.engine.has_failed = lambda: None  # stays, to be asked
    with server.http.stream("GET", "/live") as response:
        told = events(response)
        next(told)
        server.engine.llm._core.runner.launch = None
        assert server.post("/v1/completions", LONG | {"stream": False}).status_code == 500
        for _ in told:
            pass
    for path in ("/live", "/live/requests/x/held"):
        with server.http.stream("GET", path) as refused:
            assert refused.status_code == 503
            assert json.loads(refused.read())["error"]["code"] == "engine_failed"
