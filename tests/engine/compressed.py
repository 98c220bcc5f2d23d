"""Engines that evict, and what makes their runs differ without changing a token."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tests import calibrations
from tests.eviction.cases import Case
from zipage import LLM, EventStats, HeldEntries, RequestOutput, RequestState, SamplingParams
from zipage.scheduling.batch import Batch
from zipage.scheduling.headroom import HEADROOM
from zipage.scheduling.planner import plan_step
from zipage.scheduling.request import Status

UNBOUNDED = 100_000


def make_llm(folder: Path, case: Case | None, budget: int = 64, headroom: int = HEADROOM, **options) -> LLM:
    """An engine in debug mode; `case` None is full KV. `recent`, protection and options are the case's.

    A `headroom` of 0 lets a small pool take in more requests than it can hold to their budgets: some have to leave.
    """
    defaults = {
        "skip_tokenizer_init": True,
        "device": "cpu",
        "block_size": 16,
        "num_blocks": 2048 // options.get("block_size", 16),
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "debug": True,
    }
    if case is not None:
        defaults |= {
            "policy": case.policy,
            "policy_options": calibrations.given(case.options, case.policy, folder),
            "budget_tokens": budget,
            "protection": case.protection,
            "recent_tokens": case.recent,
        }
    llm = LLM(str(folder), **defaults | options)
    if llm.config.data_parallel_size == 1:
        llm._core.scheduler.headroom.num_entries = headroom
    return llm


def greedy(max_tokens: int, **options) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    for output in outputs:
        assert output.error is None, output.error
    return [sample.token_ids for output in outputs for sample in output.outputs]


def random_prompts(lengths, vocab: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


def pause_now_and_then(llm: LLM, share: float = 0.2, seed: int = 0) -> None:
    """After a step, now and then, move a running request to host memory, for no reason."""
    rng = random.Random(seed)
    scheduler = llm._core.scheduler

    def pause(_step) -> None:
        running = [request for request in scheduler.running if request.status is Status.RUNNING]
        if running and rng.random() < share:
            batch = Batch()
            scheduler.pause(rng.choice(running), batch)
            llm._core.runner.move(plan_step(batch))
            llm._core.telemetry.record_moves(batch)

    llm.step_listeners.append(pause)


@dataclass
class Recorder:
    """What a model computed for one request, in float64: keys, values [L, H, T, d], queries [L, T, Hq, d], and the
    hidden states [L, T, width] that these are projections of, and what came of attention, outputs [L, T, Hq, d].
    """

    keys: dict[int, list] = field(default_factory=dict)
    values: dict[int, list] = field(default_factory=dict)
    queries: dict[int, list] = field(default_factory=dict)
    hidden: dict[int, list] = field(default_factory=dict)
    outputs: dict[int, list] = field(default_factory=dict)

    def wrap(self, attend):
        """`PagedAttention.__call__`, recorded."""

        def recorded(attention, layer, q, k, v):
            out = attend(attention, layer, q, k, v)
            for kind, x in (("queries", q), ("keys", k), ("values", v), ("outputs", out)):
                getattr(self, kind).setdefault(layer, []).append(x.double().cpu())
            return out

        return recorded

    def watch(self, forward):
        """`Decoder.forward`, its hidden states recorded."""

        def watched(decoder, token_ids, positions, attention, observe=None, recurrence=None):
            def both(layer, hidden):
                self.hidden.setdefault(layer, []).append(hidden.double().cpu())
                if observe is not None:
                    observe(layer, hidden)

            return forward(decoder, token_ids, positions, attention, both, recurrence)

        return watched

    def arrays(self, llm: LLM) -> dict[str, np.ndarray]:
        """As a `Simulation` takes them, with the model's output projection."""
        keys, values, queries, hidden = (
            torch.stack([torch.cat(parts[layer]) for layer in sorted(parts)])
            for parts in (self.keys, self.values, self.queries, self.hidden)
        )
        arrays = {"keys": keys.transpose(1, 2), "values": values.transpose(1, 2), "queries": queries, "hidden": hidden}
        heads, group, dim = keys.shape[2], queries.shape[2] // keys.shape[2], keys.shape[3]
        weights = torch.stack([layer.output_weight for layer in llm._core.runner.decoder.attending]).double().cpu()
        arrays["output"] = weights.mT.unflatten(1, (heads, group, dim))
        return {name: array.numpy() for name, array in arrays.items()}


def generation_of(case: Case, keep: int, size: int) -> tuple[int, int]:
    """Tokens of the prompt and those generated until a request was compressed twice, to `keep` from `size` more.

    Where a rule tells a prompt's tokens from others, it is short; else the first compression comes soon after it.
    """
    prompt = 24 if case.protection == "prompt" or case.policy == "lazy_eviction" else keep + size - 4
    return prompt, keep + 2 * size + 2 - prompt


def record_events(llm: LLM) -> list[EventStats]:
    events: list[EventStats] = []
    llm.event_listeners.append(events.append)
    return events


def count_orders(llm: LLM) -> list[int]:
    """Of each time that compressions are ordered, how many."""
    scheduler, counts = llm._core.scheduler, []
    order = scheduler.order_compressions

    def counted():
        orders = order()
        counts.append(len(orders))
        return orders

    scheduler.order_compressions = counted
    return counts


def ended_while_paused(events: list[EventStats]) -> int:
    """Samples whose last move was a pause: the step under way then brought their last token. Nothing resumes them."""
    moves = {(e.request_id, e.sample_index): e.kind for e in events if e.kind in ("pause", "resume")}
    return sum(kind == "pause" for kind in moves.values())


Look = tuple[RequestState, HeldEntries | None, EventStats | None]


def looks(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[dict[str, list[Look]], list[list[int]]]:
    """Of each request, its state, what it holds and its last compression, after every step; and the tokens."""
    events = record_events(llm)
    seen: dict[str, list[Look]] = {llm.add_request(prompt, params): [] for prompt in prompts}
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
        snapshot = llm.snapshot()
        assert 0 <= snapshot.blocks_cached <= llm.stats.blocks_total
        for state in snapshot.requests:
            compressions = [e for e in events if e.request_id == state.request_id and e.kind == "compress"]
            held = llm.held_entries(state.request_id, state.sample_index)
            seen[state.request_id].append((state, held, compressions[-1] if compressions else None))
    llm.event_listeners.remove(events.append)
    by_name = {output.request_id: output for output in outputs}
    return seen, tokens_of([by_name[name] for name in seen])


def check_look(state: RequestState, held: HeldEntries | None, event: EventStats | None, heads: tuple[int, int]) -> None:
    """What stayed at the last compression, with `trace_positions`, and all that came after it."""
    assert (held is not None) == (state.status == "running"), state
    if held is None:
        return
    assert held.num_tokens == state.num_tokens <= state.max_total_tokens
    assert held.num_prompt_tokens == state.num_prompt_tokens
    assert held.positions.shape == (*heads, state.entries)
    assert (np.diff(held.positions) > 0).all()
    if event is None:
        assert (held.positions == np.arange(state.entries)).all()
    else:
        keep = state.budget_tokens
        assert state.compressions == event.round + 1
        assert (held.positions[..., :keep] == event.kept_positions).all()
        assert (held.positions[..., keep:] == np.arange(state.entries - keep) + event.num_tokens - 1).all()
