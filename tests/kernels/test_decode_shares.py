import random
import sys

import pytest
import torch

from kernels import paged_decode_gluon
from kernels.attention_form import PLAIN, AttentionForm
from kernels.cache_view import CacheView
from kernels.decode_pieces import gpu_pieces
from kernels.decode_shares_triton import share_decodes
from kernels.hopper import hopper_kernels
from kernels.pieces import Pieces
from kernels.shares import Shares
from tests.kernels.grid import half
from tests.kernels.paged import DEVICE, make_paged


def lengths(rng: random.Random) -> int:
    return rng.choice([0, 1, 63, 64, 65, 700, rng.randrange(4_000)])


def of_lengths(lens: torch.Tensor) -> CacheView:
    """A view of lengths [B, H], each request in blocks of its own."""
    cache = torch.empty(1, lens.shape[-1], 16, 64, device=DEVICE)
    tables = torch.arange(lens.shape[-2], dtype=torch.int32, device=DEVICE)[:, None, None].expand(-1, lens.shape[-1], 1)
    return CacheView(cache, cache, tables, lens)


def expected_starts(lens: list[int], tile: int, cost: int, programs: int) -> tuple[list[tuple[int, int]], int]:
    """By definition: every unit of every line in order, and where each program begins among them."""
    units = [(line, unit) for line, n in enumerate(lens) for unit in range(cost + max(1, -(-n // tile)))]
    working = min(programs, len(units))
    places = [min(p, working) * len(units) // working for p in range(programs + 1)]
    return [*units, (len(lens), 0)], places


@pytest.mark.usefixtures("poisoned_empty")
@half(
    ("tile", [16, 64]),
    ("cost", [0, 2]),
    (("batch", "programs"), [(1, 1), (1, 300), (3, 7), (44, 264), (300, 40)]),
    ("heads", ["shared", "apart"]),
)
def test_every_program_has_as_much(tile, cost, batch, programs, heads):
    rng = random.Random(batch)
    lens = torch.tensor([[lengths(rng) for _ in range(3)] for _ in range(batch)], dtype=torch.int32, device=DEVICE)
    if heads == "shared":
        lens = lens[:, :1].expand(-1, 3)
    shares = share_decodes(of_lengths(lens), tile, cost, programs)
    units, places = expected_starts(lens.flatten().tolist(), tile, cost, programs)
    assert list(zip(*shares.starts.tolist(), strict=True)) == [units[place] for place in places]
    assert shares.units.item() == len(units) - 1
    assert shares.arrived.tolist() == [0] * 3 * batch
    assert shares.fresh.item() == 0


@pytest.mark.usefixtures("poisoned_empty")
def test_layers_are_shared_out_each_by_itself():
    lens = torch.tensor([[[9], [700], [0]], [[64], [1], [2000]]], dtype=torch.int32, device=DEVICE)
    together = share_decodes(of_lengths(lens[0])._replace(lens=lens), 64, 2, 7)
    for layer in range(2):
        alone, of_layer = share_decodes(of_lengths(lens[layer]), 64, 2, 7), together.layer(layer)
        assert all(torch.equal(a, b) for a, b in zip(of_layer[:3], alone[:3], strict=True))
    # No tables are known of all layers, so any entry may be new.
    assert together.fresh.tolist() == [[1], [1]]


PROMPT = [40, 7, 21, 22, 23, 0]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("lens", "rows", "fresh"),
    [
        (PROMPT, [0, 1, 2, 2, 2, 3], 1),
        (PROMPT, [0, 1, 2, 3, 4, 5], 0),  # requests of such lengths that have nothing in common
        ([40, 40, 7], [0, 0, 1], 0),  # two that begin alike
        ([1, 2], [0, 0], 1),
        ([0, 1], [0, 0], 0),
        ([5], [0], 0),
    ],
)
def test_a_prompt_among_the_decodes_has_fresh_entries(lens, rows, fresh):
    """As decodes, its tokens attend to entries that the same step wrote."""
    view = make_paged([64] * 6, 16, 2, 64, torch.float32, DEVICE)
    lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)[:, None].expand(-1, 2)
    tables = view.block_tables[rows]
    for apart in (False, True):
        some = view._replace(lens=lens.contiguous(), block_tables=tables) if apart else view._replace(
            lens=lens, block_tables=tables[:, :1].expand(-1, 2, -1)
        )  # fmt: skip
        assert share_decodes(some, 64, 2, 9).fresh.item() == fresh


@pytest.mark.parametrize(
    ("dtype", "head_dim", "batch", "group", "form", "taken"),
    [
        (torch.bfloat16, 128, 64, 4, PLAIN, True),
        (torch.float16, 64, 1, 16, AttentionForm(sinks=torch.zeros(4)), True),
        (torch.float32, 128, 1, 4, PLAIN, False),
        (torch.bfloat16, 96, 1, 4, PLAIN, False),
        (torch.bfloat16, 256, 1, 4, PLAIN, False),
        (torch.bfloat16, 128, 65, 4, PLAIN, False),
        (torch.bfloat16, 128, 1, 17, PLAIN, False),
        (torch.bfloat16, 128, 1, 4, AttentionForm(window=4096), False),
        (torch.bfloat16, 128, 1, 4, AttentionForm(soft_cap=30.0), False),
    ],
)
def test_hopper_has_a_kernel_for_some(monkeypatch, dtype, head_dim, batch, group, form, taken):
    monkeypatch.setattr(paged_decode_gluon, "has_warpgroups", lambda device: True)
    cache = torch.zeros(2, 8, 16, head_dim, dtype=dtype)
    view = CacheView.shared(cache, cache, torch.zeros(batch, 1, dtype=torch.int32), torch.zeros(batch).int())
    assert paged_decode_gluon.takes(view, group, form) == taken
    monkeypatch.setattr(paged_decode_gluon, "has_warpgroups", lambda device: False)
    assert not paged_decode_gluon.takes(view, group, form)


@pytest.fixture
def of_hopper(monkeypatch):
    """A view that Hopper's kernel takes."""
    monkeypatch.setattr(paged_decode_gluon, "has_warpgroups", lambda device: True)
    cache = torch.zeros(2, 8, 16, 64, dtype=torch.float16, device=DEVICE)
    tables = torch.zeros(3, 1, dtype=torch.int32, device=DEVICE)
    return CacheView.shared(cache, cache, tables, torch.tensor([3, 0, 9], dtype=torch.int32, device=DEVICE))


def test_one_layer_that_hopper_has_no_kernel_for_leaves_all_to_the_other(of_hopper):
    """They have the same pieces."""
    sinks = AttentionForm(sinks=torch.zeros(8, device=DEVICE))
    assert isinstance(gpu_pieces(of_hopper, 1, (PLAIN, sinks)), Shares)
    assert isinstance(gpu_pieces(of_hopper, 1, (PLAIN, AttentionForm(window=4))), Pieces)
    assert isinstance(gpu_pieces(of_hopper, 17, (PLAIN,)), Pieces)


def test_another_gluon_costs_speed_alone(of_hopper, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "kernels.paged_decode_gluon", None)
    monkeypatch.delattr("kernels.paged_decode_gluon")
    hopper_kernels.cache_clear()
    for _ in range(2):
        assert isinstance(gpu_pieces(of_hopper, 1, (PLAIN,)), Pieces)
    hopper_kernels.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "paged_decode has a slower kernel" in caplog.text


@pytest.mark.parametrize(
    ("group", "form"), [(1, AttentionForm(window=4)), (1, AttentionForm(soft_cap=9.0)), (17, PLAIN)]
)
def test_shares_are_of_no_attention_that_hopper_has_no_kernel_for(of_hopper, group, form):
    """It would leave out the window, the cap, the heads past the sixteenth."""
    q = torch.zeros(3, 8 * group, 64, dtype=torch.float16, device=DEVICE)
    shares = share_decodes(of_hopper, paged_decode_gluon.TILE, paged_decode_gluon.LINE_COST, 4)
    with pytest.raises(ValueError, match="pieces has type Shares: its kernel has no such attention"):
        paged_decode_gluon.paged_decode_gluon(q, of_hopper, 0.1, shares, form=form)
