"""How many entries each layer and KV head keeps at an event: an axis of its own, apart from which."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from zipage.checks import Unit, at_least, check_fields, check_names, one_of, shown

if TYPE_CHECKING:
    from torch import Tensor

    from zipage.eviction.policy import Policy

UNIFORM = "uniform"


class Candidates(NamedTuple):
    """What R requests hold in L layers, and its scores.

    Attributes:
        scores: float32 [L, R, H, N]; anything past a head's n entries.
        forced: bool [L, R, H, N], entries that stay; as many in every head of a request.
        positions: int [L, R, H, N], the entries' logical positions, ascending.
        lens: int [L, R, H], n.
        keep: k of each request.
        must: entries of `forced` of each request, up to its k.
        block_size: b; k is a multiple of it.
        num_layers: of the whole model.
        first_layer: number of the first of the L.
    """

    scores: Tensor
    forced: Tensor
    positions: Tensor
    lens: Tensor
    keep: Sequence[int]
    must: Sequence[int]
    block_size: int
    num_layers: int
    first_layer: int = 0


@dataclass(frozen=True, kw_only=True)
class Allocation(ABC):
    """Budgets that differ by layer and KV head; its fields are its options.

    All counts are made of units: of a block where `round` is "page", so that no block is partly filled and a request
    holds at most what it does under uniform budgets; of one entry where it is "entry", which may cost each head a block
    more. A head that holds fewer than its count keeps all.

    Attributes:
        name: as the option knows it.
        pools: heads compete by their scores, which must be comparable.
        round: "page" or "entry".
    """

    name: ClassVar[str]
    pools: ClassVar[bool]

    round: Annotated[str, one_of("page", "entry")] = "page"

    def __post_init__(self) -> None:
        check_fields(self, "allocation_options.")

    @abstractmethod
    def counts(self, held: Candidates) -> Tensor:
        """Entries that each head keeps: int64 [L, R, H], at least what must stay, at most n."""

    def planned(self, keep: int, must: int, block_size: int, num_layers: int) -> Sequence[int]:
        """Entries of each head in each layer, as far as scores have no say; k where they have."""
        return [keep] * num_layers

    @property
    def extra_blocks(self) -> int:
        """Blocks that a request may hold beyond those of uniform budgets."""
        return int(self.round == "entry")

    def unit(self, block_size: int) -> int:
        return block_size if self.round == "page" else 1

    def check(self, policy: Policy) -> None:
        """Raises ValueError where the policy's scores do not say how many entries a head needs."""
        if policy.scope == "page" or policy.all_layers or policy.shared_layers:
            raise ValueError(
                f"allocation={self.name!r}: policy {policy.name!r} keeps whole pages, or the same entries in all "
                "layers: leave allocation at 'uniform', or choose a policy or scope that does not"
            )
        if self.pools and not (policy.comparable and not policy.shared_heads):
            raise ValueError(
                f"allocation={self.name!r}: the scores of policy {policy.name!r} with these options do not compare "
                "across heads: use allocation='pyramid' or 'uniform', or a policy that ranks by shares of attention"
            )

    @property
    def label(self) -> str:
        """Name and every option that is not at its default, for tables."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name} ({', '.join(changed)})" if changed else self.name


@dataclass(frozen=True, kw_only=True)
class Pyramid(Allocation):
    """More in lower layers, whatever the scores. After PyramidKV, arXiv 2406.02069, but fixed for a request's life.

    Layer l of L keeps what must stay and `free (2 - 1/beta - l (2 - 2/beta) / (L - 1))` units more in each head,
    rounded down; the units that are missing then go to the largest remainders, of equal ones to the lower layer.

    Attributes:
        beta: 1 is uniform.
    """

    name: ClassVar[str] = "pyramid"
    pools: ClassVar[bool] = False

    beta: Annotated[float, at_least(1)] = 20.0

    def counts(self, held: Candidates) -> Tensor:
        import torch

        from zipage.transfer import to_device

        sizes = zip(held.keep, held.must, strict=True)
        planned = [self.planned(*size, held.block_size, held.num_layers) for size in sizes]
        last = held.first_layer + held.lens.shape[0]
        counts = to_device(planned, held.lens.device).T[held.first_layer : last]
        return torch.minimum(counts[:, :, None], held.lens.long())

    def planned(self, keep: int, must: int, block_size: int, num_layers: int) -> Sequence[int]:
        unit = self.unit(block_size)
        floor = -(-must // unit)
        return [unit * (floor + units) for units in pyramid(keep // unit - floor, num_layers, self.beta)]


@dataclass(frozen=True, kw_only=True)
class Adaptive(Allocation):
    """The heads of a layer share `H k` entries by their scores. After AdaKV, arXiv 2407.11550.

    Each head keeps what must stay and the best `floor(alpha * free)` units beyond; the other units of the layer go to
    the best in one pool of all heads, of equal scores to the younger position, then to the lower head. A block counts
    there as the last of its entries does, in the order of the head's scores.

    Attributes:
        alpha: 1 is uniform.
    """

    name: ClassVar[str] = "adaptive"
    pools: ClassVar[bool] = True

    alpha: Unit = 0.2

    def counts(self, held: Candidates) -> Tensor:
        import torch

        from zipage.transfer import to_device

        unit, lens = self.unit(held.block_size), held.lens.long()
        floors = [-(-must // unit) for must in held.must]
        sizes = [
            (floor + int(Fraction(self.alpha) * (keep // unit - floor)), lens.shape[2] * (keep // unit))
            for keep, floor in zip(held.keep, floors, strict=True)
        ]
        sure, total = to_device(sizes, lens.device).T
        have = (lens + unit - 1).div(unit, rounding_mode="floor")
        sure = torch.minimum(sure[:, None], have)
        scores, positions = _last_of_units(held, unit)
        units = torch.arange(scores.shape[3], device=lens.device)
        free = (units >= sure[..., None]) & (units < have[..., None])
        best = _pooled_order(scores, positions, free)
        rest = total - sure.sum(dim=2)
        won = (torch.arange(best.shape[2], device=lens.device) < rest[..., None]).to(torch.int64)
        won = torch.zeros_like(best).scatter_(2, best, won).view_as(free) * free
        return torch.minimum((sure + won.sum(dim=3)) * unit, lens)


@dataclass(frozen=True, kw_only=True)
class Threshold(Allocation):
    """What scores at least `tau` stays, up to the budget; and what must. As KVzap has it, arXiv 2601.07891.

    Attributes:
        tau: belongs to the policy's scores.
    """

    name: ClassVar[str] = "threshold"
    pools: ClassVar[bool] = True

    tau: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is None:
            raise ValueError("allocation_options.tau: give the score from which on entries stay under threshold")

    @property
    def extra_blocks(self) -> int:
        return 0

    def counts(self, held: Candidates) -> Tensor:
        import torch

        from zipage.transfer import to_device

        unit, lens = self.unit(held.block_size), held.lens.long()
        keep, must = to_device([held.keep, held.must], lens.device)[..., None]
        slots = torch.arange(held.scores.shape[3], device=lens.device)
        above = (held.scores >= self.tau) & ~held.forced & (slots < lens[..., None])
        units = (must + above.sum(dim=3) + unit - 1).div(unit, rounding_mode="floor")
        return torch.minimum(torch.minimum(units * unit, keep), lens)


KINDS: dict[str, type[Allocation]] = {kind.name: kind for kind in (Pyramid, Adaptive, Threshold)}


def make(name: str, options: Mapping[str, Any] | None = None) -> Allocation | None:
    """The allocation of a name and its options; None for "uniform".

    Raises:
        ValueError: the name or an option is unknown, or a value is outside its range.
    """
    options = options or {}
    if name == UNIFORM:
        if options:
            raise ValueError(f"allocation_options={shown(options)}: must be empty with allocation='uniform'")
        return None
    if name not in KINDS:
        raise ValueError(f"allocation={shown(name)}: must be one of {', '.join((UNIFORM, *KINDS))}")
    kind = KINDS[name]
    check_names(options, [f.name for f in fields(kind)], f"allocation_options of {name!r}")
    return kind(**options)


@cache
def pyramid(free: int, num_layers: int, beta: float) -> list[int]:
    """Units of each layer beside those that must stay; `num_layers * free` in all."""
    if num_layers == 1:
        return [free]
    steepness = 1 / Fraction(beta)
    shares = [free * (2 - steepness - layer * (2 - 2 * steepness) / (num_layers - 1)) for layer in range(num_layers)]
    units = [int(share) for share in shares]
    missing = num_layers * free - sum(units)
    for layer in sorted(range(num_layers), key=lambda layer: units[layer] - shares[layer])[:missing]:
        units[layer] += 1
    return units


def _last_of_units(held: Candidates, unit: int) -> tuple[Tensor, Tensor]:
    """Score and position of the last entry of each unit, entries in the order in which a head keeps them.

    Returns:
        [L, R, H, units], twice.
    """
    import torch

    lens, width = held.lens.long(), held.scores.shape[3]
    slots = torch.arange(width, device=lens.device)
    # + 0.0 makes the two zeros one, whatever sorts them.
    values = torch.where(held.forced, float("inf"), held.scores + 0.0)
    values = values.masked_fill(slots >= lens[..., None], float("-inf"))
    order = width - 1 - values.flip(-1).argsort(dim=-1, descending=True, stable=True)
    ends = torch.arange(unit, width + unit, unit, device=lens.device)
    ends = torch.minimum(ends, lens[..., None]).clamp_min(1) - 1
    last = order.gather(3, ends)
    return values.gather(3, last), held.positions.long().expand_as(values).gather(3, last)


def _pooled_order(scores: Tensor, positions: Tensor, free: Tensor) -> Tensor:
    """int64 [L, R, H * units], places of the units of all heads: the free ones first, then by score, position, head."""
    scores, positions, free = (x.flatten(2) for x in (scores, positions, free))
    order = positions.argsort(dim=2, descending=True, stable=True)
    for key in (scores, free.int()):
        order = order.gather(2, key.gather(2, order).argsort(dim=2, descending=True, stable=True))
    return order
