"""Logits to tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.sample_from_logits import invert, sample_from_logits
from zipage.counters import uniform_rows
from zipage.sampling_params import SamplingParams
from zipage.scheduling.request import Request
from zipage.transfer import to_device
from zipage.worker.logit_edits import banned_tokens, output_penalties


class Logprobs(NamedTuple):
    """Of a batch of N tokens, under the raw logits.

    Attributes:
        chosen: float32 [N], of the tokens drawn; `ranks` int64 [N] theirs, 1 for the most likely.
        top, top_ids: float32 and int64 [N, K], of the most likely tokens in order; K is the most that any row asks for.
    """

    chosen: Tensor
    ranks: Tensor
    top: Tensor
    top_ids: Tensor


class Sampler:
    """Picks the next token of each request of a batch.

    Args:
        max_num_seqs: rows of the token record that repetition penalties need; made at the first request that has one.
        vocab_size: length of a row of logits.
        device: of the logits.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (max_num_seqs, vocab_size)
        self._device = device
        self._seen: Tensor | None = None
        self._owners: list[tuple[Request, int] | None] = [None] * max_num_seqs

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> tuple[Tensor, Logprobs | None]:
        """Pick one token per row.

        Args:
            logits: [N, vocab], any float type; row i belongs to `requests[i]`.

        Returns:
            Tokens, int64 [N], -1 for a row with NaN or +inf, or without a finite logit; and log-probabilities,
            or None where no request asks for any.
        """
        params = [request.params for request in requests]
        raw = logits if any(p.logprobs is not None for p in params) else None
        if any(p.edits_logits for p in params):
            logits = self._edit(logits, requests)
        if all(p.temperature == 0 for p in params):
            tokens = _where_finite(*logits.max(dim=-1))
        else:
            tokens = self._draw(logits, requests)
        if raw is None:
            return tokens, None
        logprobs = raw.log_softmax(dim=-1, dtype=torch.float32)
        chosen = logprobs.gather(1, tokens.clamp(min=0)[:, None])
        ranks = 1 + (logprobs > chosen).sum(dim=-1)
        most = min(max(p.logprobs or 0 for p in params), self._shape[1])
        return tokens, Logprobs(chosen.squeeze(1), ranks, *logprobs.topk(most, dim=-1))

    def _column(self, values: list, dtype: type = np.float32) -> Tensor:
        return to_device(values, self._device, dtype)[:, None]

    def _draw(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """Rows are drawn by what they themselves ask for, so that no tokens depend on the neighbours' options."""
        temperature = self._column([request.params.temperature for request in requests])
        numbers = uniform_rows(
            np.array([request.seed for request in requests], dtype=np.int64),
            np.array([request.index for request in requests], dtype=np.int64),
            np.array([request.num_output_tokens for request in requests], dtype=np.int64),
        )
        u = to_device(numbers, self._device)[:, None]
        rows_of: dict[Callable, list[int]] = {}
        for row, request in enumerate(requests):
            rows_of.setdefault(self._way_to_draw(request.params), []).append(row)
        if len(rows_of) == 1:
            return next(iter(rows_of))(logits, temperature, u, requests)
        tokens = torch.empty(len(requests), dtype=torch.int64, device=self._device)
        for draw, places in rows_of.items():
            rows = to_device(places, self._device, np.int64)
            tokens[rows] = draw(logits[rows], temperature[rows], u[rows], [requests[row] for row in places])
        return tokens

    def _way_to_draw(self, params: SamplingParams) -> Callable[[Tensor, Tensor, Tensor, Sequence[Request]], Tensor]:
        if params.temperature == 0 or (params.top_k == 0 and params.top_p == 1 and params.min_p == 0):
            return self._draw_from_all
        return self._draw_in_order if params.top_k == 0 and params.top_p == 1 else self._draw_ranked

    def _draw_from_all(self, logits: Tensor, temperature: Tensor, u: Tensor, _requests: Sequence[Request]) -> Tensor:
        """Rows without a cut, and greedy ones."""
        return sample_from_logits(logits, temperature.squeeze(1), u.squeeze(1))

    def _draw_in_order(self, logits: Tensor, temperature: Tensor, u: Tensor, requests: Sequence[Request]) -> Tensor:
        """Rows with `min_p` alone: inverted in the order of the vocabulary."""
        probs = self._probs(logits, temperature, requests)
        return _where_finite(logits.amax(dim=-1), invert(probs, u).squeeze(1))

    def _draw_ranked(self, logits: Tensor, temperature: Tensor, u: Tensor, requests: Sequence[Request]) -> Tensor:
        """Rows with `top_k` or `top_p`: inverted from the most likely token down."""
        params = [request.params for request in requests]
        ranked, order = self._probs(logits, temperature, requests).sort(dim=-1, descending=True, stable=True)
        k = self._column([min(p.top_k or self._shape[1], self._shape[1]) for p in params], np.int64)
        rank = torch.arange(ranked.shape[1], device=self._device)[None, :]
        ranked = ranked.masked_fill(rank >= k, 0.0)
        top_p = self._column([p.top_p for p in params]) * ranked.sum(dim=-1, keepdim=True)
        before = ranked.cumsum(dim=-1) - ranked
        ranked = ranked.masked_fill((before >= top_p) & (rank > 0) & (top_p < ranked.sum(-1, keepdim=True)), 0.0)
        return _where_finite(logits.amax(dim=-1), order.gather(1, invert(ranked, u)).squeeze(1))

    def _probs(self, logits: Tensor, temperature: Tensor, requests: Sequence[Request]) -> Tensor:
        """float32 [N, vocab], 0 where `min_p` cuts."""
        probs = (logits.float() / temperature).softmax(dim=-1)
        min_p = [request.params.min_p for request in requests]
        if any(min_p):
            probs = probs.masked_fill(probs < self._column(min_p) * probs.amax(dim=-1, keepdim=True), 0.0)
        return probs

    def _edit(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """float32 [N, vocab]; in the order of vLLM: bans, biases, repetition, presence and frequency."""
        logits = logits.to(torch.float32, copy=True)
        editing = [(row, request) for row, request in enumerate(requests) if request.params.edits_logits]
        self._add(logits, ((row, dict.fromkeys(banned_tokens(r), -torch.inf)) for row, r in editing))
        self._add(logits, ((row, r.params.logit_bias or {}) for row, r in editing))
        if any(r.params.repetition_penalty != 1.0 for _, r in editing):
            logits = self._penalise(logits, requests)
        self._add(logits, ((row, output_penalties(r)) for row, r in editing))
        return logits

    def _add(self, logits: Tensor, edits: Iterable[tuple[int, dict[int, float]]]) -> None:
        """Add values to tokens' logits, by row."""
        flat = [(row, token, value) for row, values in edits for token, value in values.items()]
        if flat:
            rows, tokens, values = zip(*flat)
            places = to_device(rows, self._device, np.int64), to_device(tokens, self._device, np.int64)
            logits.index_put_(places, to_device(values, self._device, np.float32), accumulate=True)

    def _penalise(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        for request in requests:
            if request.params.repetition_penalty != 1.0:
                owner = self._owners[request.row]
                known = owner[1] if owner is not None and owner[0] is request else 0
                if known == 0:
                    self._seen[request.row] = False
                new = to_device(request.token_ids[known:], self._device, np.int64)
                self._seen[request.row, new] = True
                self._owners[request.row] = (request, request.num_tokens)
        rows = to_device([request.row for request in requests], self._device, np.int64)
        penalty = self._column([request.params.repetition_penalty for request in requests])
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        seen = self._seen[rows] & (penalty != 1.0)
        return torch.where(seen, penalised, logits)


def _where_finite(largest: Tensor, tokens: Tensor) -> Tensor:
    """`tokens` [N], and -1 where the largest logit of a row is NaN or infinite."""
    return torch.where(largest - largest == 0, tokens, -1)
