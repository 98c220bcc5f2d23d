"""Bodies of requests: their fields and types. Ranges are checked by `SamplingParams`."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from zipage.checks import LONG, check_names, shown
from zipage.sampling_params import SamplingParams
from zipage.serve.errors import ApiError
from zipage.serve.reasoning import Effort, with_effort
from zipage.unsupported import SAMPLING_OPTIONS, drop_unsupported

_TOOLS = "describe them in a message"
_STATELESS = "nothing is kept"
UNSUPPORTED = SAMPLING_OPTIONS | {
    "echo": "the answer is the new text alone",
    "suffix": "the model writes on from the end of the prompt",
    "best_of": "set n, and choose by logprobs",
    **dict.fromkeys(("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls"), _TOOLS),
    "response_format": "check the answer, and ask again where it does not fit",
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), "check the answer"),
    **dict.fromkeys(("modalities", "audio", "prediction", "web_search_options"), "messages and answers are text"),
    **dict.fromkeys(("store", "metadata", "previous_response_id"), _STATELESS),
    "reasoning_effort": "write it into the prompt, as the model's template does, or ask for a chat",
    "chat_template": "the server's is taken; start it with another by --chat-template",
    "service_tier": "requests are served in the order in which they came",
    "priority": "requests are served in the order in which they came",
    "add_special_tokens": "give token ids",
    "return_token_ids": "ask /tokenize",
    "lora_request": "merge the adapter into the weights and load those",
}
"""Fields that OpenAI or vLLM know: what to do instead."""
NOTHING = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "add_special_tokens": (True,),
    "priority": (0,),
}
"""Values that ask for nothing, beside those of `drop_unsupported`."""
OF_MESSAGE = {
    **dict.fromkeys(("tool_calls", "tool_call_id", "function_call"), _TOOLS),
    **dict.fromkeys(("audio", "annotations", "refusal"), "messages are text"),
}
"""Fields of a message that the answers of OpenAI's client have, and that are empty here."""

MOST = 1024
"""Stop strings and the like of a request: each costs all requests time in every step."""

UNBOUNDED = ("prompt", "messages", "tokens")
"""Fields that may have more items. `check` looks at these: pydantic would tell of each item that is wrong."""

AnyBody = TypeVar("AnyBody", bound="Body")


class Body(BaseModel):
    """Refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(Body):
    """What both kinds of requests have. None is the default of `SamplingParams`."""

    ABOUT: ClassVar[str]
    """The field that a refusal is about if it names none."""
    num_prompts: ClassVar[int] = 1

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    budget_tokens: int | None = None
    policy: str | None = None
    protection: str | None = None

    def sampling(self) -> dict[str, Any]:
        """Options of `SamplingParams`."""
        given = {name: value for name, value in self if value is not None and name in SamplingParams.names()}
        if self.logit_bias is not None:
            given["logit_bias"] = {_token(key): value for key, value in self.logit_bias.items()}
        return given

    def params(self) -> SamplingParams:
        """Raises ApiError where a value is out of range."""
        try:
            return SamplingParams(**self.sampling())
        except ValueError as error:
            name = str(error).removeprefix("SamplingParams.").partition("=")[0].partition(":")[0]
            field = self.renamed.get(name, name)
            message = str(error).removeprefix("SamplingParams.").replace(name, field, 1)
            raise ApiError(400, message, field) from None

    @property
    def renamed(self) -> dict[str, str]:
        """Fields of `SamplingParams` that the body calls otherwise."""
        return {}

    @property
    def fields(self) -> list[str]:
        """Those given; first the one that a refusal is about if it names none."""
        return [self.ABOUT, *(self.model_fields_set - {"model"})]

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options.continuous_usage_stats)

    def check(self) -> None:
        """What types do not say. Raises ApiError."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: needs stream=true", "stream_options")


class CompletionRequest(SamplingBody):
    ABOUT: ClassVar[str] = "prompt"

    prompt: Any
    logprobs: int | None = None

    @property
    def num_prompts(self) -> int:
        several = isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str | list)
        return len(self.prompt) if several else 1

    def prompts(self) -> list[str | list[int]]:
        """One or several texts or lists of token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _all(prompt, int)):
            return [prompt]
        if isinstance(prompt, list) and prompt and (_all(prompt, str) or all(_is_tokens(one) for one in prompt)):
            return prompt
        raise ApiError(
            400, f"prompt={shown(prompt)}: must be a text, a list of token ids, or a list of either", "prompt"
        )


class ChatRequest(SamplingBody):
    ABOUT: ClassVar[str] = "messages"

    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None

    def sampling(self) -> dict[str, Any]:
        given = {"max_tokens": None} | super().sampling()
        given.pop("logprobs", None)
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        return given

    @property
    def renamed(self) -> dict[str, str]:
        newer = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return {"logprobs": "top_logprobs"} | newer

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs=true", "top_logprobs")
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            raise ApiError(400, "max_tokens: is the old name of max_completion_tokens: give one of them", "max_tokens")
        check_messages(self.messages)


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "prompt: give it or messages, and not both", "prompt")
        if self.messages is None and self.reasoning_effort is not None:
            raise ApiError(400, "reasoning_effort: needs messages", "reasoning_effort")
        check_messages(self.messages or [])


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Any]

    def check(self) -> None:
        if not _all(self.tokens, int):
            raise ApiError(400, f"tokens: must be a list of token ids, not {shown(self.tokens)}", "tokens")


def template_options(body: ChatRequest | TokenizeRequest, template: str | None) -> dict[str, Any]:
    """Keywords of `LLM.tokenize_chat`, for the template that puts the messages. Raises ApiError (`with_effort`)."""
    named = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
    options = {name: getattr(body, name) for name in named if getattr(body, name) is not None}
    if body.reasoning_effort is None:
        return options
    variables = with_effort(body.chat_template_kwargs or {}, body.reasoning_effort, template)
    return options | {"chat_template_kwargs": variables}


def check_messages(messages: list[Any]) -> None:
    """Role, content and name of each; what else OpenAI's answers carry must be empty, and is taken away."""
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{where}={shown(message)}: must be an object with role and content", "messages")
        try:
            drop = [name for name in message.keys() & OF_MESSAGE.keys() if message[name] == []]
            kept = drop_unsupported(where, {k: v for k, v in message.items() if k not in drop}, OF_MESSAGE)
            check_names(kept, ("role", "content", "name", "reasoning_content"), where)
        except ValueError as error:
            raise ApiError(400, str(error), where) from None
        if not isinstance(message.get("role"), str):
            raise ApiError(400, f"{where}.role={shown(message.get('role'))}: must be a text", f"{where}.role")
        content = message.get("content")
        if not isinstance(content, str | list | None):
            raise ApiError(400, f"{where}.content={shown(content)}: must be a text or its parts", f"{where}.content")
        message.clear()
        message |= kept


def _all(values: list, kind: type) -> bool:
    return all(type(value) is kind for value in values)


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and _all(value, int)


def _token(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 19:  # of 64 bits
        raise ApiError(400, f"logit_bias: key {shown(key)} must be a token id", "logit_bias")
    return int(key)


# Reading


def parse(kind: type[AnyBody], raw: bytes) -> AnyBody:
    """A body.

    Raises:
        ApiError: it is no JSON object, or a field is unknown, missing or of the wrong type; the message names it.
    """
    try:
        given = _json(raw)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"the body must be a JSON object, not {shown(given)}")
    supported = {}
    for name, value in given.items():
        if name in UNSUPPORTED and name not in kind.model_fields:
            _refuse(name, value)
        else:
            supported[name] = value
    try:
        check_names(supported, kind.model_fields, "the body")
    except ValueError as error:
        param = next(name for name in supported if name not in kind.model_fields)
        raise ApiError(400, str(error).replace("unknown option", "unknown field"), param[:LONG]) from None
    for name, value in supported.items():  # before each item is looked at
        if isinstance(value, list | dict) and len(value) > MOST and name not in UNBOUNDED:
            raise ApiError(400, f"{name}: {len(value)} items, at most {MOST} are taken", name)
    try:
        body = kind.model_validate(supported)
    except ValidationError as error:
        raise _invalid(error, supported) from None
    body.check()
    return body


def _json(raw: bytes) -> Any:
    """Without Python's search for cycles: it would look at each of a million lists several times, while all threads
    wait.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return from_json(raw, allow_inf_nan=False)
    finally:
        if was_enabled:
            gc.enable()


def _refuse(name: str, value: Any) -> None:
    """Raises ApiError where a field that is not supported asks for something."""
    if any(type(value) is type(nothing) and value == nothing for nothing in NOTHING.get(name, ())):
        return
    try:
        drop_unsupported("the body", {name: value}, UNSUPPORTED)
    except ValueError as error:
        raise ApiError(400, str(error), name, "unsupported_parameter") from None


def _invalid(error: ValidationError, given: Mapping[str, Any]) -> ApiError:
    """Of the first field that is wrong; a field of several types has an error for each."""
    errors = error.errors(include_url=False)
    field = errors[0]["loc"][0]
    found = [one for one in errors if one["loc"][0] == field]
    if found[0]["type"] == "missing":
        return ApiError(400, f"{field}: is missing", str(field))
    if found[0]["type"] == "extra_forbidden":
        inner = ".".join(map(str, found[0]["loc"]))
        return ApiError(400, f"{inner}: unknown field", inner)
    what = " or ".join(dict.fromkeys(one["msg"] for one in found))
    return ApiError(400, f"{field}={shown(given[field])}: {what}", str(field))
