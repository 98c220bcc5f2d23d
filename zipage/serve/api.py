"""What the endpoints do: read a body, generate, answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from jinja2 import TemplateSyntaxError
from starlette.requests import Request
from starlette.responses import Response

from zipage.checks import shown
from zipage.engine.input_processor import Tokens
from zipage.engine.rules import served_policies
from zipage.llm import LLM
from zipage.outputs import RequestOutput
from zipage.serve.config import ServeConfig
from zipage.serve.engine import Engine
from zipage.serve.errors import ApiError
from zipage.serve.gate import read_body
from zipage.serve.generation import Generation, refusal
from zipage.serve.metrics import Metrics
from zipage.serve.reasoning import marks_reasoning, template_of
from zipage.serve.schemas import (
    AnyBody,
    DetokenizeRequest,
    SamplingBody,
    TokenizeRequest,
    parse,
    template_options,
)
from zipage.serve.streaming import EventStream, dumps
from zipage.serve.usage import Usage


class Api:
    """What the endpoints share.

    Args:
        engine: started.
        config: of the server.

    Raises:
        ValueError: the configured chat template is no Jinja.
    """

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        self.engine = engine
        self.config = config
        self.llm = engine.llm
        self.names = config.served_model_name or (self.llm.config.model,)
        self.metrics = Metrics(engine, self.names[0])
        self.created = int(time.time())
        if config.chat_template is not None:
            _check_syntax(self.llm, config.chat_template)
        template = template_of(self.llm, config.chat_template)
        self.has_template = template is not None
        self.splits_reasoning = marks_reasoning(template)

    async def read(self, request: Request, kind: type[AnyBody]) -> tuple[AnyBody, int, float]:
        """The body, if it asks for a model that is served, its size in bytes, and when it was there (host clock,
        `time.perf_counter`).
        """
        raw = await read_body(request, self.config.max_body_bytes)
        arrival = time.perf_counter()
        body = await self.engine.read(lambda: parse(kind, raw), len(raw))
        if body.model is not None and body.model not in self.names:
            served = ", ".join(self.names)
            raise ApiError(404, f"model={shown(body.model)} is not served here: {served}", "model", "model_not_found")
        return body, len(raw), arrival

    async def answer(self, request: Request, kind: type[SamplingBody], endpoint: ModuleType) -> Response:
        """Generate, streaming or not; `endpoint` knows the format."""
        body, num_bytes, arrival = await self.read(request, kind)
        generation = await self._submit(body, num_bytes, arrival, endpoint)
        generation.watch(request.receive)
        head = {
            "id": generation.request_id,
            "object": endpoint.Chunks.kind if body.stream else endpoint.KIND,
            "created": int(time.time()),
            "model": body.model or self.names[0],
        }
        try:
            await generation.accepted()
            if not body.stream:
                return await self._whole(body, generation, head, endpoint)
        except BaseException:
            generation.close()
            raise
        return EventStream(generation, body, head, endpoint.Chunks(body, generation))

    async def _submit(self, body: SamplingBody, num_bytes: int, arrival: float, endpoint: ModuleType) -> Generation:
        params = body.params()
        num_samples = body.num_prompts * params.n
        if num_samples > self.config.max_n:
            what = f"n={params.n}: at most {self.config.max_n} samples of all prompts together (--max-n)"
            raise ApiError(400, what, "n")
        readers = endpoint.readers(body, self.llm, self.config.chat_template)
        self.engine.admit(num_samples, self.config.max_queue)
        try:
            if params.bad_words:
                await self._tokenize(body, num_bytes, lambda: self.llm.prepare(params))
            prompts = [await self._prompt(body, num_bytes, reader) for reader in readers]
            request_id = f"{endpoint.PREFIX}-{uuid.uuid4().hex}"
            generation = Generation(
                request_id,
                prompts,
                params,
                arrival=arrival,
                stream=bool(body.stream),
                splits_reasoning=self.splits_reasoning,
                fields=body.fields,
            )
        except BaseException:
            self.engine.leave(num_samples)
            raise
        self.engine.submit(generation)
        return generation

    async def _tokenize(self, body: SamplingBody, num_bytes: int, read: Callable[[], Any]) -> Any:
        try:
            return await self.engine.tokenize(read, num_bytes)
        except ValueError as error:
            raise refusal(str(error), body.fields) from None

    async def _prompt(self, body: SamplingBody, num_bytes: int, reader: Callable[[], Tokens]) -> Tokens:
        tokens = await self._tokenize(body, num_bytes, reader)
        if len(tokens.token_ids) >= self.llm.max_model_len:
            raise ApiError(
                400,
                f"{body.ABOUT}: {len(tokens.token_ids)} tokens leave no room for an answer in the model's context of "
                f"{self.llm.max_model_len}",
                body.ABOUT,
                "context_length_exceeded",
            )
        return tokens

    async def _whole(
        self, body: SamplingBody, generation: Generation, head: dict[str, Any], endpoint: ModuleType
    ) -> Response:
        outputs = await generation.outputs()
        if body.logprobs:  # up to 21 to a token: seconds, in which the streams of others go on
            text = await asyncio.to_thread(_rendered, body, generation, outputs, head, endpoint)
        else:
            text = _rendered(body, generation, outputs, head, endpoint)
        generation.close()
        return Response(text, media_type="application/json")

    def models(self) -> dict[str, Any]:
        length = self.llm.max_model_len
        shared = {"object": "model", "created": self.created, "owned_by": "zipage", "max_model_len": length}
        return {"object": "list", "data": [{"id": name, "root": self.llm.config.model} | shared for name in self.names]}

    def about(self) -> dict[str, Any]:
        """What the page must know to ask."""
        config = self.llm.config
        return {
            "model": self.names[0],
            "max_model_len": self.llm.max_model_len,
            "has_text": self.llm.get_tokenizer() is not None,
            "has_template": self.has_template and self.llm.get_tokenizer() is not None,
            "policy": config.policy,
            "policies": served_policies(config),
            "budget_tokens": config.budget_tokens,
            "protection": config.protection,
        }

    async def tokenize(self, request: Request) -> dict[str, Any]:
        body, num_bytes, _ = await self.read(request, TokenizeRequest)
        template = self.config.chat_template
        try:
            if body.messages is None:
                tokens = await self.engine.tokenize(lambda: self.llm.tokenize(body.prompt), num_bytes)
            else:
                options = template_options(body, template_of(self.llm, template))
                tokens = await self.engine.tokenize(
                    lambda: self.llm.tokenize_chat(body.messages, chat_template=template, **options), num_bytes
                )
        except ValueError as error:
            about = "prompt" if body.messages is None else "messages"
            raise refusal(str(error), (about, *body.model_fields_set)) from None
        ids, spelled = tokens.token_ids, None
        if body.return_token_strs:
            tokenizer = self.llm.get_tokenizer()
            spelled = await self.engine.tokenize(lambda: tokenizer.convert_ids_to_tokens(ids), num_bytes)
        return {"count": len(ids), "max_model_len": self.llm.max_model_len, "tokens": ids, "token_strs": spelled}

    async def detokenize(self, request: Request) -> dict[str, Any]:
        body, num_bytes, _ = await self.read(request, DetokenizeRequest)
        tokenizer = self.llm.get_tokenizer()
        if tokenizer is None:
            raise ApiError(400, "tokens: the engine has no tokenizer (--skip-tokenizer-init)", "tokens")
        bad = next((token for token in body.tokens if not 0 <= token < len(tokenizer)), None)
        if bad is not None:
            raise ApiError(400, f"tokens: {bad} is none of the tokenizer's {len(tokenizer)} tokens", "tokens")
        return {"prompt": await self.engine.tokenize(lambda: tokenizer.decode(body.tokens), num_bytes)}


def _rendered(
    body: SamplingBody,
    generation: Generation,
    outputs: Sequence[RequestOutput],
    head: dict[str, Any],
    endpoint: ModuleType,
) -> str:
    """The answer that is given whole. JSON of one choice after another, since each keeps all other threads waiting."""
    usage, choices = Usage(generation), []
    for output in outputs:
        usage.count_all(output)
        for sample in output.outputs:
            choices.append(dumps(endpoint.choice(body, generation, len(choices), sample)))
    return f'{dumps(head)[:-1]},"choices":[{",".join(choices)}],"usage":{dumps(usage.total())}}}'


def _check_syntax(llm: LLM, template: str) -> None:
    """Raise a ValueError where a template can't be read; what it makes of messages is its own matter."""
    try:
        llm.tokenize_chat([{"role": "user", "content": ""}], chat_template=template)
    except ValueError as error:
        if isinstance(error.__cause__, TemplateSyntaxError):
            line, what = error.__cause__.lineno, error.__cause__.message
            raise ValueError(f"chat_template={shown(template)}: is no Jinja template: line {line}: {what}") from error
