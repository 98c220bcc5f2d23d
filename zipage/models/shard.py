"""Tensor parallelism: which heads, rows and columns of a model are a rank's own.

The column- and row-parallel split of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053): a rank computes its heads and
its part of the MLP, and what the ranks have computed is summed once after attention and once after the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from kernels.add_rms_norm import add_rms_norm
from kernels.linear import linear
from zipage.models.attention import AttentionSpec
from zipage.models.spec import ModelSpec


class PeerFailed(RuntimeError):
    """Another rank failed at what this one does with it; `BesideCollectives.fail` comes next."""


class BesideCollectives(Protocol):
    """What compressions need, which may fail on one rank and not on another."""

    def gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], of all ranks in order. Raises PeerFailed."""

    def agree(self) -> None:
        """Where a rank is done. Raises PeerFailed where another is not."""

    def fail(self, place: int) -> list[int]:
        """How far each rank has come, of which `place` is this one's; all call it once one has failed."""


class Collectives(Protocol):
    """What the forward pass needs: all ranks call the same, in the same order, with tensors of one shape. What it sums
    is the same on each rank to the last bit.

    The output of a row-parallel product stays in parts, one a rank, until `sum` joins them. Successive ones are kept in
    places 0 and 1 in turn.
    """

    def product(self, x: Tensor, weight: Tensor, place: int) -> Tensor:
        """The rank's part of a product: x [T, k], weight [width, k] -> [T, width], valid until the next in `place`."""

    def part(self, x: Tensor, place: int) -> Tensor:
        """The same of a part that is computed already: x [T, width], contiguous."""

    def sum(self, part: Tensor, place: int) -> Tensor:
        """Of all ranks' `part`, which `product` or `part` gave for `place`; as long valid."""

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`."""

    def gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], of all ranks in order."""

    def broadcast(self, x: Tensor) -> None:
        """Overwrite every rank's contiguous `x` with rank 0's."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's run of rows (axis 0) or columns (axis 1) of a whole tensor.

    Attributes:
        first, count: of the run. It may reach past the end of the tensor: what is missing is zero.
        full: rows or columns of the whole.
    """

    axis: int
    first: int
    count: int
    full: int

    def along(self, axis: int) -> Piece:
        """The same run of another axis."""
        return replace(self, axis=axis)

    @property
    def stored(self) -> int:
        """How many of `count` the whole tensor has."""
        return max(0, min(self.count, self.full - self.first))

    def of(self, whole: Tensor) -> Tensor:
        """The run, as far as it is there."""
        return whole.narrow(self.axis, min(self.first, self.full), self.stored)

    def fill(self, view: Tensor, run: Tensor) -> None:
        """Write what `of` gave into the piece's place, and zeros where the whole has nothing."""
        view.narrow(self.axis, 0, self.stored).copy_(run)
        view.narrow(self.axis, self.stored, self.count - self.stored).zero_()


@dataclass(frozen=True, eq=False)
class Shard:
    """The share of rank `rank` of `size`.

    KV heads are spread over the ranks. With more ranks than KV heads, neighbours hold the same KV head: each computes
    keys, values and attention of its whole group, so that what is cached and what a policy scores is the same on all of
    them, and its own part of the query heads in the output projection.

    Attributes:
        collectives: None for a single rank.
    """

    rank: int = 0
    size: int = 1
    collectives: Collectives | BesideCollectives | None = None

    def check(self, spec: ModelSpec) -> None:
        """Raise a ValueError where the model cannot be spread over `size` ranks."""
        heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, self.size
        if size > 1:
            spec.refuse_hybrids(f"tensor_parallel_size={size}", "use one device")
        if heads % size or (kv_heads % size and size % kv_heads):
            fits = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
            raise ValueError(
                f"tensor_parallel_size={size}: {heads} query heads and {kv_heads} KV heads go on "
                f"{', '.join(map(str, fits))} ranks"
            )
        for whose, width in spec.mlp_widths().items():
            if width % size:
                raise ValueError(f"tensor_parallel_size={size}: must divide {whose} width of {width}")

    @property
    def is_whole(self) -> bool:
        return self.size == 1

    def kv_heads(self, num_kv_heads: int) -> range:
        """The rank's own, of all."""
        count = max(1, num_kv_heads // self.size)
        first = self.rank * num_kv_heads // self.size
        return range(first, first + count)

    def attention(self, whole: AttentionSpec) -> AttentionSpec:
        """With the heads that this rank computes."""
        kv_heads = len(self.kv_heads(whole.num_kv_heads))
        group = whole.num_heads // whole.num_kv_heads
        return replace(whole, num_heads=kv_heads * group, num_kv_heads=kv_heads)

    def spec(self, whole: ModelSpec) -> ModelSpec:
        """The model as this rank's cache and attention see it: fewer heads; all other fields are the whole model's."""
        return replace(whole, attention=tuple(map(self.attention, whole.attention)))

    def piece(self, axis: int, full: int) -> Piece:
        """An equal part of `full` rows or columns; the last ranks' may be short."""
        count = -(-full // self.size)
        return Piece(axis, self.rank * count, count, full)

    def once(self, axis: int, full: int) -> Piece:
        """All of what is added to a sum over ranks: on rank 0, and zeros on the others."""
        return Piece(axis, full if self.rank else 0, full, full)

    def query_heads(self, whole: AttentionSpec) -> Piece:
        """Those that are computed here."""
        own, group = self.kv_heads(whole.num_kv_heads), whole.num_heads // whole.num_kv_heads
        return Piece(0, own.start * group, len(own) * group, whole.num_heads)

    def head_pieces(self, whole: AttentionSpec) -> tuple[Piece, Piece, Piece]:
        """Rows of the q, k and v projections."""
        own, dim = self.kv_heads(whole.num_kv_heads), whole.head_dim
        kv = Piece(0, own.start * dim, len(own) * dim, whole.num_kv_heads * dim)
        rows = dim * (2 if whole.output_gate else 1)  # a head's query, and its gate
        heads = self.query_heads(whole)
        q = Piece(0, heads.first * rows, heads.count * rows, heads.full * rows)
        return q, kv, kv

    def output_columns(self, whole: AttentionSpec) -> tuple[Piece, slice]:
        """Columns of the output projection, and where among the rank's attention outputs they lie."""
        columns = self.piece(1, whole.num_heads * whole.head_dim)
        start = columns.first - self.head_pieces(whole)[0].first
        return columns, slice(start, start + columns.count)

    # Joining

    def row_parallel(self, x: Tensor, weight: Tensor, bias: Tensor | None, place: int) -> Tensor:
        """`x @ weight.T + bias`, where `x` [T, k] and `weight` [width, k] are the rank's columns: its part of the sum,
        for `sum` or `add_rms_norm` with the same `place`.
        """
        if self.is_whole:
            return linear(x, weight, bias)
        part = self.collectives.product(x, weight, place)
        return part if bias is None or self.rank else part.add_(bias)

    def part(self, x: Tensor, place: int) -> Tensor:
        """As `row_parallel`, of the rank's part x [T, width] of a sum."""
        return x if self.is_whole else self.collectives.part(x, place)

    def sum(self, part: Tensor, place: int) -> Tensor:
        """Of what `row_parallel` or `part` gave on all ranks."""
        return part if self.is_whole else self.collectives.sum(part, place)

    def add_rms_norm(
        self, hidden: Tensor, part: Tensor | None, place: int | None, weight: Tensor, eps: float, offset: float = 0.0
    ) -> Tensor:
        """`kernels.add_rms_norm` of the sum of what `row_parallel` gave on all ranks; None: nothing is added.

        Args:
            place: None: `part` is the sum already.
        """
        delta = part if part is None or place is None else self.sum(part, place)
        return add_rms_norm(hidden, delta, weight, eps, offset)

    def embed(self, token_ids: Tensor, embedding: Tensor) -> Tensor:
        """Rows `token_ids` [T] of the whole embedding, of which `embedding` is the rank's piece."""
        if self.is_whole:
            return F.embedding(token_ids, embedding)
        local = token_ids - self.rank * embedding.shape[0]
        elsewhere = (local < 0) | (local >= embedding.shape[0])
        hidden = F.embedding(local.masked_fill(elsewhere, 0), embedding)
        return self.collectives.reduce(hidden.masked_fill_(elsewhere[:, None], 0.0))

    def all_tokens(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Logits [N, rows] of the rank's piece of the output projection -> [N, vocab]."""
        if self.is_whole:
            return logits
        return self.collectives.gather(logits).transpose(0, 1).flatten(1)[:, :vocab_size]

    def all_heads(self, scores: Tensor, num_kv_heads: int) -> Tensor:
        """[L, R, H, N] of the rank's KV heads -> the same of all `num_kv_heads` of the model, each once."""
        if self.is_whole:
            return scores
        every = self.collectives.gather(scores.contiguous()).movedim(0, 2).flatten(2, 3)
        return every[:, :, :: every.shape[2] // num_kv_heads]


WHOLE = Shard()
"""All of a model, on one device."""


def whole_shape(pieces: tuple[Piece, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the tensor from which what a rank holds, of `shape`, was cut: several pieces one after another."""
    axis = pieces[0].axis
    return (*shape[:axis], sum(piece.full for piece in pieces), *shape[axis + 1 :])


def fill_pieces(pieces: tuple[Piece, ...], view: Tensor, read: Callable[[Piece], Tensor]) -> None:
    """Write what a rank holds of a tensor that is several, one after another; `read` gives a run of the tensor."""
    total, first = sum(piece.full for piece in pieces), 0
    for piece, part in zip(pieces, view.split([piece.count for piece in pieces], dim=pieces[0].axis), strict=True):
        run = replace(piece, first=first + piece.first, full=total)
        run.fill(part, read(run))
        first += piece.full
