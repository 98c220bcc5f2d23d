import pytest
import torch

from kernels.gated_norm import gated_norm, gated_norm_reference, gated_norm_torch
from kernels.gated_norm_triton import gated_norm_triton
from tests.kernels.paged import BACKENDS, device_of

RUN = {"triton": gated_norm_triton, "torch": gated_norm_torch}


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(3, 5, 12), (1, 2, 128), (2, 40, 64), (0, 2, 16)])
def test_equals_the_reference(backend, dtype, tokens, heads, dim):
    device = device_of(backend)
    x = torch.randn(tokens, heads, dim, device=device) * 100
    gate = torch.randn(tokens, heads * dim + 3, device=device).to(dtype)[:, 3:].unflatten(1, (heads, dim))
    weight = torch.randn(dim, device=device).to(dtype)
    out = RUN[backend](x, gate, weight, 1e-6)
    assert out.dtype == dtype
    assert out.is_contiguous()
    bound = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.float(), gated_norm_reference(x, gate, weight, 1e-6), rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gate": torch.zeros(2, 3)}, "gate has shape"),
        ({"gate": torch.zeros(2, 3, 4).double()}, "gate has dtype"),
        ({"x": torch.zeros(2, 3, 4).half()}, "x has dtype"),
        ({"x": torch.zeros(2, 4, 4)[:, :3]}, "x has stride"),
        ({"weight": torch.zeros(3)}, "weight has shape"),
    ],
)
def test_names_what_is_wrong(given, message):
    right = {"x": torch.zeros(2, 3, 4), "gate": torch.zeros(2, 3, 4), "weight": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        gated_norm(**right | given, eps=1e-6)
