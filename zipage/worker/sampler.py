"""Logits to tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.sample_from_logits import invert, sample_from_logits
from zipage.counters import uniform_rows
from zipage.scheduling.plan import RowStart
from zipage.transfer import to_device
from zipage.worker.logit_edits import banned_tokens, output_penalties
from zipage.worker.sampling_rows import FROM_ALL, IN_ORDER, RANKED, SamplingRows


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


class _Edit(NamedTuple):
    """A row of a batch whose logits are changed; `output` is known where the options need it."""

    place: int
    start: RowStart
    num_output: int
    output: array


class Sampler:
    """Picks the next token of each request of a batch.

    Args:
        max_num_seqs: rows of the batch.
        vocab_size: length of a row of logits.
        device: of the logits.

    Attributes:
        rows: what each row asks for; `begin` tells it of a new request.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.rows = SamplingRows(max_num_seqs)
        self._shape = (max_num_seqs, vocab_size)
        self._device = device
        self._seen: Tensor | None = None
        """Tokens of each row's text, for repetition penalties; made at the first request that has one."""
        self._num_seen = [0] * max_num_seqs

    def begin(self, start: RowStart) -> None:
        """A request takes a row."""
        self.rows.begin(start)
        self._num_seen[start.row] = 0

    def sample(
        self, logits: Tensor, rows: np.ndarray, lens: np.ndarray, token_ids: np.ndarray
    ) -> tuple[Tensor, Logprobs | None]:
        """Pick one token for each of N requests.

        Args:
            logits: [N, vocab], any float type.
            rows: int64 [N], theirs.
            lens: int64 [N], tokens of their texts so far.
            token_ids: int64 [N], the last of these; read for requests with `needs_history`.

        Returns:
            Tokens, int64 [N], -1 for a row with NaN or +inf, or without a finite logit; and log-probabilities,
            or None where no request asks for any.
        """
        options = self.rows.of(rows)
        most = int(options["num_logprobs"].max())
        raw = logits if most >= 0 else None
        if options["edits_logits"].any():
            logits = self._edit(logits, options, rows, lens, token_ids)
        if not options["temperature"].any():
            tokens = _where_finite(*logits.max(dim=-1))
        else:
            tokens = self._draw(logits, options, lens)
        if raw is None:
            return tokens, None
        logprobs = raw.log_softmax(dim=-1, dtype=torch.float32)
        chosen = logprobs.gather(1, tokens.clamp(min=0)[:, None])
        ranks = 1 + (logprobs > chosen).sum(dim=-1)
        most = min(most, self._shape[1])
        return tokens, Logprobs(chosen.squeeze(1), ranks, *logprobs.topk(most, dim=-1))

    def _column(self, values: np.ndarray, dtype: type = np.float32) -> Tensor:
        return to_device(values, self._device, dtype)[:, None]

    def _draw(self, logits: Tensor, options: np.ndarray, lens: np.ndarray) -> Tensor:
        """Rows are drawn by what they themselves ask for, so that no tokens depend on the neighbours' options."""
        numbers = uniform_rows(options["seed"], options["index"], lens - options["num_prompt_tokens"])
        u = to_device(numbers, self._device)[:, None]
        ways = {FROM_ALL: self._draw_from_all, IN_ORDER: self._draw_in_order, RANKED: self._draw_ranked}
        places_of = {way: np.flatnonzero(options["draw"] == way) for way in ways}
        tokens = torch.empty(len(options), dtype=torch.int64, device=self._device)
        for way, places in places_of.items():
            if len(places) == len(options):
                return ways[way](logits, u, options)
            if len(places):
                rows = to_device(places, self._device)
                tokens[rows] = ways[way](logits[rows], u[rows], options.take(places))
        return tokens

    def _draw_from_all(self, logits: Tensor, u: Tensor, options: np.ndarray) -> Tensor:
        """Rows without a cut, and greedy ones."""
        return sample_from_logits(logits, self._column(options["temperature"]).squeeze(1), u.squeeze(1))

    def _draw_in_order(self, logits: Tensor, u: Tensor, options: np.ndarray) -> Tensor:
        """Rows with `min_p` alone: inverted in the order of the vocabulary."""
        return _where_finite(logits.amax(dim=-1), invert(self._probs(logits, options), u).squeeze(1))

    def _draw_ranked(self, logits: Tensor, u: Tensor, options: np.ndarray) -> Tensor:
        """Rows with `top_k` or `top_p`: inverted from the most likely token down."""
        ranked, order = self._probs(logits, options).sort(dim=-1, descending=True, stable=True)
        top_k = options["top_k"]
        k = self._column(np.where(top_k == 0, self._shape[1], top_k), np.int64)
        rank = torch.arange(ranked.shape[1], device=self._device)[None, :]
        ranked = ranked.masked_fill(rank >= k, 0.0)
        top_p = self._column(options["top_p"]) * ranked.sum(dim=-1, keepdim=True)
        before = ranked.cumsum(dim=-1) - ranked
        ranked = ranked.masked_fill((before >= top_p) & (rank > 0) & (top_p < ranked.sum(-1, keepdim=True)), 0.0)
        return _where_finite(logits.amax(dim=-1), order.gather(1, invert(ranked, u)).squeeze(1))

    def _probs(self, logits: Tensor, options: np.ndarray) -> Tensor:
        """float32 [N, vocab], 0 where `min_p` cuts."""
        probs = (logits.float() / self._column(options["temperature"])).softmax(dim=-1)
        min_p = options["min_p"]
        if min_p.any():
            probs = probs.masked_fill(probs < self._column(min_p) * probs.amax(dim=-1, keepdim=True), 0.0)
        return probs

    def _edit(
        self, logits: Tensor, options: np.ndarray, rows: np.ndarray, lens: np.ndarray, token_ids: np.ndarray
    ) -> Tensor:
        """float32 [N, vocab]; in the order of vLLM: bans, biases, repetition, presence and frequency."""
        logits = logits.to(torch.float32, copy=True)
        with_history = options["needs_history"]
        self.rows.extend(*(values[with_history].tolist() for values in (rows, lens, token_ids)))
        edits = []
        for place in np.flatnonzero(options["edits_logits"]).tolist():
            start = self.rows.starts[rows[place]]
            num_prompt = start.num_prompt_tokens
            output = self.rows.texts[rows[place]][num_prompt:]
            edits.append(_Edit(place, start, int(lens[place]) - num_prompt, output))
        banned = ((e.place, banned_tokens(e.start, e.num_output, e.output)) for e in edits)
        self._add(logits, ((place, dict.fromkeys(tokens, -torch.inf)) for place, tokens in banned))
        self._add(logits, ((e.place, e.start.sampling_params.logit_bias or {}) for e in edits))
        if (options["repetition_penalty"] != 1).any():
            logits = self._penalise(logits, options, rows)
        self._add(logits, ((e.place, output_penalties(e.start, e.output)) for e in edits))
        return logits

    def _add(self, logits: Tensor, edits: Iterable[tuple[int, Mapping[int, float]]]) -> None:
        """Add values to tokens' logits, by row of `logits`."""
        flat = [(place, token, value) for place, values in edits for token, value in values.items()]
        if flat:
            places, tokens, values = zip(*flat)
            at = to_device(places, self._device, np.int64), to_device(tokens, self._device, np.int64)
            logits.index_put_(at, to_device(values, self._device, np.float32), accumulate=True)

    def _penalise(self, logits: Tensor, options: np.ndarray, rows: np.ndarray) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        for row in rows[options["repetition_penalty"] != 1].tolist():
            text, known = self.rows.texts[row], self._num_seen[row]
            if known == 0:
                self._seen[row] = False
            self._seen[row, to_device(text[known:], self._device, np.int64)] = True
            self._num_seen[row] = len(text)
        penalty = self._column(options["repetition_penalty"])
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        seen = self._seen[to_device(rows, self._device)] & (penalty != 1.0)
        return torch.where(seen, penalised, logits)


def _where_finite(largest: Tensor, tokens: Tensor) -> Tensor:
    """`tokens` [N], and -1 where the largest logit of a row is NaN or infinite."""
    return torch.where(largest - largest == 0, tokens, -1)
