"""Who may come in: API keys, and nobody new while the server shuts down."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from zipage.serve.errors import ApiError

OPEN = ("/health", "/version", "/metrics", "/")
"""Paths that take no key."""


class Gate:
    """ASGI middleware.

    Args:
        keys: of which a request must bring one; empty: none is needed.

    Attributes:
        is_closing: new requests are refused.
        num_inside: requests that are being answered.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self.is_closing = False
        self.num_inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        if (error := self._refusal(Headers(scope=scope))) is not None:
            await error.response()(scope, receive, send)
            return
        self.num_inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.num_inside -= 1

    def _refusal(self, headers: Headers) -> ApiError | None:
        if self._keys:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            known = [secrets.compare_digest(key.strip().encode("latin-1"), one) for one in self._keys]
            if scheme.lower() != "bearer" or not any(known):
                challenge = {"WWW-Authenticate": "Bearer"}
                return ApiError(401, "an API key is needed, and this is none", None, "invalid_api_key", challenge)
        if self.is_closing:
            return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Connection": "close"})
        return None


async def read_body(request: Request, most: int) -> bytes:
    """A JSON body of at most `most` bytes. Raises ApiError."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, f"Content-Type: {media_type or None!r} must be application/json")
    too_large = ApiError(413, f"the body has more than {most} bytes (--max-body-bytes)")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > most:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
    return bytes(body)
