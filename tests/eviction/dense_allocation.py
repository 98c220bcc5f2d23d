"""How many entries each head keeps, from the definitions alone: plain Python, one layer and request at a time."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import torch

from tests.eviction.dense_simulation import Simulation
from zipage.eviction.allocation import Candidates


def by_hand(name: str, options: dict, rounding: str, held: Candidates) -> torch.Tensor:
    """The definition, one layer and request at a time."""
    unit = held.block_size if rounding == "page" else 1
    layers, requests, heads = held.lens.shape
    counts = torch.zeros(layers, requests, heads, dtype=torch.int64)
    for layer, row in product(range(layers), range(requests)):
        keep, floor = held.keep[row] // unit, -(-held.must[row] // unit)
        if name == "pyramid":
            of_layers = shares(keep - floor, held.num_layers, options.get("beta", 20.0))
            taken = [floor + of_layers[held.first_layer + layer]] * heads
        elif name == "adaptive":
            taken = pooled(held, layer, row, keep, floor, unit, options.get("alpha", 0.2))
        else:
            taken = []
            for head in range(heads):
                length = int(held.lens[layer, row, head])
                above = sum(
                    held.scores[layer, row, head, j] >= options["tau"] and not held.forced[layer, row, head, j]
                    for j in range(length)
                )
                taken.append(min(keep, -(-(held.must[row] + int(above)) // unit)))
        for head in range(heads):
            counts[layer, row, head] = min(unit * taken[head], int(held.lens[layer, row, head]))
    return counts


def shares(free: int, layers: int, beta: float) -> list[int]:
    slope, beta = max(layers - 1, 1), Fraction(beta)
    exact = [free * (2 - 1 / beta - Fraction(layer, slope) * (2 - 2 / beta)) for layer in range(layers)]
    found = [x.numerator // x.denominator for x in exact]
    while sum(found) < layers * free:
        left = [x - n for x, n in zip(exact, found, strict=True)]
        found[left.index(max(left))] += 1
    return found


def pooled(held: Candidates, layer: int, row: int, keep: int, floor: int, unit: int, alpha: float) -> list[int]:
    heads = held.lens.shape[2]
    sure = floor + int(Fraction(alpha) * (keep - floor))
    taken, pool = [], []
    for head in range(heads):
        length = int(held.lens[layer, row, head])
        line = layer, row, head
        order = sorted(range(length), key=lambda j: (-int(held.forced[line][j]), -float(held.scores[line][j]), -j))
        units = [order[i : i + unit] for i in range(0, length, unit)]
        taken.append(min(sure, len(units)))
        pool += [(-float(held.scores[line][u[-1]]), -int(held.positions[line][u[-1]]), head) for u in units[sure:]]
    for _, _, head in sorted(pool)[: heads * keep - sum(taken)]:
        taken[head] += 1
    return taken


class UnequalSimulation(Simulation):
    """One request whose heads keep unequal numbers of entries; `allocation` is (name, options, rounding)."""

    def run_unequal(self, sizes: list[int], allocation: tuple[str, dict, str], block: int) -> list[dict]:
        """Kept positions after each event, before which every head gains `sizes` entries."""
        history = []
        for new in sizes:
            for head in self.cache.values():
                head.tokens += range(self.seen, self.seen + new)
                head.carried += [None] * new
            self.seen += new
            lens = {place: len(head.tokens) for place, head in self.cache.items()}
            scores = {place: self._score(place, n, allocation, block) for place, n in lens.items()}
            counts = self._counts(scores, lens, allocation, block)
            protected = self._protected()
            for place, head in self.cache.items():
                forced = self._must(lens[place])
                rest = sorted((j for j in range(lens[place]) if j not in forced), key=lambda j: (-scores[place][j], -j))
                slots = sorted(forced | set(rest[: counts[place] - len(forced)]))
                head.tokens = [head.tokens[j] for j in slots]
                head.carried = [head.carried[j] if j >= protected else None for j in slots]
            self.t += 1
            history.append({place: list(head.tokens) for place, head in self.cache.items()})
        return history

    def _score(self, place: tuple[int, int], n: int, allocation: tuple[str, dict, str], block: int) -> list[float]:
        score = self._dkv if self.policy == "vase" else getattr(self, "_" + self.scorer)
        scores = score(place, n)
        if self.policy != "critical":
            return scores
        kept, (name, options, rounding) = self.keep, allocation
        assert name == "pyramid", "what a head keeps must be known before it is ranked"
        unit = block if rounding == "page" else 1
        floor = -(-(self._protected() + self.recent) // unit)
        of_layers = shares(kept // unit - floor, self.layers, options.get("beta", 20.0))
        self.keep = unit * (floor + of_layers[place[0]])
        try:
            return self._critical(place, scores, self._must(n))
        finally:
            self.keep = kept

    def _counts(self, scores: dict, lens: dict, allocation: tuple[str, dict, str], block: int) -> dict:
        shape = self.layers, 1, self.heads
        width = max(lens.values())
        rows = torch.full((*shape, width), float("nan"), dtype=torch.float64)
        forced = torch.zeros((*shape, width), dtype=torch.bool)
        positions = torch.zeros((*shape, width), dtype=torch.int64)
        for (layer, head), n in lens.items():
            rows[layer, 0, head, :n] = torch.tensor(scores[layer, head], dtype=torch.float64)
            forced[layer, 0, head, sorted(self._must(n))] = True
            positions[layer, 0, head, :n] = torch.tensor(self.cache[layer, head].tokens)
        held = torch.tensor([lens[layer, head] for layer, head in product(range(self.layers), range(self.heads))])
        must = self._protected() + self.recent
        args = rows, forced, positions, held.view(shape), [self.keep], [must], block, self.layers
        name, options, rounding = allocation
        counts = by_hand(name, options, rounding, Candidates(*args))
        return {place: int(counts[place[0], 0, place[1]]) for place in lens}
