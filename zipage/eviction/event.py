"""What a policy may ask of one compression: the border between policies and the paged cache.

A policy sees R requests in one launch over L layers as padded tensors `[L, R, H, N]`; where the keys lie, in which
blocks and on which device, stays behind this class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from zipage.checks import shown
from zipage.counters import normal, uniform
from zipage.transfer import to_device

Softmax = Literal["all", "cut", "group_cut"]
EPSILON = 1e-8
"""Norms are clamped here before anything is divided by them."""

LEAST_RANGE = 2.0**-12
"""Of the larger bound: what rounding leaves of equal values is no range."""


@dataclass(kw_only=True, eq=False)
class Event(ABC):
    """One launch: R requests of one policy, L layers, the KV heads of one rank.

    Slot `j` of a request is its `j`-th entry in time order. `N` is the longest request of the launch. Tensors over
    entries are `[L, R, H, N]`; what they hold past a request's `n` entries has no meaning and must reach no score.

    Attributes:
        num_layers: L, layers of this launch. All of the model's that are ranked where the policy says `all_layers`.
        num_heads: H, KV heads on this rank.
        group_size: G, query heads per KV head.
        head_dim: d.
        window: w, stored queries per request: those of slots n-w .. n-1. Equals the policy's `num_queries`.
        lens: int32 [R], n of each request.
        keep: int32 [R], k of each request: entries per layer and KV head after the event.
        forced: bool [R, N], entries that stay whatever their score. False past n.
        protected: int32 [R], leading entries that stay at every event, all of them in `forced`. They carry no state:
            nothing ranks them, and no event writes to a block of theirs alone, which may be shared.
        carried: int32 [R], slots protected .. carried-1 hold the state that an earlier event wrote. 0 before the first.
        seeds: of each request, distinct for the samples of one prompt.
        rounds: t of each request, its compressions before this one.
        prompt_lens: P of each request.
        logical_lens: int32 [R], N of each request: the position of its next token.
        inv_freq: float64 [d / 2], w_f, the rotary frequencies in radians per position. Dimensions f and f + d / 2 of a
            head are a pair. For policies with `needs_rotary_pairs`.
        rope_factor: a, the factor on cos and sin, once in a cached key.
        calibration: the arrays of the policy's calibration file that it asks for, by name: float32 [L, rows, ...] of
            this launch's layers and heads, `rows` being H, or H * G for query heads.
        layer_offset, head_offset: numbers of the first layer and KV head of this launch in the whole model.
        new_states: what the policy handed to `store`; empty without state.
    """

    num_layers: int
    num_heads: int
    group_size: int
    head_dim: int
    window: int
    lens: Tensor
    keep: Tensor
    forced: Tensor
    protected: Tensor
    carried: Tensor
    seeds: Sequence[int]
    rounds: Sequence[int]
    prompt_lens: Sequence[int]
    logical_lens: Tensor
    inv_freq: Tensor
    rope_factor: float = 1.0
    calibration: Mapping[str, Tensor] = field(default_factory=dict)
    layer_offset: int = 0
    head_offset: int = 0
    new_states: tuple[Tensor, ...] = ()

    @property
    def num_requests(self) -> int:
        return self.forced.shape[0]

    @property
    def num_slots(self) -> int:
        """N."""
        return self.forced.shape[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(L, R, H, N)."""
        return self.num_layers, self.num_requests, self.num_heads, self.num_slots

    @property
    def layers(self) -> range:
        """Numbers of this launch's layers among those of the whole model that are ranked."""
        return range(self.layer_offset, self.layer_offset + self.num_layers)

    @property
    def device(self) -> torch.device:
        return self.forced.device

    @cached_property
    def slots(self) -> Tensor:
        """int64 [N], 0 .. N-1."""
        return torch.arange(self.num_slots, device=self.device)

    @cached_property
    def valid(self) -> Tensor:
        """bool [R, 1, N], slots that hold an entry; broadcasts against [L, R, H, N], as do the masks below."""
        return (self.slots < self.lens[:, None])[:, None]

    @cached_property
    def before_window(self) -> Tensor:
        """bool [R, 1, N], slots j < n - w."""
        return (self.slots < self.window_start[:, None])[:, None]

    @cached_property
    def window_start(self) -> Tensor:
        """int32 [R], n - w."""
        return self.lens - self.window

    # What the cache answers.

    @abstractmethod
    def attention(
        self,
        softmax: Softmax = "all",
        group: Literal["max", "mean"] = "max",
        window: Literal["mean", "sum", "max"] = "mean",
    ) -> Tensor:
        """Attention of the window queries, one number per entry.

        `Z[g, q, j] = Q . K / sqrt(d)`, -inf for j > n-w+q. The group is reduced first, then the window.

        Args:
            softmax: "all": over all n entries. "cut": over j < n-w only, per query head. "group_cut": the maximum of
                the logits over the group, then over j < n-w only; `group` plays no part.
            group: over the query heads of a KV head.
            window: over the queries.

        Returns:
            float32 [L, R, H, N]. Where the softmax is cut, slots j >= n-w have no meaning.

        Raises:
            ValueError: the policy asked for no queries.
        """

    @abstractmethod
    def attended(self, threshold: float) -> Tensor:
        """Which queries of the window attend to an entry: the maximum over the group of their attention, softmax over
        all entries that they see, is `threshold` or more.

        Returns:
            int32 [ceil(w / 32), L, R, H, N]: bit q % 32 of word q // 32 is query q's, the oldest first.

        Raises:
            ValueError: the policy asked for no queries, or `threshold` is not in (0, 1].
        """

    @abstractmethod
    def redundancy(self, tau: float, chunk: int | None = None, threshold: float = 0.5) -> Tensor:
        """How much of a key the others repeat: a softmax over a request's entries.

        Args:
            tau: temperature; raw sums are divided by `tau` times the keys compared.
            chunk: compare inside aligned runs of this many slots; None compares all n.
            threshold: cosine above which two keys are near-duplicates.

        Returns:
            float32 [L, R, H, N].
        """

    @abstractmethod
    def pool(self, scores: Tensor, width: int, kind: Literal["max", "mean"], limit: Tensor) -> Tensor:
        """Pool along the sequence, stride 1, centred, over slots j < limit; the others come back as they were.

        Args:
            scores: float32 [L, R, H, N].
            width: odd.
            kind: "max" is shorter at the ends; "mean" counts zeros beyond them and always divides by `width`.
            limit: int32 [R].
        """

    @abstractmethod
    def carried_states(self) -> list[Tensor]:
        """The state arrays of the entries, each float32 [L, R, H, N]. Slots that carry none may hold anything."""

    @abstractmethod
    def predictions(self) -> Tensor:
        """What the policy's trained scorer says of each entry, float32 [L, R, H, N].

        It said so when K and V were stored, from the input of the layer's attention.

        Raises:
            ValueError: the policy asked for none (`Policy.predicts`).
        """

    @abstractmethod
    def queries(self) -> Tensor:
        """The window's queries (after RoPE), float32 [L, R, w, Hq, d]: of positions N - w .. N - 1, heads in order.

        Raises:
            ValueError: the policy asked for no queries.
        """

    @abstractmethod
    def keys(self) -> Tensor:
        """Keys as cached (after RoPE), float32 [L, R, H, N, d]: a dense copy."""

    @abstractmethod
    def values(self) -> Tensor:
        """Values, float32 [L, R, H, N, d]: a dense copy."""

    @abstractmethod
    def output_norms(self, starts: Tensor) -> Tensor:
        """Mean over the group of |V W_o|, float32 [L, R, H, N]: W_o takes the values of a query head to the residual
        stream. The norm is the one that the policy asks for.

        Args:
            starts: int32 [R], slots from here on are asked for, each worth `2 G d width` operations. 0 before them.

        Raises:
            ValueError: it asks for none (`Policy.output_norm`).
        """

    # Reductions over keys and values. A cache may answer them without the dense copy.

    def key_forms(self, linear: Tensor, sizes: Tensor | None = None, squares: Tensor | None = None) -> Tensor:
        """`linear . K + sum over f of sizes_f |(x_f, y_f)| + squares_f . (x_f^2, 2 x_f y_f, y_f^2)` of each key K.

        (x_f, y_f) are dimensions f and f + d / 2, a rotary pair.

        Args:
            linear: float32 [L or 1, R or 1, H, G, d], G numbers being asked of each key.
            sizes: float32, the same with d / 2 for d; None: all 0.
            squares: float32, the same with 3, d / 2; None: all 0.

        Returns:
            float32 [L, R, H, G, N].
        """
        keys = self.keys()
        forms = linear @ keys.mT
        if sizes is not None:
            forms = forms + sizes @ keys.unflatten(-1, (2, -1)).norm(dim=-2).mT
        if squares is not None:
            x, y = keys.chunk(2, dim=-1)
            forms = forms + squares.flatten(-2) @ torch.cat((x * x, 2 * x * y, y * y), dim=-1).mT
        return forms

    def key_squares(self, linear: Tensor, matrices: Tensor, turn: Tensor) -> Tensor:
        """linear . K + K'^T M K' of each key K. K' is K turned: each rotary pair, as a complex number, times `turn`.

        Args:
            linear: float32 [L or 1, R or 1, H, G, d], G numbers being asked of each key.
            matrices: M, float32, the same with d, d for d.
            turn: complex [R, d / 2].

        Returns:
            float32 [L, R, H, G, N].
        """
        keys = self.keys()
        x, y = keys.chunk(2, dim=-1)
        cos, sin = (part.float()[:, None, None] for part in (turn.real, turn.imag))
        turned = torch.cat((x * cos - y * sin, x * sin + y * cos), dim=-1)
        members = [((turned @ matrix) * turned).sum(dim=-1) for matrix in matrices.unbind(dim=3)]
        return linear @ keys.mT + torch.stack(members, dim=3)

    def key_norms(self) -> Tensor:
        """|K|_2, float32 [L, R, H, N]."""
        return self.keys().norm(dim=-1)

    def value_norms(self) -> Tensor:
        """|V|_2, float32 [L, R, H, N]."""
        return self.values().norm(dim=-1)

    def mean_unit_key(self) -> Tensor:
        """Mean of K / |K| over a request's n entries, float32 [L, R, H, d]."""
        keys = self.keys()
        units = keys / keys.norm(dim=-1, keepdim=True).clamp_min(EPSILON)
        units = units.masked_fill(~self.valid[..., None], 0.0)
        return units.sum(dim=3) / self.lens[:, None, None]

    def key_cosines(self, direction: Tensor) -> Tensor:
        """Cosine of each key and `direction` [L, R, H, d]; float32 [L, R, H, N]."""
        keys = self.keys()
        dots = (keys * direction[:, :, :, None]).sum(dim=-1)
        norms = keys.norm(dim=-1).clamp_min(EPSILON)
        return dots / (norms * direction.norm(dim=-1, keepdim=True).clamp_min(EPSILON))

    def value_ranges(self) -> Tensor:
        """max over d of V - min over d of V, float32 [L, R, H, N]."""
        low, high = self.values().aminmax(dim=-1)
        return high - low

    def lag_spread(self, starts: Tensor, partition: int) -> Tensor:
        """std over d of (x - low) / (high - low), float32 [2, L, R, H, N], of keys and of values: LagKV's score.

        From slot `starts` [R] on a request's entries are cut into partitions of `partition` slots. low and high are
        those of a channel in the next one; a channel that is flat there, up to rounding, counts as 0. Without meaning
        before `starts`, in a request's last whole partition and behind it.
        """
        most = self.num_slots // partition
        found = torch.zeros(2, *self.shape[:3], self.num_slots + 1, device=self.device)
        slots = starts[:, None] + torch.arange(most * partition, device=self.device)
        index = slots.clamp_max(self.num_slots - 1)[:, None, :, None].expand(*self.shape[:3], -1, self.head_dim)
        for number, entries in enumerate((self.keys(), self.values())):
            parts = entries.gather(3, index).unflatten(3, (-1, partition))
            low, high = parts[:, :, :, 1:].aminmax(dim=4, keepdim=True)
            width = high - low
            scale = torch.where(width <= LEAST_RANGE * torch.maximum(low.abs(), high.abs()), 0.0, 1 / width)
            std = ((parts[:, :, :, :-1] - low) * scale).std(dim=-1).flatten(3)
            found[number].scatter_(-1, slots[:, : std.shape[-1]].clamp_max(self.num_slots)[:, None].expand_as(std), std)
        return found[..., :-1]

    def projected_norms(self, of: Literal["keys", "values"], matrix: Tensor) -> Tensor:
        """|G^T x|_2 of every key or value x under the request's `matrix` G [R, d, c]; float32 [L, R, H, N]."""
        entries = self.keys() if of == "keys" else self.values()
        return (entries @ matrix[:, None]).norm(dim=-1)

    # State.

    @cached_property
    def stored_states(self) -> list[Tensor]:
        """States from the last event, float32 [L, R, H, N] each; -1 where an entry carries none, protected or new."""
        known = ((self.slots >= self.protected[:, None]) & (self.slots < self.carried[:, None]))[:, None]
        return [torch.where(known, state, -1.0) for state in self.carried_states()]

    @property
    def stored(self) -> Tensor:
        """The only or first of them."""
        return self.stored_states[0]

    @property
    def new_state(self) -> Tensor | None:
        """The only or first of `new_states`."""
        return self.new_states[0] if self.new_states else None

    def store(self, *states: Tensor) -> None:
        """Hand over the new states of all entries, float32 [L, R, H, N] each; survivors take theirs along.

        States are >= 0; a negative one means that the entry carries none. That of a protected entry reaches no event.

        Raises:
            ValueError: it is of another shape and does not broadcast to it, not real, or on another device.
        """
        self.new_states = tuple(self.check_scores(state, "event.store takes").float() for state in states)

    def check_scores(self, scores: Tensor, where: str) -> Tensor:
        """`scores`, which a policy made for the entries.

        Args:
            where: begins the message.

        Raises:
            ValueError: they are not a real tensor that broadcasts to [L, R, H, N] on the event's device.
        """
        what = f"{where} a real tensor [L, R, H, N] = {list(self.shape)} on {self.device}, or one that broadcasts to it"
        if not isinstance(scores, Tensor):
            raise ValueError(f"{what}, not {shown(scores)}")
        sizes = scores.shape[::-1]
        fits = len(sizes) <= 4 and all(have in (1, need) for have, need in zip(sizes, self.shape[::-1], strict=False))
        if not fits or scores.is_complex() or scores.device != self.device:
            raise ValueError(f"{what}, not one of {scores.dtype} {list(scores.shape)} on {scores.device}")
        return scores

    # Reductions over heads and layers.

    def all_heads(self, scores: Tensor) -> Tensor:
        """[L, R, H, N] -> the same of all KV heads of the model, those of other ranks too.

        A policy that combines heads in another way than the means below must combine these: then all ranks keep the
        same. All ranks come here together, so a policy may call it in no branch that depends on a rank's own scores.
        """
        return scores

    def mean_over_heads(self, scores: Tensor) -> Tensor:
        """Mean over all KV heads of a layer: [L, R, H, N] -> [L, R, 1, N]."""
        return self.all_heads(scores).mean(dim=2, keepdim=True)

    def mean_over_layers_and_heads(self, scores: Tensor) -> Tensor:
        """Mean over all layers and KV heads of the model: [L, R, H, N] -> [1, R, 1, N]. Needs `all_layers`."""
        return self.all_heads(scores).mean(dim=(0, 2), keepdim=True)

    # Randomness.

    def uniform(self, stream: int, *, per_layer: bool = True, per_head: bool = True, run: int = 1) -> Tensor:
        """Uniform numbers in (0, 1), one per entry, functions of (seed, stream, t, layer, head, slot // run) alone.

        Args:
            stream: the policy's own number, so that two policies draw independently.
            per_layer, per_head: whether each layer and each KV head draws its own numbers.
            run: neighbouring slots that share a number.

        Returns:
            float32 [L or 1, R, H or 1, N].
        """
        layers = self.layers if per_layer else range(1)
        heads = range(self.head_offset, self.head_offset + self.num_heads) if per_head else range(1)
        return uniform(self.seeds, stream, self.rounds, layers, heads, self.slots // run)

    def gaussian(self, stream: int, rows: int, columns: int) -> Tensor:
        """Standard normal matrices, one per request and event: float32 [R, rows, columns]."""
        numbers = normal(self.seeds, stream, self.rounds, rows * columns)
        return to_device(numbers, self.device, np.float32).view(-1, rows, columns)

    # Ranking.

    def top(self, values: Tensor, count: Tensor) -> Tensor:
        """The `count` [R] largest entries of every row, up to n: bool [L, R, H, N]. Ties go to the higher slot."""
        order = values.flip(-1).argsort(dim=-1, descending=True, stable=True)
        ranks = torch.empty_like(order).scatter_(-1, order, self.slots.expand_as(order)).flip(-1)
        return ranks < count[:, None, None]
