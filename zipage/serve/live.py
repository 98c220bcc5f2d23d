"""What the server shows of itself: snapshots of what runs, and what the heads of one request hold."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from heapq import nsmallest
from typing import Any

import numpy as np
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from zipage.engine.input_processor import Tokens
from zipage.serve.engine import Engine, Look
from zipage.serve.errors import ApiError
from zipage.serve.streaming import dumps
from zipage.stats import HeldEntries, RequestState

EVERY = 0.25
"""Seconds between two snapshots, however many watch."""
READ_EVERY = 0.2
"""Seconds between two reads of the device, whoever asks; one request is read `FRESH` seconds apart."""
FRESH = 1.0
MOST_WATCHERS = 64
MOST_ROWS = 32
"""Requests of a snapshot that are shown one by one."""
MOST_COLUMNS = 1024
HEAD, TAIL = 40, 80
"""Characters of a prompt that are shown."""


class Live:
    """Asks the engine nothing while nobody watches.

    Args:
        about: the server, sent first.
        shows_prompts: how they begin and end; otherwise only how long they are.
        is_closing: whether streams shall end.
    """

    def __init__(
        self, engine: Engine, about: Mapping[str, Any], shows_prompts: bool, is_closing: Callable[[], bool]
    ) -> None:
        self._engine = engine
        self._about = dict(about)
        self._shows_prompts = shows_prompts
        self._is_closing = is_closing
        self._look: asyncio.Task[Look] | None = None
        self._looked = 0.0
        self._reading = asyncio.Lock()
        self._last_read = 0.0
        self._held: dict[tuple[str, int, int], tuple[float, dict[str, Any]]] = {}
        """What was read in the last `FRESH` seconds, and when."""
        self.num_watchers = 0

    # Snapshots

    def stream(self, watched: str | None) -> StreamingResponse:
        """Server-sent events: `about` once, then a snapshot every `EVERY` seconds.

        Args:
            watched: the id of a request that is shown however many others there are.

        Raises:
            ApiError: too many watch, or the engine has failed.
        """
        self._engine.check_alive()
        if self.num_watchers >= MOST_WATCHERS:
            raise ApiError(
                429, f"{MOST_WATCHERS} watch already", code="too_many_watchers", headers={"Retry-After": "5"}
            )
        self.num_watchers += 1
        return _Watch(self._events(watched), self._leave)

    def _leave(self) -> None:
        self.num_watchers -= 1

    async def _events(self, watched: str | None) -> AsyncIterator[str]:
        yield f"event: about\ndata: {dumps(self._about)}\n\n"
        while not self._is_closing():
            try:
                look = await self._latest()
            except (ApiError, RuntimeError):  # the engine has failed: whoever asks again is told why
                return
            yield f"data: {dumps(self._shown(look, watched))}\n\n"
            await asyncio.sleep(EVERY)

    async def _latest(self) -> Look:
        """One look for all who watch."""
        now = time.monotonic()
        if self._look is None or (self._look.done() and now - self._looked >= 0.9 * EVERY):
            self._looked = now
            self._look = asyncio.ensure_future(self._engine.look())
        return await asyncio.shield(self._look)

    def _shown(self, look: Look, watched: str | None) -> dict[str, Any]:
        stats, states = look.stats, look.snapshot.requests
        statuses = Counter(state.status for state in states)
        rows = most_interesting(states, watched, MOST_ROWS)
        return {
            "time": round(look.time, 3),
            "counts": {status: statuses[status] for status in ("running", "compressing", "waiting", "paused")},
            "blocks": {"used": stats.blocks_used, "total": stats.blocks_total, "cached": look.snapshot.blocks_cached},
            "output_tokens": stats.output_tokens,
            "compressions": stats.compressions_applied,
            "entries_evicted": stats.entries_evicted,
            "requests_finished": stats.requests_finished,
            "requests": [self._row(state, look.prompts.get(state.request_id)) for state in rows],
            "num_more": len(states) - len(rows),
        }

    def _row(self, state: RequestState, prompt: Tokens | None) -> dict[str, Any]:
        text = prompt.text if prompt is not None and self._shows_prompts else None
        return {
            "id": state.request_id,
            "index": state.sample_index,
            "status": state.status,
            "prompt": None if text is None else excerpt(text),
            "prompt_tokens": state.num_prompt_tokens,
            "tokens": state.num_tokens,
            "max_tokens": state.max_total_tokens,
            "entries": state.entries,
            "blocks": state.blocks,
            "policy": state.policy,
            "budget_tokens": state.budget_tokens,
            "protected": state.protected,
            "compressions": state.compressions,
            "pauses": state.pauses,
            "preemptions": state.preemptions,
        }

    # What the heads of one request hold

    async def held(self, name: str, query: Mapping[str, str]) -> dict[str, Any]:
        """A map of what each head holds of a request, at most `FRESH` seconds old.

        Args:
            name: the engine's id of the request.
            query: `index` of the sample (0), and `columns`, the most columns of the map (256).

        Returns:
            `id`, `index`, `status` (None: it has ended, or never was) and what `entry_map` tells; only `held` of None
            where it has nothing on the device that stands still.

        Raises:
            ApiError: a value is out of range, or the engine has failed.
        """
        index = _number(query, "index", 0, 0, 2**31)
        columns = _number(query, "columns", 256, 1, MOST_COLUMNS)
        key = (name, index, columns)
        async with self._reading:
            now = time.monotonic()
            self._held = {of: found for of, found in self._held.items() if now - found[0] < FRESH}
            if key in self._held:
                return self._held[key][1]
            await asyncio.sleep(max(0.0, self._last_read + READ_EVERY - now))
            status, entries = await self._engine.held_entries(name, index)
            self._last_read = time.monotonic()
            shown = {"id": name, "index": index, "status": status}
            if entries is None:
                return shown | {"held": None}
            shown |= await asyncio.to_thread(entry_map, entries, columns)
            self._held[key] = self._last_read, shown
        return shown


class _Watch(StreamingResponse):
    """`leave` is called at its end, also where the client went before the first event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


def most_interesting(states: list[RequestState], watched: str | None, most: int) -> list[RequestState]:
    """The watched one, then those that hold entries, the longest first, then those that wait, the oldest first.

    Args:
        watched: a request's id; all its samples come first.
    """

    def rank(state: RequestState) -> tuple[bool, bool, int]:
        waits = state.status == "waiting"
        return state.request_id != watched, waits, 0 if waits else -state.num_tokens

    return nsmallest(most, states, key=rank)


def excerpt(text: str) -> str:
    """How a text begins and ends, in one line. Many prompts begin alike, and many end alike."""
    if len(text) > 4 * (HEAD + TAIL):
        text = f"{text[: 2 * HEAD]} … {text[-2 * TAIL :]}"
    words = " ".join(text.split())
    return words if len(words) <= HEAD + TAIL + 3 else f"{words[:HEAD]} … {words[-TAIL:]}"


def entry_map(entries: HeldEntries, most: int) -> dict[str, Any]:
    """How much of each stretch of the text each head holds.

    Args:
        most: columns.

    Returns:
        `held`: base64 of uint8 [L, H, columns]: of `positions_per_column` positions (of the last column those that
        there are) the share that is held, 0 for none, 255 for all.
    """
    layers, heads, num_entries = entries.positions.shape
    length = max(1, entries.num_tokens)
    width = -(-length // most)
    columns = -(-length // width)
    rows = np.arange(layers * heads)[:, None] * columns
    places = rows + entries.positions.reshape(layers * heads, num_entries) // width
    counts = np.bincount(places.ravel(), minlength=layers * heads * columns).reshape(-1, columns)
    sizes = np.full(columns, width)
    sizes[-1] = length - (columns - 1) * width
    share = counts * 255 / sizes
    shades = np.clip(np.ceil(share), 0, 254) + (counts == sizes)
    return {
        "prompt_tokens": entries.num_prompt_tokens,
        "tokens": entries.num_tokens,
        "entries": num_entries,
        "layers": layers,
        "heads": heads,
        "columns": columns,
        "positions_per_column": width,
        "held": base64.b64encode(shades.astype(np.uint8).tobytes()).decode(),
    }


def _number(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    given = query.get(name, str(default))
    if not given.isascii() or not given.isdigit() or len(given) > 10 or not least <= int(given) <= most:
        raise ApiError(400, f"{name}={given[:20]!r}: must be a number from {least} to {most}", name)
    return int(given)
