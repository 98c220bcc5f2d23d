"""A mixture of experts, each way to compute it against the reference."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from kernels.clamped_swiglu import clamped_swiglu, clamped_swiglu_reference
from kernels.expert_mlp import expert_mlp, expert_mlp_all, expert_mlp_grouped, expert_mlp_reference
from kernels.expert_mlp_triton import expert_mlp_triton, group_by_expert
from kernels.expert_tiles import EXACT, ExpertTile, find_tile
from kernels.silu_mul import silu_mul_torch
from tests.kernels.paged import DEVICE, TRITON_DTYPES


def arguments(tokens=9, width=32, inner=16, num_experts=5, active=2, dtype=torch.float32) -> dict:
    """Expert 0 is nobody's, and expert 1 everybody's."""
    others = torch.stack([2 + torch.randperm(num_experts - 2)[: active - 1] for _ in range(tokens)] or [torch.empty(0)])
    experts = torch.cat((torch.ones(tokens, 1), others.reshape(tokens, active - 1)), dim=1).long()
    return {
        "x": torch.randn(tokens, width).to(dtype),
        "experts": experts,
        "shares": torch.rand(tokens, active),
        "gate_up": (torch.randn(num_experts, 2 * inner, width) / width**0.5).to(dtype),
        "down": (torch.randn(num_experts, width, inner) / inner**0.5).to(dtype),
    }


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("compute", [expert_mlp, expert_mlp_grouped, expert_mlp_all])
def test_equals_the_reference(compute, dtype, bound):
    given = arguments(dtype=dtype)
    out, expected = compute(**given), expert_mlp_reference(**given)
    assert out.dtype == dtype
    assert (out - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("compute", [expert_mlp, expert_mlp_grouped, expert_mlp_all])
def test_biases_and_another_gate(compute):
    """gpt-oss's."""
    given = arguments() | {"biases": (torch.randn(5, 32), torch.randn(5, 32))}
    expected = expert_mlp_reference(**given, gate=partial(clamped_swiglu_reference, alpha=1.7, limit=0.5))
    out = compute(**given, gate=partial(clamped_swiglu, alpha=1.7, limit=0.5))
    torch.testing.assert_close(out, expected)
    assert (out - compute(**arguments())).abs().max() > 0.1


def test_no_tokens():
    assert expert_mlp(**arguments(tokens=0)).shape == (0, 32)


def test_rows_that_the_grouped_product_does_not_take():
    given = arguments(width=30, inner=6)
    torch.testing.assert_close(expert_mlp(**given), expert_mlp_reference(**given))


def test_an_expert_that_overflows_costs_those_alone_that_it_has():
    given = arguments()
    given["down"][0] = torch.inf
    assert expert_mlp_all(**given).isfinite().all()


def test_a_gpu_has_kernels_whatever_the_host_would_have_to_read(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr("kernels.expert_mlp._triton", lambda: lambda *_: "triton")
    for sizes in ({"tokens": 1}, {"tokens": 9000}, {"width": 30, "inner": 6}):
        assert expert_mlp(**{name: x.to("meta") for name, x in arguments(**sizes).items()}) == "triton"


ONE_TILE = ExpertTile(16, 32, 32, 3)
TILES = [
    pytest.param(ONE_TILE, id="whole"),
    pytest.param(ExpertTile(16, 16, 64, 3), id="deeper-than-the-weight"),
    pytest.param(ExpertTile(16, 64, 16, 3), id="swapped"),
    pytest.param(ExpertTile(64, 64, 32, 3), id="many-rows"),
]
BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def triton(given, tile=ONE_TILE, gate=silu_mul_torch, biases=None):
    given = {name: x.to(DEVICE) for name, x in given.items()}
    biases = None if biases is None else tuple(bias.to(DEVICE) for bias in biases)
    return expert_mlp_triton(**given, biases=biases, gate=gate, tile=tile).cpu()


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("sizes", [{"tokens": 35}, {"tokens": 1, "width": 72, "inner": 20}], ids=["tiles", "ragged"])
def test_kernels(tile, sizes, dtype, poisoned_empty):
    """35 tokens are more than two tiles of one expert."""
    given = arguments(dtype=dtype, **sizes)
    out, expected = triton(given, tile), expert_mlp_reference(**given)
    assert (out - expected).abs().max() < BOUNDS[dtype] * expected.abs().max()


def test_kernels_with_biases_and_another_gate():
    given, biases = arguments(tokens=20), (torch.randn(5, 32), torch.randn(5, 32))
    gates = (partial(gate, alpha=1.7, limit=0.5) for gate in (clamped_swiglu, clamped_swiglu_reference))
    out = triton(given, gate=next(gates), biases=biases)
    expected = expert_mlp_reference(**given, biases=biases, gate=next(gates))
    torch.testing.assert_close(out, expected)


def test_a_token_alone_is_a_token_in_a_crowd():
    """To the last bit, also beside tokens that are no numbers."""
    given = arguments(tokens=35)
    whole = triton(given)
    for token in (0, 17, 34):
        one = {name: x[token : token + 1] if name in ("x", "experts", "shares") else x for name, x in given.items()}
        assert triton(one).equal(whole[token : token + 1])
    given["x"][3], given["shares"][20] = torch.nan, torch.nan
    out, others = triton(given), torch.ones(35).bool()
    others[[3, 20]] = False
    assert out[others].equal(whole[others])
    assert out[~others].isnan().all()


def test_kernels_read_no_expert_that_nobody_has():
    given = arguments()
    given["gate_up"][0] = given["down"][0] = torch.nan
    assert triton(given).isfinite().all()


@pytest.mark.parametrize(("tokens", "num_experts", "active"), [(1, 5, 5), (3, 130, 2), (700, 9, 3), (2100, 4, 4)])
def test_groups(tokens, num_experts, active):
    """Pairs of each expert in their order, in tiles of no more than 16; as many tiles as the worst routing needs."""
    experts = torch.rand(tokens, num_experts).topk(active).indices
    experts[: tokens // 2] = torch.arange(active)
    order, tiles = group_by_expert(experts.to(DEVICE), num_experts, ONE_TILE, {"DEPENDENT": False})
    ids, expected = experts.flatten().sort(stable=True)
    assert order.tolist() == expected.tolist()
    listed, place = [row for row in tiles.tolist() if row[0] >= 0], 0
    assert tiles[len(listed) :, 0].eq(-1).all()
    for expert, begin, end in listed:
        assert begin == place
        assert ids[begin:end].eq(expert).all()
        assert end - begin == 16 or end == len(ids) or ids[end] > expert
        place = end
    assert place == len(ids)


def test_worst_routings_need_all_tiles():
    assert ONE_TILE.most_tiles(pairs=10, num_experts=128) == 10
    assert ONE_TILE.most_tiles(pairs=128 + 16 * 3, num_experts=128) == 128 + 3  # 48 more pairs: of one expert


def test_tiles_follow_the_tokens_of_an_expert():
    rows = [find_tile(tokens, 8, 128, 2, large=True).rows for tokens in (1, 128, 129, 256, 512, 1024, 8192)]
    assert rows == [16, 16, 32, 32, 64, 128, 128]
    assert find_tile(8192, 8, 128, 2, large=False).rows == 64
    assert find_tile(8192, 8, 128, 4, large=True) == EXACT


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"experts": torch.zeros(9, 2).int()}, "experts has dtype torch.int32: convert it to torch.int64"),
        ({"shares": torch.zeros(9, 3)}, r"shares has shape \(9, 3\): give \[9, 2\]"),
        ({"gate_up": torch.zeros(5, 16, 32)}, r"gate_up has shape \(5, 16, 32\): give \[5, 32, 32\]"),
        ({"down": torch.zeros(32, 16)}, r"down has shape \(32, 16\): give \[experts, width, inner\]"),
        ({"biases": (torch.zeros(5, 32), torch.zeros(5, 16))}, r"down's bias has shape \(5, 16\): give \[5, 32\]"),
        (
            {"biases": (torch.zeros(5, 40)[:, :32], torch.zeros(5, 32))},
            r"gate_up's bias has stride .*: make it contiguous",
        ),
        ({"experts": torch.zeros(9, 0).long()}, r"experts has shape \(9, 0\): give \[9, 1 to 5\]"),
        ({"experts": torch.tensor(1)}, r"experts has shape \(\): give \[9, 1 to 5\]"),
        ({"down": torch.zeros(5, 16, 32).mT}, "down has stride .*: make its last dimension contiguous"),
    ],
)
def test_wrong_arguments_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        expert_mlp(**arguments() | given)
