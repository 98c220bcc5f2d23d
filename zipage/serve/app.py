"""The paths, and which errors become which answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse

from zipage.serve import chat, completions
from zipage.serve.api import Api
from zipage.serve.config import ServeConfig
from zipage.serve.engine import Engine
from zipage.serve.errors import ApiError
from zipage.serve.gate import Gate
from zipage.serve.generation import ClientGone
from zipage.serve.live import Live
from zipage.serve.page import PAGE, PAGE_HEADERS
from zipage.serve.schemas import ChatRequest, CompletionRequest

NOBODY = Response(status_code=499)
"""For a client that went away."""


def create_app(engine: Engine, config: ServeConfig) -> Gate:
    """The application behind its gate.

    Args:
        engine: started.
    """
    api = Api(engine, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.attach(asyncio.get_running_loop())
        yield

    app = FastAPI(title="zipage", lifespan=lifespan, openapi_url=None)
    keys = config.api_key or tuple(filter(None, os.environ.get("ZIPAGE_API_KEY", "").split(",")))
    gate = Gate(app, keys)
    shows_prompts = len(keys) < 2 if config.show_prompts is None else config.show_prompts
    live = Live(engine, api.about(), shows_prompts, lambda: gate.is_closing)
    _add_error_handlers(app)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await api.answer(request, CompletionRequest, completions)

    @app.post("/v1/chat/completions")
    async def complete_chat(request: Request) -> Response:
        return await api.answer(request, ChatRequest, chat)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(api.models())

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        for one in api.models()["data"]:
            if one["id"] == name:
                return JSONResponse(one)
        raise ApiError(404, f"model={name!r} is not served here", "model", "model_not_found")

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return JSONResponse(await api.tokenize(request))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return JSONResponse(await api.detokenize(request))

    @app.get("/health")
    async def health() -> Response:
        engine.check_alive()
        if gate.is_closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return Response()

    @app.get("/version")
    async def show_version() -> Response:
        return JSONResponse({"version": version("zipage")})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(api.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    @app.get("/live")
    async def watch(request: Request) -> Response:
        return live.stream(request.query_params.get("watch"))

    @app.get("/live/requests/{name}/held")
    async def held(request: Request, name: str) -> Response:
        return JSONResponse(await live.held(name, request.query_params))

    return gate


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, what, headers=error.headers).response()

    @app.exception_handler(ClientGone)
    @app.exception_handler(ClientDisconnect)
    async def nobody(request: Request, error: Exception) -> Response:
        return NOBODY

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return ApiError(500, f"the server has a fault: {type(error).__name__}").response()
