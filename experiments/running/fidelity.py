"""How far a policy's distributions are from full KV's, token by token, on texts that both are fed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from experiments.backends import Backend
from experiments.running.scenarios import Served, TimedRequest, serve
from zipage import CompletionOutput, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 256
"""Of one text whose distributions are held at once: 4 x 156 MB for a vocabulary of 152,000."""


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


@dataclass(frozen=True)
class Measured:
    """What came of a run.

    Attributes:
        served: of full KV's outputs under the policy.
        own, worked: fidelity on those, and on the worked solutions of those problems that have one, by request id.
        A request that full KV or the policy could not serve is in neither.
    """

    served: Served
    own: dict[str, Fidelity]
    worked: dict[str, Fidelity]


def measure(
    backend: Backend,
    requests: Sequence[TimedRequest],
    worked: Mapping[str, list[int]],
    recorded: Iterable[list[Any]],
) -> Measured:
    """Let full KV answer, feed its outputs through the policy, and compare; then the same with worked solutions.

    Args:
        backend: Zipage's engine, under the policy.
        requests: of one sample each.
        worked: tokens of worked solutions, by request id.
        recorded: lists that listeners of the backend fill; afterwards they hold what belongs to `Measured.served`.
    """
    with_full = [_asking(request, policy="full", budget_tokens=None) for request in requests]
    full = serve(backend, with_full)
    forced = [r for r in (_forced(r, _tokens(full, r)) for r in requests) if r is not None]
    _drop(recorded, since=None)
    served = serve(backend, forced)
    kept = [len(rows) for rows in recorded]
    own = _compare(backend, full, served)
    solved = [r for r in (_forced(r, worked.get(r.id)) for r in requests) if r is not None]
    fidelity = {}
    if solved:
        known = serve(backend, [_asking(request, policy="full", budget_tokens=None) for request in solved])
        fidelity = _compare(backend, known, serve(backend, solved))
    _drop(recorded, since=kept)
    for request in requests:
        served.outputs.setdefault(request.id, full.outputs[request.id])
    return Measured(served, own, fidelity)


def _drop(recorded: Iterable[list[Any]], since: Sequence[int] | None) -> None:
    """What was recorded, all of it, or from a number of rows on."""
    for place, rows in enumerate(recorded):
        del rows[0 if since is None else since[place] :]


def _asking(request: TimedRequest, **options: Any) -> TimedRequest:
    return replace(request, params=_replaced(request.params, return_hidden_states=True, **options))


def _forced(request: TimedRequest, tokens: list[int] | None) -> TimedRequest | None:
    """The request with its output given; None without one."""
    if not tokens:
        return None
    given = {"forced_token_ids": tokens, "max_tokens": len(tokens), "min_tokens": 0}
    return _asking(request, **given, follow_ups=(), max_turn_tokens=None)


def _replaced(params: SamplingParams, **options: Any) -> SamplingParams:
    return SamplingParams(**{name: getattr(params, name) for name in SamplingParams.names()} | options)


def _sample(served: Served, request_id: str) -> CompletionOutput | None:
    """The answer, if there is one."""
    output = served.outputs.get(request_id)
    if output is None or output.error is not None or not output.outputs:
        return None
    sample = output.outputs[0]
    return None if sample.error is not None or sample.hidden_states is None else sample


def _tokens(full: Served, request: TimedRequest) -> list[int] | None:
    sample = _sample(full, request.id)
    return None if sample is None else sample.token_ids


def _compare(backend: Backend, full: Served, policy: Served) -> dict[str, Fidelity]:
    compared = {}
    for request_id in policy.outputs:
        pair = _sample(full, request_id), _sample(policy, request_id)
        if None not in pair and pair[0].token_ids == pair[1].token_ids:
            states = [sample.hidden_states for sample in pair]
            compared[request_id] = compare(backend.compute_logits, *states, pair[0].token_ids)
            for sample in pair:
                sample.hidden_states = None
    return compared


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
    for begin in range(0, len(token_ids), TOKENS):
        part = slice(begin, begin + TOKENS)
        p, q = (compute_logits(states[part]).log_softmax(dim=-1) for states in (full, policy))
        chosen = torch.tensor(token_ids[part], device=p.device)[:, None]
        divergence = (p.exp() * (p - q)).sum(dim=-1).clamp_min(0)
        agrees = p.argmax(dim=-1) == q.argmax(dim=-1)
        pieces.append([divergence, agrees, *(x.gather(1, chosen).squeeze(1) for x in (q, p))])
    return Fidelity(*(torch.cat(column).tolist() for column in zip(*pieces, strict=True)))
