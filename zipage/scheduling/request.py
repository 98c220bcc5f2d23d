"""One sample of one prompt: the unit the scheduler runs."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from zipage.outputs import FinishReason, Logprob
from zipage.sampling_params import SamplingParams
from zipage.sliding_table import SlidingTable
from zipage.tile_table import Table, num_blocks

if TYPE_CHECKING:
    from zipage.eviction.rule import EvictionRule


PENDING = -1
"""Stands in `Request.token_ids` for a token that the host does not know yet."""


class Status(Enum):
    """Where a request is. Running and compressing ones hold blocks and a row; waiting and paused ones hold none."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPRESSING = "compressing"
    PAUSED = "paused"
    FINISHED = "finished"


class Request:
    """A sample's tokens, its place in the cache and its history.

    Two lengths that must never be mixed up: `num_tokens` is logical (prompt and output; sets the rotary position of the
    next token), `cache_len` is physical (entries held in the request's blocks; sets the slot of the next entry).

    Each field has one writer, after the constructor has set what is known by then. Anybody may read.

    By `PromptOrder`:
        request_id, index: of the prompt, and which of its samples this is.
        siblings: all samples of this prompt, this one included; they share the prompt's blocks.
        sampling_params, seed, stop_ids: what is asked for; `stop_ids` end the request.
        bad_words: tokens of texts that may not come.
        num_prompt_tokens: the length of the prompt.
        max_total_tokens, limit_reason: logical length at which the request ends, and why.
        rule, window: what bounds the cache, None for full KV; w, latest queries that its compressions read.
        arrival: host clock at which it was added.
        follow: its tokens are wanted one by one, not only at its end.
        is_scripted: some of its tokens may not be drawn, or its answers have a limit.

    By `Scheduler`:
        number: age; the scheduler counts requests as they are added.
        status: where the request is.
        row: its row in the worker's batch while it runs, else -1.
        num_computed: logical tokens whose keys and values were computed; the next position to run.
        cache_len: entries in the cache. Equal to `num_computed` as long as nothing was evicted.
        queries_saved: a paused request's queries went with its entries, so it returns to a query slot.
        finish_reason, stop_reason: why it ended, and by which token.
        error: one line that says what ended the request, where its finish reason is "error".
        first_scheduled, first_token_time, finish_time: host clock.
        cached_tokens: prompt tokens that the cache held when the request was first scheduled.
        num_preemptions, num_pauses: how often each happened.

    By `SlidingBlocks`:
        sliding: its table in sliding layers; empty where there are none. Of one that doesn't run: the one it had.
        peak_sliding_blocks: the most blocks it held there at once.

    By `CompressionScheduler`:
        num_compressions: so far. After the first, entries are no longer a prefix of the text.

    By `QuerySlots`:
        query_slot: where its latest queries are kept, or -1.
        queries_from: logical position from which on they are.
        has_held_slot: it was given a query slot at some time.

    By `PrefixLookup`:
        prefix_ids: prefix id at the end of each leading block that the prefix index was told of.

    By `EngineCore`:
        logprobs: of each output token, by token id; None where none are asked for.
        hidden_states: [width], what each output token was drawn from; None where they are not asked for.

    By `Request`, in methods that others call:
        token_ids: prompt followed by output, as C ints, whose bytes are the prefix index's keys. The last `num_pending`
            are `PENDING`.
        num_pending: tokens of steps under way, whose values the host does not know yet, or which `next_tokens` gave.
        next_tokens: tokens that come next, whatever is drawn in their places.
        follow_ups: those to go on with after each answer, as far as they are left.
        turn_begin: number of tokens before the answer that is being drawn.
        token_row: where the newest pending token lies among those that its step samples.
        num_taken: output tokens that `take_new` has given.
        block_ids: the block table, or that of tiles. Of a paused request: the one it had.
        num_blocks_told: leading blocks of the table that the worker knows of.
        peak_blocks: the most blocks it held at once: its table, and what a compression took beside it.
    """

    __slots__ = (
        "arrival",
        "bad_words",
        "block_ids",
        "cache_len",
        "cached_tokens",
        "error",
        "finish_reason",
        "finish_time",
        "first_scheduled",
        "first_token_time",
        "follow",
        "follow_ups",
        "has_held_slot",
        "hidden_states",
        "index",
        "is_scripted",
        "limit_reason",
        "logprobs",
        "max_total_tokens",
        "next_tokens",
        "num_blocks_told",
        "num_compressions",
        "num_computed",
        "num_pauses",
        "num_pending",
        "num_preemptions",
        "num_prompt_tokens",
        "num_taken",
        "number",
        "peak_blocks",
        "peak_sliding_blocks",
        "prefix_ids",
        "queries_from",
        "queries_saved",
        "query_slot",
        "request_id",
        "row",
        "rule",
        "sampling_params",
        "seed",
        "siblings",
        "sliding",
        "status",
        "stop_ids",
        "stop_reason",
        "token_ids",
        "token_row",
        "turn_begin",
        "window",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        *,
        index: int = 0,
        seed: int = 0,
        stop_ids: frozenset[int] = frozenset(),
        bad_words: Sequence[Sequence[int]] = (),
        max_total_tokens: int,
        limit_reason: FinishReason = "length",
        rule: EvictionRule | None = None,
        arrival: float = 0.0,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.sampling_params = sampling_params
        self.seed = seed
        self.stop_ids = stop_ids
        self.bad_words = bad_words
        self.max_total_tokens = max_total_tokens
        self.limit_reason = limit_reason
        self.rule = rule
        self.window = 0 if rule is None else rule.window
        self.number = -1
        self.siblings: list[Request] = [self]

        self.token_ids = array("i", prompt_token_ids)
        self.num_pending = 0
        self.token_row = -1
        self.num_prompt_tokens = len(prompt_token_ids)
        self.logprobs: list[dict[int, Logprob]] | None = None if sampling_params.logprobs is None else []
        self.hidden_states: list[Any] | None = [] if sampling_params.return_hidden_states else None
        self.next_tokens = deque(sampling_params.forced_token_ids)
        self.follow_ups = deque(sampling_params.follow_ups)
        has_turns = self.follow_ups or sampling_params.max_turn_tokens is not None
        self.is_scripted = bool(self.next_tokens or has_turns)
        self.turn_begin = self.num_prompt_tokens + len(self.next_tokens)

        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.follow = False
        self.num_taken = 0

        self.num_computed = 0
        self.cache_len = 0
        self.block_ids: Table = []
        self.row = -1
        self.num_blocks_told = 0
        self.prefix_ids: list[int] = []
        self.sliding = SlidingTable()
        self.num_compressions = 0
        self.query_slot = -1
        self.queries_from = 0
        self.queries_saved = False

        self.arrival = arrival
        self.first_scheduled: float | None = None
        self.first_token_time: float | None = None
        self.finish_time: float | None = None
        self.cached_tokens = 0
        self.num_preemptions = 0
        self.num_pauses = 0
        self.peak_blocks = 0
        self.peak_sliding_blocks = 0
        self.has_held_slot = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def take_new(self) -> tuple[list[int], list[dict[int, Logprob]] | None]:
        """Output tokens that are known and were not taken yet, and their log-probabilities where they are asked for."""
        begin, end = self.num_taken, self.num_output_tokens - self.num_pending
        self.num_taken = end
        tokens = self.token_ids[self.num_prompt_tokens + begin : self.num_prompt_tokens + end].tolist()
        return tokens, None if self.logprobs is None else self.logprobs[begin:end]

    @property
    def has_all_tokens(self) -> bool:
        """Its length is reached, though the last token may be pending: nothing more is computed for it."""
        return len(self.token_ids) >= self.max_total_tokens

    def hold(self, block_ids: Table) -> None:
        """Its table is `block_ids` from now on."""
        self.block_ids = block_ids
        self.num_blocks_told = 0
        self.note_fresh(0)

    def grow(self, block_ids: Table) -> None:
        """Its table gains blocks."""
        self.block_ids += block_ids
        self.note_fresh(0)

    def note_fresh(self, num_fresh: int) -> None:
        """Blocks that a compression takes besides its table."""
        held = num_blocks(self.block_ids) + num_fresh
        if held > self.peak_blocks:
            self.peak_blocks = held

    def take_growth(self) -> tuple[int, list[int]]:
        """What its table has gained since the last time: from which place on, and the blocks."""
        first, self.num_blocks_told = self.num_blocks_told, len(self.block_ids)
        return first, self.block_ids[first:]

    def await_token(self, token_row: int) -> None:
        """A step that will give the next token is under way; `token_row` is where among those that it samples."""
        self.token_ids.append(self.next_tokens.popleft() if self.is_scripted and self.next_tokens else PENDING)
        self.num_pending += 1
        self.token_row = token_row

    def take_token(self, token: int) -> bool:
        """The step of the oldest pending token has drawn `token`.

        Returns:
            Whether it stands; otherwise one of `next_tokens` has its place.
        """
        place = -self.num_pending
        self.num_pending -= 1
        if self.is_scripted and self.token_ids[place] != PENDING:
            return False
        self.token_ids[place] = token
        return True

    def ends_turn(self, token: int) -> bool:
        """Whether the answer that is being drawn ends with `token`, the last one that is known."""
        if token in self.stop_ids:
            return True
        limit = self.sampling_params.max_turn_tokens
        return limit is not None and len(self.token_ids) - self.num_pending - self.turn_begin >= limit

    def begin_turn(self, token: int) -> None:
        """The next follow-up comes after `token`, at which the answer ended or was cut short."""
        if token not in self.stop_ids:
            self.next_tokens.append(self.sampling_params.stop_token_ids[0])
        self.next_tokens.extend(self.follow_ups.popleft())
        self.turn_begin = len(self.token_ids) - self.num_pending + len(self.next_tokens)
        # What a step under way will draw is not wanted: its input is `token`, and the next token is known.
        for place in range(-self.num_pending, 0):
            self.token_ids[place] = self.next_tokens.popleft()

    def forget_pending(self) -> None:
        """The request has ended before its pending tokens."""
        if self.num_pending:
            del self.token_ids[-self.num_pending :]
            self.num_pending = 0

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}/{self.index}, {self.status.value}, tokens={self.num_tokens}, "
            f"computed={self.num_computed}, cached={self.cache_len}, blocks={len(self.block_ids)}, "
            f"compressions={self.num_compressions})"
        )
