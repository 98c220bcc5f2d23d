"""Quadratic forms of keys under whole matrices, against the reference."""

import pytest
import torch

from kernels.key_squares import key_squares, key_squares_reference
from kernels.key_squares_triton import key_squares_triton
from tests.kernels.events import difference, make_event
from tests.kernels.grid import half
from tests.kernels.paged import TRITON_DTYPES, device_of, upcast


def weights_of(event, group: int, one_for_all: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices, those of a layer and head alike for all requests or not, and each request's turn."""
    layers, requests, heads = event.view.lens.shape
    dim, device = event.k_cache.shape[4], event.k_cache.device
    matrices = torch.randn(layers, 1 if one_for_all else requests, heads, group, dim, dim, device=device)
    return matrices.expand(-1, requests, -1, -1, -1, -1), torch.randn(requests, 2, dim // 2, device=device)


@pytest.mark.usefixtures("poisoned_empty")
@half(
    ("dtype", TRITON_DTYPES),
    (
        ("lens", "block_size", "head_dim", "group"),
        [
            pytest.param([37, 0, 16, 70], 16, 40, 3, id="b16-d40-g3"),
            pytest.param([130, 64], 64, 64, 1, id="b64-d64-g1"),
            pytest.param([257], 256, 128, 4, id="b256-d128-g4"),
        ],
    ),
    ("one_for_all", [pytest.param(True, id="one"), pytest.param(False, id="each")]),
    ("apart", [pytest.param(False, id="shared"), pytest.param(True, id="apart")]),
)
def test_key_squares(dtype, one_for_all, apart, lens, block_size, head_dim, group):
    event = make_event(lens, block_size, 2, 1 + apart, head_dim, dtype, device_of("triton"), apart=apart)
    matrices, turn = weights_of(event, group, one_for_all)
    out = key_squares_triton(event.view, matrices, turn)
    assert difference(out, key_squares_reference(upcast(event.view), matrices.cpu(), turn.cpu())) < 5e-6


@pytest.mark.parametrize("squares", [key_squares_triton, key_squares_reference, key_squares])
def test_by_hand(squares):
    """A quarter turn makes (3, 4) of (4, -3), and a key twice as long of (1, 0)."""
    event = make_event([2], 16, 1, 1, 2, torch.float32, device_of("triton"))
    block = int(event.view.block_tables[0, 0, 0, 0])
    event.k_cache[0, block, 0, :2] = torch.tensor([[4.0, -3], [1, 0]])
    matrices, device = torch.tensor([[[[[[1.0, 10], [100, 1000]]]]]]), event.k_cache.device
    for turn, expected in (([0.0, 1], [9 + 110 * 12 + 16e3, 1000, 0]), ([2.0, 0], [64 - 110 * 48 + 36e3, 4, 0])):
        out = squares(event.view, matrices.to(device), torch.tensor(turn, device=device).view(1, 2, 1))
        torch.testing.assert_close(out[0, 0, 0, 0, :3].cpu(), torch.tensor(expected))


def test_wrong_arguments_are_named():
    event = make_event([20], 16, 1, 1, 16)
    odd, wide = make_event([20], 16, 1, 1, 7), make_event([20], 16, 1, 1, 256)
    matrices, turn = weights_of(event, 2, True)
    for view, args, message in (
        (event.view, (matrices[..., :8], turn), "matrices"),
        (event.view, (matrices.double(), turn), "matrices"),
        (event.view, (matrices.mT, turn), "matrices has stride"),
        (event.view, (matrices, turn[:, :1]), "turn"),
        (odd.view, weights_of(odd, 2, True), "k_cache has head_dim 7"),
        (wide.view, weights_of(wide, 2, True), "k_cache has head_dim 256"),
    ):
        with pytest.raises(ValueError, match=message):
            key_squares(view, *args)
