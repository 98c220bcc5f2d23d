"""Counts of every allocation against a definition in plain Python."""

from itertools import product

import pytest
import torch

from tests.eviction.dense_allocation import by_hand
from zipage.eviction import allocation
from zipage.eviction.allocation import Candidates, make, pyramid

KINDS = [
    ("pyramid", {}),
    ("pyramid", {"beta": 1.0}),
    ("pyramid", {"beta": 3.0}),
    ("adaptive", {}),
    ("adaptive", {"alpha": 0.0}),
    ("adaptive", {"alpha": 1.0}),
    ("threshold", {"tau": 2.0}),
    ("threshold", {"tau": -100.0}),
    ("threshold", {"tau": 100.0}),
]
ROUNDS = ["entry", "page"]


def drawn(seed: int, *, layers: int = 3, requests: int = 2, heads: int = 4, block: int = 16) -> Candidates:
    """Heads of unequal lengths whose scores are full of ties."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    keep = [block * int(integers(1, 5, 1)) for _ in range(requests)]
    must = [int(integers(0, k + 1, 1)) for k in keep]
    blocks = integers(0, 4, layers, requests, heads)
    lens = blocks * block + torch.tensor([-(-m // block) * block for m in must])[:, None]
    if seed % 2:
        lens = lens + 2 * block  # mostly more than is kept
    width = int(lens.max()) + block
    scores = integers(0, 5, layers, requests, heads, width).float()
    positions = integers(0, 9 * width, layers, requests, heads, width).sort(dim=-1).values
    positions = positions + torch.arange(width)
    protected = torch.tensor(must)[:, None, None] // 2
    slots = torch.arange(width)
    recent = torch.tensor(must)[:, None, None] - protected
    held = slots < lens[..., None]
    forced = held & ((slots < protected) | (slots >= lens[..., None] - recent))
    return Candidates(scores, forced, positions, lens, keep, must, block, num_layers=layers)


@pytest.mark.parametrize("rounding", ROUNDS)
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_counts_are_those_of_the_definition(name, options, rounding):
    for seed in range(12):
        held = drawn(seed)
        counts = make(name, {**options, "round": rounding}).counts(held)
        assert torch.equal(counts, by_hand(name, options, rounding, held))
        assert (counts >= torch.minimum(torch.tensor(held.must)[:, None], held.lens)).all()
        assert (counts <= held.lens).all()


@pytest.mark.parametrize("rounding", ROUNDS)
def test_sums_are_exact_where_heads_hold_enough(rounding):
    for seed in range(1, 20):
        held = drawn(seed, layers=4)
        long = held._replace(lens=torch.full_like(held.lens, held.scores.shape[3]))
        adaptive = make("adaptive", {"round": rounding}).counts(long)
        wanted = torch.minimum(torch.tensor([4 * k for k in held.keep]), long.lens.sum(dim=2))
        assert torch.equal(adaptive.sum(dim=2), wanted)
        wide = 16 * 20
        scores = torch.rand(4, 2, 4, wide)
        slots = torch.arange(wide).expand_as(scores)
        full = Candidates(
            scores, slots < torch.tensor(held.must)[:, None, None], slots, torch.full((4, 2, 4), wide),
            held.keep, held.must, 16, num_layers=4,
        )  # fmt: skip
        for name in ("pyramid", "adaptive"):
            counts = make(name, {"round": rounding}).counts(full)
            assert counts.sum(dim=(0, 2)).tolist() == [16 * k for k in held.keep]
            assert (counts >= torch.tensor(held.must)[:, None]).all()
            if name == "adaptive":
                assert (counts.sum(dim=2) == torch.tensor([4 * k for k in held.keep])).all()


@pytest.mark.parametrize(("name", "options"), [("pyramid", {"beta": 1.0}), ("adaptive", {"alpha": 1.0})])
def test_uniform_is_a_value_of_the_option(name, options):
    held = drawn(1)
    long = held._replace(lens=torch.full_like(held.lens, held.scores.shape[3]))
    for rounding in ROUNDS:
        counts = make(name, {**options, "round": rounding}).counts(long)
        wanted = torch.minimum(torch.tensor(held.keep)[:, None], long.lens)
        assert torch.equal(counts, wanted)


def test_a_launch_of_some_layers_gets_their_share():
    held = drawn(3, layers=4)
    for name, options in KINDS:
        kind = make(name, options)
        whole = kind.counts(held)
        some = held._replace(
            **{f: getattr(held, f)[2:] for f in ("scores", "forced", "positions", "lens")}, first_layer=2
        )
        assert torch.equal(kind.counts(some), whole[2:])


def test_pyramid_is_exact_for_every_size():
    for free, layers, beta in product((0, 1, 7, 100), (1, 2, 5, 36), (1.0, 1.5, 20.0, 1e6)):
        units = pyramid(free, layers, beta)
        assert sum(units) == layers * free
        assert units == sorted(units, reverse=True)
        assert min(units) >= 0


def test_pool_ties_go_to_the_younger_position_then_the_lower_head():
    scores = torch.zeros(1, 1, 2, 2)
    positions = torch.tensor([[[[0, 5], [0, 6]]]])
    forced = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    held = Candidates(scores, forced, positions, torch.full((1, 1, 2), 2), [1], [0], 1, 1)
    kind = make("adaptive", {"alpha": 0.0, "round": "entry"})
    assert kind.counts(held._replace(keep=[1])).tolist() == [[[1, 1]]]
    one = held._replace(lens=torch.ones(1, 1, 2))
    assert kind.counts(one).tolist() == [[[1, 1]]]
    younger = torch.tensor([[[[7, 8], [0, 6]]]])
    assert kind.counts(held._replace(positions=younger)).tolist() == [[[2, 0]]]
    same = torch.tensor([[[[7, 8], [7, 8]]]])
    assert kind.counts(held._replace(positions=same)).tolist() == [[[1, 1]]]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("pyramids", {}, "must be one of uniform, pyramid, adaptive, threshold"),
        ("uniform", {"beta": 2.0}, "allocation_options={'beta': 2.0}: must be empty with allocation='uniform'"),
        ("pyramid", {"alpha": 0.2}, "allocation_options of 'pyramid': unknown option 'alpha'; known: round, beta"),
        ("pyramid", {"beta": 0.5}, "allocation_options.beta=0.5: must be at least 1"),
        ("adaptive", {"alpha": 1.5}, r"allocation_options.alpha=1.5: must be in \[0, 1\]"),
        ("adaptive", {"round": "up"}, "must be one of page, entry"),
        ("threshold", {}, "allocation_options.tau: give"),
    ],
)
def test_bad_options_are_told(name, options, said):
    with pytest.raises(ValueError, match=said):
        make(name, options)


def test_labels_show_what_is_not_default():
    assert make("adaptive").label == "adaptive"
    assert make("pyramid", {"beta": 3.0, "round": "entry"}).label == "pyramid (round=entry, beta=3.0)"
    assert make(allocation.UNIFORM) is None
