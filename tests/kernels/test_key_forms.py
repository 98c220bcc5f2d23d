"""Forms of keys, against the reference."""

import pytest
import torch

from kernels.key_forms import key_forms, key_forms_reference
from kernels.key_forms_triton import key_forms_triton
from tests.kernels.events import difference, make_event
from tests.kernels.grid import half
from tests.kernels.paged import TRITON_DTYPES, device_of, upcast


def weights_of(event, group: int, *shape: int) -> torch.Tensor:
    """The same for all requests."""
    layers, requests, heads = event.view.lens.shape
    weights = torch.randn(layers, 1, heads, group, *shape, device=event.k_cache.device)
    return weights.expand(-1, requests, *weights.shape[2:])


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
    ("kinds", [pytest.param(kinds, id=kinds) for kinds in ("linear", "sizes", "squares", "all")]),
    ("apart", [pytest.param(False, id="shared"), pytest.param(True, id="apart")]),
)
def test_key_forms(dtype, kinds, apart, lens, block_size, head_dim, group):
    event = make_event(lens, block_size, 2, 1 + apart, head_dim, dtype, device_of("triton"), apart=apart)
    linear = weights_of(event, group, head_dim)
    sizes = weights_of(event, group, head_dim // 2) if kinds in ("sizes", "all") else None
    squares = weights_of(event, group, 3, head_dim // 2) if kinds in ("squares", "all") else None
    out = key_forms_triton(event.view, linear, sizes, squares)
    host = (None if x is None else x.cpu() for x in (linear, sizes, squares))
    assert difference(out, key_forms_reference(upcast(event.view), *host)) < 5e-6


def test_an_odd_dimension_has_a_linear_form():
    event = make_event([20], 16, 1, 1, 7, torch.float32, device_of("triton"))
    linear = weights_of(event, 2, 7)
    out = key_forms_triton(event.view, linear)
    assert difference(out, key_forms_reference(upcast(event.view), linear.cpu())) < 5e-6


@pytest.mark.parametrize("forms", [key_forms_triton, key_forms_reference, key_forms])
def test_by_hand(forms):
    event = make_event([2], 16, 1, 1, 2, torch.float32, device_of("triton"))
    block = int(event.view.block_tables[0, 0, 0, 0])
    event.k_cache[0, block, 0, :2] = torch.tensor([[3.0, 4], [1, -2]])
    linear, sizes = torch.tensor([[[[[10.0, 1]]]]]), torch.tensor([[[[[100.0]]]]])
    squares = torch.tensor([[[[[[1e3], [1e4], [1e5]]]]]])
    out = forms(event.view, *(x.to(event.k_cache.device) for x in (linear, sizes, squares)))[0, 0, 0, 0, :3].cpu()
    expected = [34 + 500 + 9e3 + 24e4 + 16e5, 8 + 100 * 5**0.5 + 1e3 - 4e4 + 4e5, 0]
    torch.testing.assert_close(out, torch.tensor(expected))


def test_wrong_arguments_are_named():
    event = make_event([20], 16, 1, 1, 16)
    linear = weights_of(event, 2, 16)
    odd = make_event([20], 16, 1, 1, 7)
    for view, args, message in (
        (event.view, (linear[..., :8],), "linear"),
        (event.view, (linear.double(),), "linear"),
        (event.view, (linear, linear), "sizes"),
        (event.view, (linear, None, weights_of(event, 2, 8, 3)), "squares"),
        (odd.view, (weights_of(odd, 2, 7), weights_of(odd, 2, 3)), "sizes has value .* not in pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            key_forms(view, *args)
