"""How far a policy's distributions are from full KV's, token by token, on texts that both are fed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from experiments.backends import Backend
from experiments.running.scenarios import Served, TimedRequest, serve
from zipage import CompletionOutput, EngineStats, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

HELD_TOKENS = 2**18
"""Whose hidden states are on the host at once, under full KV and under the policy: 2 x 0.8 GB for 1,536 of 2 bytes."""

LOGIT_TOKENS = 64
"""Of one text whose distributions are on the device at once, where no memory is reserved for them: six tensors of
39 MB for a vocabulary of 152,000."""

GAUGES = ("num_running", "num_waiting", "num_compressing", "query_slots_used", "blocks_used", "blocks_total")
"""Of `EngineStats`: all else in it counts from the engine's start."""

FULL = {"policy": "full", "budget_tokens": None}


@dataclass(frozen=True)
class Fidelity:
    """Of one text, an element for each of its tokens; log-probabilities in nats.

    Attributes:
        divergences: KL(full KV || policy).
        agrees: whether both find the same token the most likely.
        logprobs, full_logprobs: of the token that stands there, under the policy and under full KV.
    """

    divergences: list[float]
    agrees: list[bool]
    logprobs: list[float]
    full_logprobs: list[float]


@dataclass
class Texts:
    """What came of texts that were fed through full KV's cache and the policy's.

    Attributes:
        served: under the policy. Where the texts took several passes, `seconds` is that of all, and the clock has gaps.
        counters: as `EngineStats`, of the passes under the policy alone.
        fidelity: of the texts that both took whole, by request id.
        unmeasured: why the others were not measured, by request id.
    """

    served: Served
    counters: dict[str, Any] = field(default_factory=dict)
    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What came of a run.

    Attributes:
        own: full KV's outputs as texts. `own.served` has all requests, those that full KV did not answer too.
        worked: the worked solutions of those problems that have one; None where none has.
    """

    own: Texts
    worked: Texts | None


def measure(
    backend: Backend,
    requests: Sequence[TimedRequest],
    worked: Mapping[str, list[int]],
    recorded: Sequence[list[Any]],
) -> Measured:
    """Let full KV answer, feed its outputs through both caches, and compare; then the same with worked solutions.

    Hidden states are held of `HELD_TOKENS` tokens at most, or of one text where that is longer: as many texts are fed
    and compared together. Where all outputs fit however long they get, the answering pass is full KV's side.

    Args:
        backend: Zipage's engine, under the policy.
        requests: of one sample each.
        worked: tokens of worked solutions, by request id.
        recorded: lists that listeners of the backend fill; afterwards they hold what belongs to `Measured.own.served`.
    """
    at_once = sum(request.params.max_tokens or HELD_TOKENS for request in requests) <= HELD_TOKENS
    asked = [_asking(request, **FULL, return_hidden_states=at_once) for request in requests]
    full = _unrecorded(backend, asked, recorded)
    outputs = {id: sample.token_ids for id, output in full.outputs.items() if (sample := _sample(output)) is not None}
    own = _feed(backend, requests, outputs, recorded, full if at_once else None)
    kept = [len(rows) for rows in recorded]
    solved = _feed(backend, requests, worked, recorded) if any(worked.values()) else None
    _cut(recorded, kept)
    for request in requests:
        own.served.outputs.setdefault(request.id, full.outputs[request.id])
    return Measured(own, solved)


def _feed(
    backend: Backend,
    requests: Sequence[TimedRequest],
    texts: Mapping[str, list[int]],
    recorded: Sequence[list[Any]],
    full: Served | None = None,
) -> Texts:
    """Compare the texts of the requests that have one, in groups; passes under full KV are not recorded.

    Args:
        full: the pass that drew the texts, if it has their hidden states.
    """
    forced = [_forced(request, texts[request.id]) for request in requests if texts.get(request.id)]
    found = Texts(Served({}, time.perf_counter(), 0.0))
    for number, group in enumerate([forced] if full is not None else _groups(forced)):
        known = full or _unrecorded(backend, [_asking(request, **FULL) for request in group], recorded)
        before = backend.stats
        served = serve(backend, group)
        _count(found.counters, before, backend.stats)
        if not number:
            found.served.start = served.start
        found.served.seconds += served.seconds
        found.served.outputs |= served.outputs
        for request in group:
            tokens = request.params.forced_token_ids
            sides = {"full KV": known.outputs[request.id], "the policy": served.outputs[request.id]}
            faults = [f"{who}: {fault}" for who, side in sides.items() if (fault := _fault(side, tokens))]
            samples = [_sample(side) for side in sides.values()]
            if faults:
                found.unmeasured[request.id] = faults[0]
            else:
                states = [sample.hidden_states for sample in samples]
                found.fidelity[request.id] = compare(backend.compute_logits, *states, tokens)
            for sample in filter(None, samples):
                sample.hidden_states = None
    return found


def _groups(requests: Sequence[TimedRequest]) -> Iterator[list[TimedRequest]]:
    """Neighbours with texts of `HELD_TOKENS` tokens at most, or one text where that is longer; one group at least."""
    group: list[TimedRequest] = []
    held = 0
    for request in requests:
        held += request.params.max_tokens
        if group and held > HELD_TOKENS:
            yield group
            group, held = [], request.params.max_tokens
        group.append(request)
    yield group


def _unrecorded(backend: Backend, requests: Sequence[TimedRequest], recorded: Sequence[list[Any]]) -> Served:
    before = [len(rows) for rows in recorded]
    served = serve(backend, requests)
    _cut(recorded, before)
    return served


def _cut(recorded: Sequence[list[Any]], kept: Sequence[int]) -> None:
    for rows, count in zip(recorded, kept, strict=True):
        del rows[count:]


def _count(counters: dict[str, Any], before: EngineStats, after: EngineStats) -> None:
    """Add what an engine counted between two times; gauges are as they were at the second."""
    was = asdict(before)
    for name, value in asdict(after).items():
        counters[name] = value if name in GAUGES else counters.get(name, 0) + value - was[name]


def _asking(request: TimedRequest, **options: Any) -> TimedRequest:
    given = {name: getattr(request.params, name) for name in SamplingParams.names()}
    return replace(request, params=SamplingParams(**given | options))


def _forced(request: TimedRequest, tokens: list[int]) -> TimedRequest:
    """The request with its output given."""
    given = {"forced_token_ids": tokens, "max_tokens": len(tokens), "min_tokens": 0, "return_hidden_states": True}
    return _asking(request, **given, follow_ups=(), max_turn_tokens=None)


def _sample(output: RequestOutput) -> CompletionOutput | None:
    """The answer, if there is one."""
    if output.error is not None or not output.outputs or output.outputs[0].error is not None:
        return None
    return output.outputs[0]


def _fault(output: RequestOutput, tokens: Sequence[int]) -> str | None:
    """Why a text that was fed can't be compared."""
    sample = _sample(output)
    if sample is None:
        return output.error or output.outputs[0].error
    if list(sample.token_ids) != list(tokens):
        return f"cut after {len(sample.token_ids)} of {len(tokens)} tokens ({sample.finish_reason})"
    return None


def compare(
    compute_logits: Callable[[Tensor], Tensor], full: Tensor, policy: Tensor, token_ids: Sequence[int]
) -> Fidelity:
    """Compare the distributions that hidden states give.

    Args:
        compute_logits: [T, width] -> float32 [T, vocab].
        full, policy: hidden states [T, width] under full KV and under the policy.
        token_ids: the text, T tokens.
    """
    import torch  # only once there is something to compare

    pieces = []
    for begin in range(0, len(token_ids), LOGIT_TOKENS):
        part = slice(begin, begin + LOGIT_TOKENS)
        p, q = (compute_logits(states[part]).log_softmax(dim=-1) for states in (full, policy))
        chosen = torch.tensor(token_ids[part], device=p.device)[:, None]
        divergence = (p.exp() * (p - q)).sum(dim=-1).clamp_min(0)
        agrees = p.argmax(dim=-1) == q.argmax(dim=-1)
        pieces.append([divergence, agrees, *(x.gather(1, chosen).squeeze(1) for x in (q, p))])
    return Fidelity(*(torch.cat(column).tolist() for column in zip(*pieces, strict=True)))
