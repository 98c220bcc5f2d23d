"""A server in this process: uvicorn in a thread, the shipped reasoner on a CPU."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from zipage import LLM
from zipage.serve.app import create_app
from zipage.serve.config import ServeConfig
from zipage.serve.engine import Engine
from zipage.serve.server import Server

REASONER = str(Path(__file__).parents[2] / "models" / "zipage-reasoner")
ENGINE = {"device": "cpu", "block_size": 16, "num_blocks": 128, "max_num_seqs": 8, "max_model_len": 512}
POLICY = {"policy": "r_kv", "budget_tokens": 64}
MODEL = "reasoner"


class RunningServer:
    """Serves until it is stopped.

    Args:
        make: builds the engine.
        config: of the server.
    """

    def __init__(self, make: Callable[[], LLM] | None = None, **config: Any) -> None:
        self.engine = Engine(make or (lambda: LLM(REASONER, **ENGINE, **POLICY)))
        self.engine.start()
        self.config = ServeConfig(**{"served_model_name": [MODEL], "access_log": False} | config)
        sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self.gate = create_app(self.engine, self.config)
        self.server = Server(self.gate, self.engine, self.config)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]}, daemon=True)
        self._thread.start()
        wait_until(lambda: self.server.started)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        return float(re.search(rf"^{name}{{[^}}]*}} (\S+)$", text, flags=re.MULTILINE)[1])

    @property
    def is_empty(self) -> bool:
        """Whether no trace of a request is left."""
        engine, stats = self.engine, self.engine.view.stats
        left = [engine._requests, engine.llm._outputs.unfinished, engine.llm._outputs.done, engine._num_pending]
        left += [stats.blocks_used, stats.num_running, stats.num_waiting, self.gate.num_inside, engine.llm._events]
        left += [observe.__self__._seen for observe in engine.observers]
        return not any(left)

    def check_empty(self) -> None:
        wait_until(lambda: self.is_empty)

    def stop(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self._thread.join(10)
        self.engine.stop()
        assert not self._thread.is_alive()


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def answers(url: str) -> bool:
    """Without httpx, which prepares for TLS each time: 24 ms that a server that starts beside us lacks."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def events(response: httpx.Response) -> Iterator[tuple[str, dict]]:
    """Of `/live`: name and data. Dropping the iterator closes the response."""
    name = "message"
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)
            name = "message"


def snapshots(server: RunningServer, count: int, watch: str | None = None) -> list[dict]:
    """The first ones that somebody gets who begins to watch."""
    with server.http.stream("GET", "/live", params={} if watch is None else {"watch": watch}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        told = events(response)
        assert next(told)[0] == "about"
        return [next(told)[1] for _ in range(count)]
