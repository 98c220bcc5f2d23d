"""A paged cache and the requests that hold its blocks, as an engine would keep them around a compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.cache_view import shared
from kernels.store_positions import store_positions
from kernels.store_predictions import store_predictions
from kernels.store_step import store_step
from tests import calibrations
from tests.eviction.dense_event import NAN, Tokens, calibration, rotary
from tests.kernels.paged import GARBAGE
from zipage.eviction.policy import Policy
from zipage.eviction.protection import Protection, forced_mask
from zipage.worker.compressor import compress
from zipage.worker.output_norms import OutputNorms
from zipage.worker.paged_event import PagedEvent

NOWHERE = -7
"""The position of a slot without an entry."""


@dataclass(eq=False)
class Request:
    tokens: Tokens
    query_slot: int
    blocks: list[int] = field(default_factory=list)
    n: int = 0
    seen: int = 0
    carried: int = 0
    rounds: int = 0


@dataclass(eq=False)
class PagedCache:
    """Slots that hold no entry are NaN, blocks are handed out in no order, and tables end in garbage.

    Attributes:
        all_tokens: of each request.
        keep, recent, protection: k, r and the rule of every event.
        ring: w_cache, queries kept of a request.
        pinned: leading blocks of protected entries alone stay in a request's table, shared or not.
        spare: blocks beyond what the requests' tokens would fill.
    """

    all_tokens: Sequence[Tokens]
    block_size: int
    keep: int = 64
    recent: int = 16
    protection: str = "none"
    ring: int = 16
    pinned: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    spare: int = 8

    def __post_init__(self):
        layers, heads, total, head_dim = self.all_tokens[0].keys.shape
        query_heads = self.all_tokens[0].queries.shape[2]
        num_blocks = len(self.all_tokens) * (total // self.block_size + 1) + self.spare
        shape = layers, num_blocks, heads, self.block_size
        self.k = torch.full((*shape, head_dim), NAN, dtype=self.dtype, device=self.device)
        self.v = torch.full_like(self.k, NAN)
        self.positions = torch.full(shape, NOWHERE, dtype=torch.int32, device=self.device)
        self.scores = torch.full(shape, NAN, device=self.device)
        self.more_scores, self.predictions = (torch.full(shape, NAN, device=self.device) for _ in range(2))
        slots = len(self.all_tokens) + 2
        self.q = torch.full((layers, slots, self.ring, query_heads, head_dim), NAN, dtype=self.dtype).to(self.device)
        self.free = torch.randperm(num_blocks).tolist()
        self.holders = [0] * num_blocks
        order = torch.randperm(slots).tolist()
        self.requests = [Request(tokens, slot) for tokens, slot in zip(self.all_tokens, order, strict=False)]

    @property
    def everything(self) -> tuple[Tensor, ...]:
        return self.k, self.v, self.positions, self.scores, self.more_scores, self.predictions

    def grow(self, i: int, n: int) -> None:
        """Store the tokens that bring request `i` to `n` entries."""
        one = self.requests[i]
        while len(one.blocks) * self.block_size < n:
            one.blocks.append(self._take())
        new = torch.arange(one.seen, one.seen + n - one.n)
        at = torch.arange(one.n, n)
        slots = torch.tensor(one.blocks)[at // self.block_size] * self.block_size + at % self.block_size
        places = one.query_slot * self.ring + new % self.ring
        places[: -self.ring] = -1
        slots, places = slots.to(self.device), places.to(self.device)
        for layer in range(len(self.k)):
            entries = (x[layer][:, new].transpose(0, 1) for x in (one.tokens.keys, one.tokens.values))
            k, v = (x.contiguous().to(self.device, self.dtype) for x in entries)
            queries = one.tokens.queries[layer, new].to(self.device, self.dtype)
            caches = self.k[layer], self.v[layer], self.q[layer]
            store_step(k, v, queries, *caches, shared(slots, k.shape[1]), places)
        layers, _, heads, _ = self.positions.shape
        store_positions(new.int().to(self.device), self.positions, shared(slots, heads, layers))
        if one.tokens.hidden is not None:
            known = calibrations.arrays("kvzap", layers, heads, self.q.shape[3] // heads, self.k.shape[4])
            weight, bias = (torch.from_numpy(known[name]).to(self.device) for name in ("weight", "bias"))
            for layer, hidden in enumerate(one.tokens.hidden[:, new].to(self.device)):
                store_predictions(hidden, weight[layer], bias[layer], self.predictions[layer], shared(slots, heads))
        one.seen += len(new)
        one.n = n

    def share(self, i: int, j: int, n: int) -> None:
        """Request `j`, still empty, takes over the first `n` entries of `i`, whole blocks of them."""
        one, other = self.requests[i], self.requests[j]
        assert n % self.block_size == 0
        assert torch.equal(one.tokens.keys[:, :, :n], other.tokens.keys[:, :, :n])
        other.blocks = one.blocks[: n // self.block_size]
        for block in other.blocks:
            self.holders[block] += 1
        other.n = other.seen = n

    def protected(self, policy: Policy, i: int) -> int:
        """Leading entries of request `i` that stay at every event."""
        rule = Protection.parse(self.protection, policy.implied_protection)
        return rule.length(self.requests[i].tokens.prompt_len, self.keep, self.recent, policy.page)

    def event(self, policy: Policy, batch: Sequence[int]) -> PagedEvent:
        held = [self.requests[i] for i in batch]
        layers, _, heads, block_size, head_dim = self.k.shape
        tables = self._tables([one.blocks[: -(-one.n // block_size)] for one in held])
        protected = self._ints([self.protected(policy, i) for i in batch])
        lens = self._ints([one.n for one in held])
        return PagedEvent(
            num_layers=layers,
            num_heads=heads,
            group_size=self.q.shape[3] // heads,
            head_dim=head_dim,
            window=policy.num_queries,
            lens=lens,
            keep=self._ints([self.keep] * len(held)),
            forced=forced_mask(lens, protected, self.recent, tables.shape[1] * block_size),
            protected=protected,
            carried=self._ints([one.carried for one in held]),
            seeds=[one.tokens.seed for one in held],
            rounds=[one.rounds for one in held],
            prompt_lens=[one.tokens.prompt_len for one in held],
            logical_lens=self._ints([one.seen for one in held]),
            inv_freq=rotary(head_dim).to(self.device),
            calibration=calibration(policy, layers, heads, self.q.shape[3] // heads, head_dim, self.device),
            scales=(head_dim**-0.5,) * layers,
            k_cache=self.k,
            v_cache=self.v,
            block_tables=tables,
            q_cache=self.q if policy.needs_queries else None,
            query_slots=self._ints([one.query_slot for one in held]),
            state_caches=[self.scores, self.more_scores][: policy.num_states],
            outputs=self.outputs(policy),
            prediction_cache=self.predictions if policy.predicts else None,
        )

    def outputs(self, policy: Policy) -> OutputNorms | None:
        """Of the made-up projection, laid out as a model's weights."""
        if policy.output_norm is None:
            return None
        layers, _, heads, _, dim = self.k.shape
        made_up = torch.from_numpy(calibrations.output_projection(layers, heads, self.q.shape[3] // heads, dim))
        weights = made_up.flatten(1, 3).mT.contiguous().to(self.device, self.dtype)
        return OutputNorms(list(weights), policy.output_norm)

    def compress(self, policy: Policy, batch: Sequence[int], **options) -> Tensor:
        """One event of the requests of `batch`; a request that shares a block moves into blocks of its own.

        Pinned blocks stay in the table whoever shares them.
        """
        event = self.event(policy, batch)
        count = -(-self.keep // self.block_size)
        held = [self.requests[i] for i in batch]
        before = [one.blocks for one in held]
        destinations = []
        for i, one in zip(batch, held, strict=True):
            pinned = self.protected(policy, i) // self.block_size if self.pinned else 0
            leading, rest = one.blocks[:pinned], one.blocks[pinned:]
            shared = any(self.holders[block] > 1 for block in rest)
            own = [self._take() for _ in range(count - pinned)] if shared else rest[: count - pinned]
            one.blocks = leading + own
            destinations.append([-1] * pinned + own)
        tables = self._tables(destinations)
        kept = compress(policy, event, [self.positions, self.predictions], tables, max_keep=self.keep, **options).kept
        for one, old in zip(held, before, strict=True):
            for block in set(old) - set(one.blocks):
                self._release(block)
            one.n = one.carried = self.keep
            one.rounds += 1
        return kept

    def entries(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K, V [L, H, n, d], positions and scores [L, H, n] of a request, on the CPU."""
        one = self.requests[i]
        return tuple(x[:, one.blocks].transpose(1, 2).flatten(2, 3)[:, :, : one.n].cpu() for x in self.everything[:4])

    def states(self, i: int) -> list[Tensor]:
        """What a policy stored of a request's entries, [L, H, n] each, on the CPU."""
        one, states = self.requests[i], (self.scores, self.more_scores)
        return [x[:, one.blocks].transpose(1, 2).flatten(2, 3)[:, :, : one.n].cpu() for x in states]

    def _take(self) -> int:
        block = self.free.pop()
        self.holders[block] = 1
        return block

    def _release(self, block: int) -> None:
        self.holders[block] -= 1
        if self.holders[block] == 0:
            self.free.insert(0, block)
            for x in self.everything:
                x[:, block] = NAN if x.is_floating_point() else NOWHERE

    def _tables(self, rows: list[list[int]]) -> Tensor:
        """int32 [R, longest + 1], garbage past each row's blocks."""
        width = max(map(len, rows)) + 1
        return self._ints([row + [GARBAGE] * (width - len(row)) for row in rows])

    def _ints(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)
