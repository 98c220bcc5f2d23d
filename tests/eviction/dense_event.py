"""An `Event` over plain tensors, and a generation of several events around it: the engine without pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests import calibrations
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy
from zipage.eviction.protection import Protection, forced_mask

NAN = float("nan")


@dataclass(kw_only=True, eq=False)
class DenseEvent(Event):
    """Attributes:
    key_entries, value_entries: [L, R, H, N, d].
    query_entries: [L, R, w, Hq, d].
    state_entries: [L, R, H, N], or several.
    predicted_entries: [L, R, H, N].
    output_matrix: [L, H, G, d, width], the output projection.
    order: of the norm that the policy asks for.
    poison: what every answer holds where it has no meaning.
    """

    key_entries: Tensor
    value_entries: Tensor
    query_entries: Tensor
    state_entries: Tensor | list[Tensor]
    predicted_entries: Tensor | None = None
    output_matrix: Tensor | None = None
    order: int = 0
    poison: float = NAN

    def attention(self, softmax="all", group="max", window="mean"):
        layers, _, heads, _ = self.shape
        keys = torch.where(self.valid[..., None], self.key_entries, 0.0)
        queries = self.query_entries.view(layers, -1, self.window, heads, self.group_size, self.head_dim)
        logits = torch.einsum("lrwhgd,lrhnd->lrhgwn", queries, keys) / math.sqrt(self.head_dim)
        if softmax == "all":
            last = self.window_start[:, None] + torch.arange(self.window)
            seen = self.slots <= last[..., None]
        else:
            seen = self.before_window.expand(-1, self.window, -1)
        logits = logits.masked_fill(~seen[:, None, None], -math.inf)
        if softmax == "group_cut":
            weights = logits.amax(dim=3).softmax(dim=-1)
        else:
            weights = logits.softmax(dim=-1)
            weights = weights.amax(dim=3) if group == "max" else weights.mean(dim=3)
        scores = {"mean": weights.mean, "sum": weights.sum, "max": weights.amax}[window](dim=3)
        known = self.valid if softmax == "all" else self.before_window
        return torch.where(known, scores, self.poison)

    def attended(self, threshold):
        words = torch.zeros(-(-self.window // 32), *self.shape, dtype=torch.int64)
        for q in range(self.window):
            for row, n in enumerate(self.lens.tolist()):
                seen = n - self.window + q + 1
                query = self.query_entries[:, row, q].unflatten(1, (self.num_heads, self.group_size))
                logits = query @ self.key_entries[:, row, :, :seen].mT / math.sqrt(self.head_dim)
                hit = logits.softmax(dim=-1).amax(dim=2) >= threshold
                words[q // 32, :, row, :, :seen] += hit * 2 ** (q % 32)
        return words.int()

    def redundancy(self, tau, chunk=None, threshold=0.5):
        result = torch.full(self.shape, self.poison)
        for row, n in enumerate(self.lens.tolist()):
            raw = raw_redundancy(self.key_entries[:, row, :, :n], chunk, threshold)
            size = chunk or n
            compared = torch.tensor([min(size, n - m // size * size) for m in range(n)])
            result[:, row, :, :n] = (raw / (tau * compared)).softmax(dim=-1)
        return result

    def pool(self, scores, width, kind, limit):
        inside = (self.slots < limit[:, None])[:, None]
        padding = -math.inf if kind == "max" else 0.0
        half = width // 2
        runs = pad(torch.where(inside, scores, padding), (half, half), value=padding).unfold(-1, width, 1)
        smooth = runs.amax(dim=-1) if kind == "max" else runs.sum(dim=-1) / width
        return torch.where(inside, smooth, scores)

    def carried_states(self):
        return [self.state_entries] if isinstance(self.state_entries, Tensor) else self.state_entries

    def predictions(self):
        return self.predicted_entries

    def output_norms(self, starts):
        values = torch.where(self.valid[..., None], self.value_entries, self.poison)
        projected = torch.einsum("lrhnd,lhgdw->lrhgnw", values, self.output_matrix)
        norms = projected.norm(p=self.order, dim=-1).mean(dim=3)
        return torch.where(self.slots >= starts[:, None, None], norms, 0.0)

    def queries(self):
        return self.query_entries

    def keys(self):
        return self.key_entries

    def values(self):
        return self.value_entries


def raw_redundancy(keys: Tensor, chunk: int | None, threshold: float = 0.5) -> Tensor:
    """Sum of cosines per key, near-duplicates' last excuse left out; keys [..., n, d] -> [..., n]."""
    n = keys.shape[-2]
    units = keys / keys.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    run = torch.arange(n) // (chunk or n)
    apart = (run[:, None] != run) | torch.eye(n, dtype=torch.bool)
    cosines = (units @ units.transpose(-1, -2)).masked_fill(apart, 0.0)
    row = torch.arange(n)[:, None]
    last = torch.where(cosines > threshold, row, -1).amax(dim=-2, keepdim=True)
    return cosines.masked_fill(last == row, 0.0).sum(dim=-1)


def select(scores: Tensor, forced: Tensor, keep: int) -> Tensor:
    """Slots that stay: scores [..., n], must [n] -> int64 [..., keep], ascending."""
    ranked = scores.masked_fill(forced, math.inf).flip(-1).argsort(dim=-1, descending=True, stable=True)
    return (scores.shape[-1] - 1 - ranked[..., :keep]).sort(dim=-1).values


@dataclass(frozen=True)
class Tokens:
    """All a request will ever cache: keys, values [L, H, T, d], queries [L, T, Hq, d] and what they are projections of,
    hidden [L, T, width]; its seed and prompt length.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    seed: int
    prompt_len: int
    hidden: Tensor | None = None


def make_tokens(seed: int, total: int = 256, layers=2, heads=2, group=2, head_dim=32, prompt_len=24) -> Tokens:
    """Random entries; half of the keys are near-duplicates of each other. No cosine is within 0.02 of 0.5."""
    drawn = _draw_entries(seed, total, layers, heads, group, head_dim)
    keys, values, queries, hidden = (x.clone() for x in drawn)
    return Tokens(keys, values, queries, 1000 + seed, prompt_len, hidden)


@cache
def _draw_entries(seed: int, total: int, layers: int, heads: int, group: int, head_dim: int) -> tuple[Tensor, ...]:
    """Keys, values, queries and hidden states of `make_tokens`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def draw(like: Tensor, centres: Tensor) -> Tensor:
        keys = normal(layers, heads, total, head_dim)
        return torch.where(like, centres + 0.2 * keys, keys)

    like = torch.rand(layers, heads, total, 1, generator=generator) < 0.5
    groups = torch.randint(total // 8, (total,), generator=generator)
    centres = normal(layers, heads, total, head_dim)[:, :, groups]
    keys = draw(like, centres)
    while (doubtful := _near_half(keys)).any():
        like = like & ~doubtful
        keys = torch.where(doubtful, draw(like, centres), keys)
    keys = keys * (0.5 + torch.rand(layers, heads, total, 1, generator=generator))
    values = normal(layers, heads, total, head_dim)
    queries = 1.5 * normal(layers, total, heads * group, head_dim)
    hidden = normal(layers, total, calibrations.WIDTH)
    return keys, values, queries, hidden


def _near_half(keys: Tensor) -> Tensor:
    """Keys [..., T, d] whose cosine with an earlier one is near 0.5: bool [..., T, 1]."""
    units = torch.nn.functional.normalize(keys, dim=-1)
    near = ((units @ units.transpose(-1, -2)) - 0.5).abs() < 0.02
    return near.tril(-1).any(dim=-1, keepdim=True)


def dense_event(
    policy: Policy,
    requests: Sequence[Tokens],
    lens: Sequence[int],
    keep: int | Sequence[int] = 64,
    recent: int = 16,
    protection: str = "none",
    poison: float = NAN,
) -> DenseEvent:
    """First event of `requests` over their first `lens` entries."""
    held = [Held(tokens) for tokens in requests]
    for one, n in zip(held, lens, strict=True):
        one.grow(n)
    keeps = [keep] * len(held) if isinstance(keep, int) else keep
    return build_event(policy, held, keeps, recent, protection, slice(None), poison)


@dataclass(eq=False)
class Held:
    """What a request holds: positions int64 [L, H, n], states [L, H, n] each; `carried` and `rounds` as in `Event`."""

    tokens: Tokens
    positions: Tensor = field(init=False)
    states: list[Tensor] = field(init=False)
    seen: int = 0
    carried: int = 0
    rounds: int = 0

    def __post_init__(self):
        shape = (*self.tokens.keys.shape[:2], 0)
        self.positions = torch.zeros(shape, dtype=torch.int64)
        self.states = [torch.zeros(shape), torch.zeros(shape)]

    @property
    def n(self) -> int:
        return self.positions.shape[-1]

    def grow(self, n: int) -> None:
        new = torch.arange(self.seen, self.seen + n - self.n)
        self.seen += len(new)
        self.positions = torch.cat([self.positions, new.expand(*self.positions.shape[:2], -1)], dim=-1)
        self.states = [pad(state, (0, len(new)), value=NAN) for state in self.states]

    def entries(self, source: Tensor) -> Tensor:
        index = self.positions[..., None].expand(-1, -1, -1, source.shape[-1])
        return source.gather(2, index)


def rotary(head_dim: int) -> Tensor:
    """float64 [d / 2], as most models have them."""
    return 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def calibration(policy: Policy, layers: int, heads: int, group: int, dim: int, device="cpu") -> dict[str, Tensor]:
    """Made-up arrays that the policy asks for, as an event holds them."""
    made = calibrations.arrays(policy.calibration_kind, layers, heads, group, dim)
    return {name: torch.from_numpy(made[name]).to(device) for name in policy.calibration_arrays}


def predicted(known: dict[str, Tensor], tokens: Tokens) -> Tensor:
    """What the made-up scorer says of all tokens, [L, H, T]."""
    return known["weight"] @ tokens.hidden.mT + known["bias"][..., None]


def build_event(policy, held, keeps, recent, protection, layers, poison) -> DenseEvent:
    width = max(one.n for one in held)
    window = policy.num_queries

    def stack(rows: list[Tensor], dim: int) -> Tensor:
        return torch.stack(
            [pad(x, (0,) * (2 * (x.dim() - 1 - dim)) + (0, width - x.shape[dim]), value=NAN) for x in rows], 1
        )[layers]

    rule = Protection.parse(protection, policy.implied_protection)
    protected = [rule.length(one.tokens.prompt_len, k, recent, policy.page) for one, k in zip(held, keeps, strict=True)]
    protected = torch.tensor(protected, dtype=torch.int32)
    lens = torch.tensor([one.n for one in held], dtype=torch.int32)
    keys = stack([one.entries(one.tokens.keys) for one in held], 2)
    num_layers, _, num_heads, _, head_dim = keys.shape
    group = held[0].tokens.queries.shape[2] // num_heads
    known = calibration(policy, len(held[0].positions), num_heads, group, head_dim)
    scored = [one.entries(predicted(known, one.tokens)[..., None])[..., 0] for one in held if policy.predicts]
    return DenseEvent(
        num_layers=num_layers,
        num_heads=num_heads,
        group_size=group,
        head_dim=head_dim,
        window=window,
        lens=lens,
        keep=torch.tensor(keeps, dtype=torch.int32),
        forced=forced_mask(lens, protected, recent, width),
        protected=protected,
        carried=torch.tensor([one.carried for one in held], dtype=torch.int32),
        seeds=[one.tokens.seed for one in held],
        rounds=[one.rounds for one in held],
        prompt_lens=[one.tokens.prompt_len for one in held],
        logical_lens=torch.tensor([one.seen for one in held], dtype=torch.int32),
        inv_freq=rotary(head_dim),
        calibration={name: array[layers] for name, array in known.items()},
        layer_offset=layers.start or 0,
        key_entries=keys,
        value_entries=stack([one.entries(one.tokens.values) for one in held], 2),
        query_entries=torch.stack([one.tokens.queries[:, one.seen - window : one.seen] for one in held], 1)[layers],
        state_entries=[stack([one.states[i] for one in held], 2) for i in range(policy.num_states)],
        output_matrix=torch.from_numpy(
            calibrations.output_projection(len(held[0].positions), num_heads, group, head_dim)
        )[layers],
        order={"l1": 1, "l2": 2, None: 0}[policy.output_norm],
        predicted_entries=stack(scored, 2) if scored else None,
        poison=poison,
    )


@dataclass(frozen=True)
class Run:
    """How a generation is run.

    Attributes:
        schedule: per event, the entries each request holds when it comes; None sits it out.
        stride: layers per launch; None takes all.
    """

    schedule: Sequence[Sequence[int | None]]
    keep: int = 64
    recent: int = 16
    protection: str = "none"
    stride: int | None = None
    poison: float = NAN

    def generate(self, policy: Policy, requests: Sequence[Tokens]) -> list[dict[int, Tensor]]:
        """Per event: request -> positions kept, int64 [L, H, keep]."""
        held = [Held(tokens) for tokens in requests]
        events = []
        for lens in self.schedule:
            batch = [i for i, n in enumerate(lens) if n is not None]
            for i in batch:
                held[i].grow(lens[i])
            self._compress(policy, [held[i] for i in batch])
            events.append({i: held[i].positions for i in batch})
        return events

    def alone(self, i: int) -> Run:
        return replace(self, schedule=[[lens[i]] for lens in self.schedule])

    def _compress(self, policy: Policy, held: list[Held]) -> None:
        num_layers = held[0].positions.shape[0]
        scores, states = [], []
        for start in range(0, num_layers, self.stride or num_layers):
            layers = slice(start, min(start + (self.stride or num_layers), num_layers))
            keeps = [self.keep] * len(held)
            event = build_event(policy, held, keeps, self.recent, self.protection, layers, self.poison)
            scores.append(policy.score(event))
            assert policy.state == (event.new_state is not None)
            assert len(event.new_states) == policy.num_states
            states.append([*event.new_states, *[torch.zeros(event.shape)] * (2 - policy.num_states)])
        scores, states = torch.cat(scores), [torch.cat(parts) for parts in zip(*states, strict=True)]
        for row, one in enumerate(held):
            assert scores[:, row, :, : one.n].isfinite().all()
            assert (scores[:, row, :, one.n :] == -math.inf).all()
            kept = select(scores[:, row, :, : one.n], event.forced[row, : one.n], self.keep)
            one.positions = one.positions.gather(-1, kept)
            one.states = [state[:, row].gather(-1, kept) for state in states]
            one.carried = self.keep
            one.rounds += 1
