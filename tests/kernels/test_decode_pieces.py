import random
from itertools import pairwise

import pytest
import torch

from kernels.cache_view import shared
from kernels.decode_pieces_triton import MIN_PIECE, cut_requests
from tests.kernels.grid import half
from tests.kernels.paged import DEVICE


def lengths(kind: str, batch: int) -> list[int]:
    rng = random.Random(batch)
    if kind == "equal":
        return [1000] * batch
    return [rng.choice([0, 1, 127, 129, 640, 3000, rng.randrange(16_000)]) for _ in range(batch)]


@pytest.mark.usefixtures("poisoned_empty")
@half(
    ("tile", [16, 64, 128]),
    (("batch", "wanted"), [(1, 1), (1, 198), (3, 7), (44, 198), (300, 40)]),
    ("heads", ["shared", "apart"]),
    ("kind", ["equal", "varied"]),
)
def test_pieces_cover_each_request_once(kind, heads, batch, wanted, tile):
    lens = lengths(kind, batch)
    tiles = [-(-n // tile) for n in lens]
    longest = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    # Of heads that differ, the longest one is cut; which that is differs too.
    by_head = torch.stack((longest, longest // 3), dim=1)
    by_head[::2] = by_head[::2].flip(1)
    by_head = shared(longest, 2) if heads == "shared" else by_head
    ranges, starts, arrived = cut_requests(by_head, max(lens), tile=tile, wanted=wanted)
    assert arrived.tolist() == [[0, 0]] * batch
    assert ranges.shape[1] <= wanted + batch
    starts, ranges = starts.tolist(), ranges.T.tolist()
    longest = max(-(-sum(tiles) // wanted), MIN_PIECE // tile)
    for row, count in enumerate(tiles):
        mine = ranges[starts[row] : starts[row + 1]]
        assert [piece[0] for piece in mine] == [row] * len(mine)
        borders = [0, *(piece[2] for piece in mine)]
        assert [piece[1] for piece in mine] == borders[:-1]
        assert borders[-1] == count
        sizes = [b - a for a, b in pairwise(borders)]
        assert all(min(1, count) <= size <= longest for size in sizes)
        assert all(size == sizes[0] for size in sizes[:-1])
    assert starts[0] == 0
    assert all(piece[0] == -1 for piece in ranges[starts[-1] :])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("batch", "wanted"), [(1, 1), (5, 7), (44, 198)])
def test_layers_are_cut_each_by_itself(batch, wanted):
    lens = torch.tensor([lengths("varied", batch + i)[:batch] for i in range(3)], dtype=torch.int32, device=DEVICE)
    lens = lens.view(3, batch, 1)
    together = cut_requests(lens, 16_000, tile=64, wanted=wanted)
    for layer in range(3):
        alone = cut_requests(lens[layer], 16_000, tile=64, wanted=wanted)
        assert all(torch.equal(a, b) for a, b in zip(together.layer(layer), alone, strict=True))


def test_the_bound_of_the_tables_limits_the_pieces():
    lens = shared(torch.tensor([100, 40], dtype=torch.int32, device=DEVICE), 8)
    assert cut_requests(lens, 256, tile=64, wanted=198).ranges.shape == (3, 4)
    assert cut_requests(lens[:0], 256, tile=64).ranges.shape == (3, 0)
