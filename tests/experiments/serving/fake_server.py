"""A server of the OpenAI interface with known delays: in a thread, or as a program (`python -m ... PORT JSON`)."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fake:
    """What it does.

    Attributes:
        first, step: seconds to the first chunk once a request runs, and between chunks.
        tokens: in each chunk.
        slots: requests that run at once; the others wait.
        dies_after: requests that it answers before the process ends.
        status: of every answer.
        ids, continuous: say in each chunk how many tokens it brings, as token ids or as the usage so far.
        stuck: aborted requests go on running.
    """

    first: float = 0.02
    step: float = 0.01
    tokens: int = 1
    slots: int = 1000
    dies_after: int | None = None
    status: int = 200
    ids: bool = False
    continuous: bool = False
    stuck: bool = False
    unready: bool = False
    port: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    gone: int = 0
    running: int = 0
    waiting: int = 0
    made: int = 0

    def start(self) -> None:
        """In a thread."""
        ready = threading.Event()

        async def run() -> None:
            self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
            await self._listen()
            ready.set()
            await self._end.wait()
            self._server.close()

        self._thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        self._thread.start()
        assert ready.wait(5)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(5)

    async def _listen(self) -> None:
        self._free = asyncio.Semaphore(self.slots)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1000)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            path = head.split()[1]
            if path.startswith("/v1"):
                length = int(head.partition("content-length: ")[2].split()[0])
                await self._complete(json.loads(await reader.readexactly(length)), reader, writer)
            else:
                status = 503 if self.unready else 200
                writer.write(f"HTTP/1.1 {status} X\r\n\r\n{self._metrics() if path == '/metrics' else ''}".encode())
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _metrics(self) -> str:
        labels = '{engine="0",model_name="bench"}'
        return (
            f"# HELP x y\nvllm:num_requests_running{labels} {self.running}\nvllm:num_requests_waiting{labels} "
            f"{self.waiting}\nvllm:generation_tokens_total{labels} {self.made}\nvllm:num_preemptions_total{labels} 0\n"
        )

    async def _complete(self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(body)
        if self.dies_after is not None and len(self.asked) > self.dies_after:
            print("RuntimeError: the fake is dead", flush=True)
            os._exit(3)
        if self.status != 200:
            error = json.dumps({"error": {"message": "too many requests", "code": "queue_full"}})
            writer.write(f"HTTP/1.1 {self.status} No\r\nContent-Length: {len(error)}\r\n\r\n{error}".encode())
            return
        answering = asyncio.ensure_future(self._answer(body, writer))
        leaving = asyncio.ensure_future(reader.read(1))
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            self.gone += 1
            if self.stuck:
                await answering
            answering.cancel()
        leaving.cancel()

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            fields = b"Content-Type: text/event-stream\r\nConnection: close\r\nTransfer-Encoding: chunked"
            writer.write(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\n")
            common = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "bench"}
            given = {"prompt_tokens": len(body["prompt"])}
            made, due = 0, time.monotonic() + self.first
            while made < body["max_tokens"]:
                await asyncio.sleep(due - time.monotonic())
                due += self.step
                new = min(self.tokens, body["max_tokens"] - made)
                made, self.made = made + new, self.made + new
                choice = {"index": 0, "text": "x"} | ({"token_ids": [1] * new} if self.ids else {})
                usage = given | {"completion_tokens": made} if self.continuous else None
                writer.write(chunk(common | {"choices": [choice], "usage": usage}))
            usage = given | {"completion_tokens": made, "total_tokens": made + given["prompt_tokens"]}
            writer.write(chunk(common | {"choices": [], "usage": usage}) + wrapped(b"data: [DONE]\n\n"))
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            self.running -= 1
            self._free.release()


def wrapped(data: bytes) -> bytes:
    """As one chunk of HTTP/1.1."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def chunk(event: dict[str, Any]) -> bytes:
    return wrapped(b"data: " + json.dumps(event).encode() + b"\n\n")


async def _forever(fake: Fake) -> None:
    await fake._listen()
    print(f"listening on {fake.port}", flush=True)
    await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(_forever(Fake(port=int(sys.argv[1]), **json.loads(sys.argv[2]))))
