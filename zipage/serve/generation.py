"""One request of the API as the event loop sees it: the prompts it asked for, and what comes of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from zipage.engine.input_processor import Tokens
from zipage.outputs import RequestOutput, StreamEvent
from zipage.sampling_params import SamplingParams
from zipage.serve.errors import ApiError

ACCEPTED = object()
"""The engine has queued all prompts."""
GONE = object()
"""The client has."""
Item = StreamEvent | RequestOutput | Exception | object


class ClientGone(Exception):
    """Nobody reads the answer."""


class Generation:
    """The samples of one or several prompts, all under the same options.

    Args:
        request_id: of the API.
        prompts: at least one.
        arrival: host clock (`time.perf_counter`) at which its body was there.
        stream: tokens come one by one; otherwise outputs come whole.
        splits_reasoning: marked thoughts are told apart from the answer, where it is a chat.
        fields: of the body, for `refusal`.

    Attributes:
        names: the engine's request ids, one a prompt.
        is_gone: the client went away.
        cancel: withdraws it from the engine.
    """

    def __init__(
        self,
        request_id: str,
        prompts: Sequence[Tokens],
        params: SamplingParams,
        *,
        arrival: float,
        stream: bool,
        splits_reasoning: bool,
        fields: Sequence[str],
    ) -> None:
        self.request_id = request_id
        self.prompts = prompts
        self.params = params
        self.stream = stream
        self.splits_reasoning = splits_reasoning
        self.names = [f"{request_id}-{number}" for number in range(len(prompts))]
        self.arrival = arrival
        self.is_gone = False
        self.cancel: Callable[[], None] = lambda: None
        self._fields = fields
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        self._watch: asyncio.Task | None = None
        self._is_complete = False

    @property
    def num_samples(self) -> int:
        return len(self.prompts) * self.params.n

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def choice(self, event: StreamEvent) -> tuple[int, int]:
        """The prompt's number, and the index of the sample among all."""
        number = int(event.request_id.rpartition("-")[2])
        return number, number * self.params.n + event.index

    def put(self, item: Item) -> None:
        self._items.put_nowait(item)

    # The client

    def watch(self, receive: Callable[[], Any]) -> None:
        """Withdraw it when the client goes away; `receive` is ASGI's, the body read."""
        self._watch = asyncio.ensure_future(self._wait_for_disconnect(receive))

    async def _wait_for_disconnect(self, receive: Callable[[], Any]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        self.cancel()
        self.put(GONE)

    def close(self) -> None:
        """The answer was given, or can't be: withdraw what is not finished."""
        if self._watch is not None:
            self._watch.cancel()
        if not self._is_complete:
            self.is_gone = True
            self.cancel()

    # What comes

    async def accepted(self) -> None:
        """Wait until the engine has queued it.

        Raises:
            ApiError: it refuses a prompt or an option, or has failed.
            ClientGone: the client went away.
        """
        self._check(await self._items.get())

    async def events(self) -> AsyncIterator[list[StreamEvent]]:
        """All that is there, until every sample has ended. Raises as `accepted`."""
        left = self.num_samples
        while left:
            events = [self._check(await self._items.get())]
            while not self._items.empty():
                events.append(self._check(self._items.get_nowait()))
            left -= sum(event.finish_reason is not None for event in events)
            self._is_complete = not left
            yield events

    async def outputs(self) -> list[RequestOutput]:
        """One a prompt, in order, when all are complete. Raises as `accepted`, and where a sample failed or was
        withdrawn."""
        found: dict[str, RequestOutput] = {}
        while len(found) < len(self.names):
            output = self._check(await self._items.get())
            found[output.request_id] = output
        self._is_complete = True
        outputs = [found[name] for name in self.names]
        for output in outputs:
            for sample in output.outputs:
                if sample.finish_reason == "error":
                    raise ApiError(500, sample.error or output.error or "the engine gives no reason")
                if sample.finish_reason == "abort":
                    raise ApiError(503, "the server is shutting down", code="shutting_down")
        return outputs

    def _check(self, item: Item) -> Any:
        if item is GONE:
            raise ClientGone
        if isinstance(item, Exception):
            self._is_complete = True
            if isinstance(item, ValueError):
                raise refusal(str(item), self._fields)
            raise ApiError(500, f"the engine has failed: {item}", code="engine_failed")
        return item


def refusal(message: str, fields: Sequence[str]) -> ApiError:
    """The engine's refusal, `param` being the first of these fields that it names.

    Args:
        fields: of the body; first the one that the message is about where it names none.
    """
    message = message.replace("SamplingParams.", "")
    words = re.findall(r"\w+", message)
    param = next((word for word in words if word in fields), None)
    return ApiError(400, message, fields[0] if param is None else param)
