"""The gated delta rule and the convolution before it, against their references, in pieces of any length."""

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from kernels.causal_conv import causal_conv, causal_conv_reference
from kernels.gated_delta import gated_delta, gated_delta_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def arguments(tokens, pieces=2, heads=2, group=3, dim=8, value_dim=12, dtype=torch.float32):
    """Some heads forget at once, others nothing."""
    value_heads = heads * group
    decay = -torch.rand(pieces, tokens, value_heads) * torch.tensor([0.0, 0.01, 0.1, 1.0, 10.0, 100.0])[:value_heads]
    return {
        "q": torch.randn(pieces, tokens, heads, dim).to(dtype),
        "k": torch.randn(pieces, tokens, heads, dim).to(dtype),
        "v": torch.randn(pieces, tokens, value_heads, value_dim).to(dtype),
        "decay": decay,
        "beta": torch.rand(pieces, tokens, value_heads),
        "state": torch.randn(pieces, value_heads, dim, value_dim),
    }


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 200])
def test_equals_the_reference(tokens, dtype):
    given = arguments(tokens, dtype=dtype)
    found, expected = gated_delta(**given), gated_delta_reference(**given)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_the_reference_is_that_of_transformers():
    given = arguments(9)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    *positional, state = given.values()
    expected = torch_recurrent_gated_delta_rule(*positional, initial_state=state, **options)
    for x, y in zip(gated_delta_reference(**given), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_pieces_go_on_from_each_other():
    given = arguments(90)
    state = given.pop("state")
    whole = gated_delta(**given, state=state)
    parts = []
    for begin, end in ((0, 1), (1, 30), (30, 31), (31, 90)):
        part, state = gated_delta(**{name: x[:, begin:end] for name, x in given.items()}, state=state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, whole[1], rtol=1e-4, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("taps", [1, 4])
def test_convolutions_in_pieces(taps, dtype):
    x, weight = torch.randn(2, 20, 10).to(dtype), torch.randn(10, taps).to(dtype)
    before = torch.zeros(2, taps - 1, 10, dtype=dtype)
    expected, last = causal_conv_reference(x, before, weight)
    parts = []
    for part in x.split([1, 2, 16, 1], dim=1):
        out, before = causal_conv(part, before, weight)
        parts.append(out)
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=bound, atol=bound)
    assert before.dtype == dtype
    assert (before == last).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, "q has shape"),
        ({"q": torch.zeros(2, 0, 2, 8), "v": torch.zeros(2, 0, 6, 12)}, "q has shape .*: give at least one token"),
        ({"v": torch.zeros(2, 3, 5, 12)}, "v has heads 5: give a multiple of q's 2"),
        ({"k": torch.zeros(2, 3, 1, 8)}, "k has shape"),
        ({"beta": torch.zeros(2, 3, 6).double()}, "beta has dtype"),
        ({"state": torch.zeros(2, 6, 12, 8)}, "state has shape"),
    ],
)
def test_names_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=message):
        gated_delta(**arguments(3) | given)
    with pytest.raises(ValueError, match="before has shape"):
        causal_conv(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="x has dtype"):
        causal_conv(torch.zeros(1, 2, 3).double(), torch.zeros(1, 3, 3), torch.zeros(3, 4))
