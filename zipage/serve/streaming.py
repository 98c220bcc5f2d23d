"""Answers as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from zipage.outputs import StreamEvent
from zipage.serve.errors import ApiError
from zipage.serve.generation import ClientGone, Generation
from zipage.serve.schemas import SamplingBody
from zipage.serve.usage import Usage

Choices = Callable[[StreamEvent], list[dict[str, Any]]]
DONE = b"data: [DONE]\n\n"


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class EventStream(Response):
    """Chunks of a generation as they come; what is there together is sent together.

    Args:
        head: fields that every chunk has.
        choices: of an event, the choices of a chunk each.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, body: SamplingBody, head: dict[str, Any], choices: Choices) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._choices = choices
        self._usage = Usage(generation)
        self._is_asked = body.include_usage
        self._is_continuous = body.continuous_usage
        self._head = dumps(head)[:-1] + ',"choices":['
        self._tail = b"]" + (b',"usage":null' if self._is_asked else b"") + b"}\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except (ClientGone, OSError):
            pass
        finally:
            self._generation.close()

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            async for events in self._generation.events():
                yield b"".join(self._of_event(event) for event in events)
                for event in events:
                    if event.finish_reason == "error":
                        raise ApiError(500, event.error or "the engine gives no reason")
        except ApiError as error:
            yield f"data: {dumps(error.body)}\n\n".encode()
        else:
            if self._is_asked:
                yield f'data: {self._head}],"usage":{dumps(self._usage.total())}}}\n\n'.encode()
        yield DONE

    def _of_event(self, event: StreamEvent) -> bytes:
        self._usage.count(event)
        tail = self._tail
        if self._is_continuous:
            tail = f'],"usage":{dumps(self._usage.total())}}}\n\n'.encode()
        return b"".join(f"data: {self._head}{dumps(choice)}".encode() + tail for choice in self._choices(event))
