"""Quadratic forms of keys under whole matrices, against the reference."""

import pytest
import torch

import kernels.key_squares_triton as key_squares_triton_module
from kernels.key_squares import key_squares, key_squares_reference
from kernels.key_squares_triton import key_squares_triton
from tests.kernels.events import difference, make_event
from tests.kernels.grid import half
from tests.kernels.paged import CUDA, device_of, upcast

BOUND = 2e-5 if CUDA else 5e-6
"""On a GPU matrices and keys are sums of two bfloat16. Interpreted, the second number is exact."""

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
"""The interpreter takes this kernel's products of bfloat16 in float32."""


def weights_of(event, group: int, one_for_all: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Linear forms and matrices, those of a layer and head alike for all requests or not, and each request's turn.

    No matrix is symmetric, and a turn has lengths.
    """
    layers, requests, heads = event.view.lens.shape
    dim, device = event.k_cache.shape[4], event.k_cache.device
    shape = layers, 1 if one_for_all else requests, heads, group, dim
    linear = torch.randn(shape, device=device).expand(layers, requests, *shape[2:])
    matrices = torch.randn(*shape, dim, device=device).expand(layers, requests, *shape[2:], -1)
    return linear, matrices, torch.randn(requests, 2, dim // 2, device=device)


def error(event, weights) -> float:
    """Of the kernel."""
    expected = key_squares_reference(upcast(event.view), *(x.cpu() for x in weights))
    return difference(key_squares_triton(event.view, *weights), expected)


@pytest.mark.usefixtures("poisoned_empty")
@half(
    ("dtype", DTYPES),
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
    assert error(event, weights_of(event, group, one_for_all)) < BOUND


@pytest.mark.parametrize("most", [64, 128])
def test_keys_of_several_programs(monkeypatch, most):
    monkeypatch.setattr(key_squares_triton_module, "MOST_KEYS", most)
    event = make_event([200, 64, 65, 0, 129], 32, 1, 1, 16, torch.bfloat16, device_of("triton"))
    assert error(event, weights_of(event, 2, False)) < BOUND


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_symmetric_cancels(dtype):
    """Only the symmetric part of a matrix counts, turned or not: of an antisymmetric one the linear form is left."""
    event = make_event([40], 16, 1, 1, 32, dtype, device_of("triton"))
    linear, matrices, turn = weights_of(event, 2, False)
    out = key_squares_triton(event.view, linear, (matrices - matrices.mT).contiguous(), turn)
    expected = key_squares_reference(upcast(event.view), linear.cpu(), 0 * matrices.cpu(), turn.cpu())
    assert difference(out, expected) < 20 * BOUND  # what cancels is larger than what is left


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_of_nan_has_no_say_in_others(dtype):
    event = make_event([70, 40], 16, 1, 2, 32, dtype, device_of("triton"))
    weights = weights_of(event, 2, True)
    before = key_squares_triton(event.view, *weights)
    event.k_cache[0, int(event.view.block_tables[0, 0, 1, 2]), 1, 5, 3] = float("nan")
    out = key_squares_triton(event.view, *weights)
    assert out[0, 0, 1, :, 37].isnan().all()
    before[0, 0, 1, :, 37] = out[0, 0, 1, :, 37] = 0
    assert torch.equal(out, before)


@pytest.mark.parametrize("squares", [key_squares_triton, key_squares_reference, key_squares])
def test_by_hand(squares):
    """A quarter turn makes (3, 4) of (4, -3), and a key twice as long of (1, 0)."""
    event = make_event([2], 16, 1, 1, 2, torch.float32, device_of("triton"))
    block = int(event.view.block_tables[0, 0, 0, 0])
    event.k_cache[0, block, 0, :2] = torch.tensor([[4.0, -3], [1, 0]])
    linear, matrices = torch.tensor([[[[[1.0, 2]]]]]), torch.tensor([[[[[[1.0, 10], [100, 1000]]]]]])
    for turn, expected in (
        ([0.0, 1], [9 + 110 * 12 + 16e3 - 2, 1001, 0]),
        ([2.0, 0], [64 - 110 * 48 + 36e3 - 2, 5, 0]),
    ):
        weights = linear, matrices, torch.tensor(turn).view(1, 2, 1)
        out = squares(event.view, *(x.to(event.k_cache.device) for x in weights))
        torch.testing.assert_close(out[0, 0, 0, 0, :3].cpu(), torch.tensor(expected))


def test_wrong_arguments_are_named():
    event = make_event([20], 16, 1, 1, 16)
    odd, wide = make_event([20], 16, 1, 1, 7), make_event([20], 16, 1, 1, 256)
    linear, matrices, turn = weights_of(event, 2, True)
    for view, args, message in (
        (event.view, (linear, matrices[..., :8], turn), "matrices"),
        (event.view, (linear, matrices.double(), turn), "matrices"),
        (event.view, (linear, matrices.mT, turn), "matrices has stride"),
        (event.view, (linear[..., :1, :], matrices, turn), "linear has shape"),
        (event.view, (linear, matrices, turn[:, :1]), "turn"),
        (odd.view, weights_of(odd, 2, True), "k_cache has head_dim 7"),
        (wide.view, weights_of(wide, 2, True), "k_cache has head_dim 256"),
    ):
        with pytest.raises(ValueError, match=message):
            key_squares(view, *args)
