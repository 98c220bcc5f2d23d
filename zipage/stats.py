"""Plain records of what the engine did: one per step, one set of counters per engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np


@dataclass(slots=True)
class RequestMetrics:
    """Timings (seconds) and counts of one sample, or of all samples of one prompt together.

    Attributes:
        arrival: host clock (`time.perf_counter`) at which the request was added.
        ttft: time to the first token. None where no token came.
        tpot: mean time per output token after the first. None where fewer than two tokens came.
        e2e: time from arrival to the last token.
        queued: time from arrival to first being scheduled.
        prompt_tokens, output_tokens: lengths; of all samples together in the record of a prompt (its prompt once).
        cached_tokens: prompt tokens whose KV came from the prefix index or from a sibling sample.
        preemptions, pauses, compressions: how often each happened.
        peak_blocks: the most KV blocks a sample held at once, shared ones included, and what a compression took beside
            its table; in the record of a prompt, of the sample that held the most. None where the engine does not tell.
        peak_sliding_blocks: the same of blocks of sliding layers; 0 where the model has none.
        query_slot: whether it held a query slot at any time. None where the engine does not tell.
    """

    arrival: float = 0.0
    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    queued: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    pauses: int = 0
    compressions: int = 0
    peak_blocks: int | None = None
    peak_sliding_blocks: int | None = None
    query_slot: bool | None = None

    # By vLLM's names, of both its generations of metrics. Times are of one host clock, `arrival`'s.

    @property
    def arrival_time(self) -> float:
        return self.arrival

    @property
    def first_scheduled_time(self) -> float | None:
        return self._after_arrival(self.queued)

    @property
    def first_token_time(self) -> float | None:
        return self._after_arrival(self.ttft)

    @property
    def last_token_time(self) -> float | None:
        return self._after_arrival(self.e2e)

    @property
    def time_in_queue(self) -> float | None:
        return self.queued

    @property
    def first_token_latency(self) -> float | None:
        return self.ttft

    @property
    def num_generation_tokens(self) -> int:
        return self.output_tokens

    queued_ts, scheduled_ts = arrival_time, first_scheduled_time
    first_token_ts, last_token_ts, finished_time = first_token_time, last_token_time, last_token_time

    def _after_arrival(self, seconds: float | None) -> float | None:
        return None if seconds is None else self.arrival + seconds


@dataclass(slots=True)
class StepStats:
    """One engine step: the make-up of its batch, the pool and the queues after it, and where its time went (seconds).

    `num_stalled` counts running requests that could not decode, for want of a query slot or of a block that a
    compression under way will return; `num_compressing` those out of the batch for a compression; `num_compressed`
    compressions applied in this step; `query_slots_used` slots held.

    `device_time` is the forward pass and sampling (between CUDA events on a GPU, wall time on a CPU); `step_time` is
    the step as the host saw it, with `async_scheduling` from the end of the step before; `host_time` is the difference:
    scheduling, batch building and bookkeeping, as far as the device waited for them.

    With `data_parallel_size` above 1 a record is of one replica, `replica`: its batch, its pool, its queues, its own
    count of steps. Steps of several replicas overlap in time, and come in the order in which they were heard of.
    """

    step: int
    time: float
    num_decode: int
    num_prefill: int
    prefill_tokens: int
    num_preempted: int
    num_paused: int
    num_resumed: int
    num_compressed: int
    num_compressing: int
    num_stalled: int
    num_running: int
    num_waiting: int
    query_slots_used: int
    blocks_used: int
    blocks_cached: int
    blocks_total: int
    host_time: float
    device_time: float
    step_time: float
    replica: int = 0


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine started, and gauges as they are now (`llm.stats`).

    Entries are counted per layer and KV head. `budget_bound` counts samples that were compressed at least once: 0 at
    the end of a run says that its budget never bound. `compressions_ordered` exceeds `compressions_applied` and
    `compressions_failed` only by those under way. `compressions_misranked` counts those whose policy ranked an entry
    NaN, so that chance decided what they kept. `pauses` exceeds `resumes` by the requests that are paused now, or that
    ended while they were: with a token of the step that was under way when they left. `bytes_to_host` and
    `bytes_from_host` are of blocks that were copied so, of each rank. `requests_failed` counts prompts that were
    refused or that ended with an error. `prompts_truncated` counts prompts under protection "prompt" that do not fit
    their budget whole. Blocks are those of full layers where others slide; these have pools of their own, of which
    `sliding_blocks_used` and `sliding_blocks_total` tell.

    With `data_parallel_size` above 1 every counter and every gauge is the sum over the replicas, `blocks_total` and
    `steps` among them; `host_time` and `device_time` then exceed the time that passed. Gauges are as last heard of,
    while requests run at most a tenth of a second or a step ago.
    """

    steps: int = 0
    requests_finished: int = 0
    requests_failed: int = 0
    requests_aborted: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    pauses: int = 0
    resumes: int = 0
    bytes_to_host: int = 0
    bytes_from_host: int = 0
    compressions_ordered: int = 0
    compressions_applied: int = 0
    compressions_failed: int = 0
    compressions_misranked: int = 0
    entries_evicted: int = 0
    entries_kept: int = 0
    blocks_returned: int = 0
    budget_bound: int = 0
    prompts_truncated: int = 0
    host_time: float = 0.0
    device_time: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    num_compressing: int = 0
    query_slots_used: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    sliding_blocks_used: int = 0
    sliding_blocks_total: int = 0


@dataclass(slots=True)
class EventStats:
    """Something that happened to a sample's cache (`LLM.event_listeners`).

    Attributes:
        kind: "compress": applied; "pause": moved to host memory; "resume": back; "preempt": given up, to be computed
            again.
        step: number of the engine step.
        time: host clock (`time.perf_counter`).
        request_id, sample_index: whose.
        round: its compressions before this event.
        num_tokens: its logical length.
        entries_before, entries_after: entries held per layer and KV head.
        blocks_before, blocks_after: blocks in its table.
        seconds: of a compression, from order to completion as the host saw it; 0 for the other kinds.
        kept_positions: of a compression, with `trace_positions`: int32 [L, H, entries_after], the logical positions
            that each layer and KV head kept, ascending; sliding layers, which keep a window, are not among the L. None
            without. Under unequal budgets it is as wide as the longest head, and -1 stands behind the others' own, and
            entries and blocks are means over heads.
        replica: on which it happened; `step` is its count.
    """

    kind: Literal["compress", "pause", "resume", "preempt"]
    step: int
    time: float
    request_id: str
    sample_index: int
    round: int
    num_tokens: int
    entries_before: int
    entries_after: int
    blocks_before: int
    blocks_after: int
    seconds: float = 0.0
    kept_positions: np.ndarray | None = None
    replica: int = 0


@dataclass(slots=True)
class RequestState:
    """A sample that has not ended, as it is now (`LLM.snapshot`).

    Attributes:
        request_id, sample_index: whose.
        status: "waiting", "running", "compressing" (out of the batch for a compression under way), "paused" (its
            entries are in host memory).
        num_prompt_tokens: the length of the prompt.
        num_tokens: its logical length, prompt and output so far.
        max_total_tokens: the logical length at which it ends at the latest.
        entries: held per layer and KV head.
        blocks: in its table; a paused one has none.
        policy: that bounds it; "full" where nothing does.
        budget_tokens: entries per layer and KV head that a compression leaves; None under full KV.
        protected: leading entries that always stay.
        compressions, pauses, preemptions: how often each happened.
    """

    request_id: str
    sample_index: int
    status: Literal["waiting", "running", "compressing", "paused"]
    num_prompt_tokens: int
    num_tokens: int
    max_total_tokens: int
    entries: int
    blocks: int
    policy: str
    budget_tokens: int | None
    protected: int
    compressions: int
    pauses: int
    preemptions: int


@dataclass(slots=True)
class Snapshot:
    """The unfinished samples, in the order in which they were added, and blocks that the prefix index can find, in use
    or free; with `data_parallel_size` above 1 of all replicas, one after the other."""

    requests: list[RequestState]
    blocks_cached: int


@dataclass(slots=True)
class HeldEntries:
    """What each head holds of a sample's text (`LLM.held_entries`).

    Attributes:
        num_prompt_tokens: the length of the prompt.
        num_tokens: its logical length.
        positions: int32 [L, H, entries], logical positions of the entries of each layer and KV head, in the order of
            their slots, which is ascending; sliding layers, which hold the latest, are not among the L. Under unequal
            budgets as wide as the longest head: -1 stands behind the others' own.
    """

    num_prompt_tokens: int
    num_tokens: int
    positions: np.ndarray


def combine_metrics(samples: list[RequestMetrics]) -> RequestMetrics:
    """One record for all samples of a prompt: first token of any, end of the last, mean pace, summed counts."""

    def present(name: str) -> list[float]:
        return [value for sample in samples if (value := getattr(sample, name)) is not None]

    tpot = present("tpot")
    return RequestMetrics(
        arrival=samples[0].arrival,
        ttft=min(present("ttft"), default=None),
        tpot=sum(tpot) / len(tpot) if tpot else None,
        e2e=max(present("e2e"), default=None),
        queued=min(present("queued"), default=None),
        prompt_tokens=samples[0].prompt_tokens,
        output_tokens=sum(sample.output_tokens for sample in samples),
        cached_tokens=sum(sample.cached_tokens for sample in samples),
        preemptions=sum(sample.preemptions for sample in samples),
        pauses=sum(sample.pauses for sample in samples),
        compressions=sum(sample.compressions for sample in samples),
        peak_blocks=max(present("peak_blocks"), default=None),
        peak_sliding_blocks=max(present("peak_sliding_blocks"), default=None),
        query_slot=max(present("query_slot"), default=None),
    )
