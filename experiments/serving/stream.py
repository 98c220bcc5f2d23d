"""One streamed completion over a connection of its own, timed as its bytes come.

A protocol of asyncio's rather than an HTTP library: 256 streams of 40 tokens a second are 10,000 events a second.
"""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections.abc import Callable
from typing import Any

clock = time.monotonic
"""Seconds; the clock of asyncio's loop."""
PATH = "/v1/completions"
MOST_ERROR = 300
"""Characters of an error that are kept."""


class Stream(asyncio.Protocol):
    """A request from its sending to its end.

    Tokens that one read of the socket brings are one arrival: they reached the user together.

    Args:
        body: JSON of the request, with "stream": true.
        due: when it is to be sent, on `clock`.
        asked: tokens that it asks for.
        heard: called with the time and the tokens of each arrival.
        ended: called once, when the outcome is known.

    Attributes:
        sent: when it went out; None before that.
        first, last: times of the first and the last arrival; None before that.
        gaps: seconds between successive arrivals.
        events: tokens as counted while they came: those that the event's usage or token ids tell, else one an event.
        tokens: of the answer: what the usage at the end says, where it came, else `events`.
        outcome: None while it runs, then "finished", "failed" or "aborted" (by this side).
        error: why it failed.
        end: when the outcome was known.
    """

    __slots__ = (
        *("due", "asked", "sent", "first", "last", "gaps", "events", "outcome", "error", "end", "is_measured"),
        *("_body", "_heard", "_ended", "_transport", "_wire", "_text", "_status", "_is_chunked", "_usage", "_is_done"),
    )

    def __init__(
        self,
        body: bytes,
        due: float,
        asked: int,
        heard: Callable[[float, int], None] | None = None,
        ended: Callable[[Stream], None] | None = None,
    ) -> None:
        self.due, self.asked = due, asked
        self.sent = self.first = self.last = self.end = None
        self.gaps = array("d")
        self.events = 0
        self.outcome: str | None = None
        self.error: str | None = None
        self.is_measured = True
        self._body, self._heard, self._ended = body, heard, ended
        self._transport: asyncio.Transport | None = None
        self._wire, self._text = bytearray(), bytearray()
        self._status: int | None = None
        self._is_chunked = self._is_done = False
        self._usage: int | None = None

    @property
    def tokens(self) -> int:
        return self.events if self._usage is None else self._usage

    @property
    def ttft(self) -> float | None:
        """From when it was due, not from when it went out."""
        return None if self.first is None else self.first - self.due

    @property
    def tpot(self) -> float | None:
        return (self.last - self.first) / (self.tokens - 1) if self.first is not None and self.tokens > 1 else None

    @property
    def e2e(self) -> float | None:
        return None if self.last is None else self.last - self.due

    async def connect(self, host: str, port: int) -> None:
        """Send it."""
        try:
            await asyncio.get_running_loop().create_connection(lambda: self, host, port)
        except OSError as error:
            self._end("failed", f"no connection: {error.strerror or error}")

    def abort(self) -> None:
        """Go away, as a client does that closes its window."""
        self._end("aborted")

    # asyncio's side

    def connection_made(self, transport: asyncio.Transport) -> None:
        if self.outcome is not None:
            transport.abort()
            return
        self._transport = transport
        self.sent = clock()
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(self._body)}\r\nConnection: close\r\n\r\n"
        )
        transport.write(head.encode() + self._body)
        self._body = b""

    def data_received(self, data: bytes) -> None:
        now = clock()
        self._wire += data
        if self.outcome is not None or (self._status is None and not self._read_head()):
            return
        self._unwrap()
        if self._status != 200:
            return
        before = self.events
        try:
            self._read_events()
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            self._end("failed", f"an event is not as it should be: {error!r}")
            return
        if self.events > before:
            if self.last is None:
                self.first = now
            else:
                self.gaps.append(now - self.last)
            self.last = now
            if self._heard is not None:
                self._heard(now, self.events - before)
        if self.error is not None:
            self._end("failed", self.error)
        elif self._is_done:
            self._end("finished")

    def connection_lost(self, error: Exception | None) -> None:
        if self._status not in (None, 200):
            self._end("failed", f"status {self._status}: {_message(bytes(self._text))}")
        else:
            self._end("failed", "the connection closed before the answer's end")

    # HTTP and SSE

    def _read_head(self) -> bool:
        end = self._wire.find(b"\r\n\r\n")
        if end < 0:
            return False
        status, _, fields = bytes(self._wire[:end]).lower().partition(b"\r\n")
        del self._wire[: end + 4]
        try:
            self._status = int(status.split()[1])
        except (ValueError, IndexError):
            self._end("failed", f"no HTTP: {status[:50]!r}")
            return False
        self._is_chunked = b"transfer-encoding: chunked" in fields
        return True

    def _unwrap(self) -> None:
        """Move whole chunks from the wire to the text."""
        if not self._is_chunked:
            self._text += self._wire
            self._wire.clear()
            return
        begin = 0
        while (end := self._wire.find(b"\r\n", begin)) >= 0:
            after = end + 2 + int(self._wire[begin:end].split(b";")[0], 16)
            if len(self._wire) < after + 2:
                break
            self._text += self._wire[end + 2 : after]
            begin = after + 2
        del self._wire[:begin]

    def _read_events(self) -> None:
        begin = 0
        while (end := self._text.find(b"\n\n", begin)) >= 0:
            line = self._text[begin:end]
            begin = end + 2
            if line.startswith(b"data: "):
                if line == b"data: [DONE]":
                    self._is_done = True
                else:
                    self._read(json.loads(line[6:]))
        del self._text[:begin]

    def _read(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = _shortened(event["error"]["message"])
            return
        usage, choices = event.get("usage"), event["choices"]
        if choices:
            ids = choices[0].get("token_ids")
            if usage is not None:
                self.events = usage["completion_tokens"]
            else:
                self.events += 1 if ids is None else len(ids)
            if choices[0].get("finish_reason") in ("abort", "error"):
                self.error = f"the server ended it: {choices[0]['finish_reason']}"
        if usage is not None:
            self._usage = usage["completion_tokens"]

    def _end(self, outcome: str, error: str | None = None) -> None:
        if self.outcome is None:
            self.outcome, self.error, self.end = outcome, error, clock()
            if self._transport is not None:
                self._transport.abort() if outcome == "aborted" else self._transport.close()
            if self._ended is not None:
                self._ended(self)


def _message(body: bytes) -> str:
    """Of an error in OpenAI's format, or the body as it is."""
    text = body.decode(errors="replace")
    try:
        value = json.loads(text)
        return _shortened(value["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return _shortened(text)


def _shortened(text: Any) -> str:
    return " ".join(str(text).split())[:MOST_ERROR]
