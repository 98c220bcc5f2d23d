"""The experts of tokens, each way to choose them against the reference."""

import pytest
import torch

from kernels.route import route, route_reference, route_torch
from kernels.route_triton import PART, choose_experts, route_triton
from tests.kernels.paged import DEVICE


def on_device(x, weight, bias, active, normalized):
    given = (None if given is None else given.to(DEVICE) for given in (x, weight, bias))
    return tuple(out.cpu() for out in route_triton(*given, active, normalized))


def router(tokens, num_experts, width=PART + 44):
    """Rows of float16 that are part of wider ones, and logits of a few."""
    x = torch.full((tokens, width + 8), torch.nan).half()
    x[:, :width] = torch.randn(tokens, width)
    return x[:, :width], 3 * width**-0.5 * torch.randn(num_experts, width), torch.randn(num_experts)


WAYS = pytest.mark.parametrize("choose", [route_torch, on_device], ids=["torch", "triton"])


@WAYS
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("sizes", [(18, 128, 8), (3, 32, 4), (2, 60, 4), (1, 3, 3), (0, 8, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_equals_the_reference(choose, dtype, sizes, normalized, poisoned_empty):
    *sizes, active = sizes
    x, weight, bias = router(*sizes)
    for given in ((x.to(dtype), weight, None), (x.to(dtype), weight, bias)):
        shares, experts = choose(*given, active, normalized)
        expected, chosen = route_reference(*given, active, normalized)
        assert experts.equal(chosen)
        torch.testing.assert_close(shares, expected)


def test_of_equal_logits_the_first_are_chosen():
    parts = torch.tensor([[[1.0, 2.0, 0.0, 1.0, 0.0]], [[0.0, 0.0, 2.0, 1.0, 0.0]]])
    shares, experts = (x.cpu() for x in choose_experts(parts.to(DEVICE), None, 2, True))
    assert experts.tolist() == [[1, 2]]
    assert shares.tolist() == [[0.5, 0.5]]


@WAYS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_is_no_number_costs_itself_alone(choose, value):
    """Whatever its shares, its experts are ones that there are, and none comes twice."""
    x, weight, _ = router(3, 6)
    x[1] = value
    shares, experts = choose(x, weight, None, 4, True)
    expected, chosen = route_reference(x, weight, None, 4, True)
    assert experts[::2].equal(chosen[::2])
    torch.testing.assert_close(shares[::2], expected[::2])
    assert shares[1].isnan().all()
    assert len(set(experts[1].tolist()) & set(range(6))) == 4


@pytest.mark.parametrize("logits", [[-torch.inf] * 6, [torch.inf] * 6, [torch.nan] * 6])
def test_logits_that_are_no_numbers_choose_experts_that_there_are(logits):
    _, experts = choose_experts(torch.tensor(logits)[None, None].to(DEVICE), None, 4, True)
    assert len(set(experts[0].tolist()) & set(range(6))) == 4


def test_a_token_alone_is_a_token_in_a_crowd():
    x, weight, bias = router(40, 32)
    shares, experts = on_device(x, weight, bias, 4, True)
    for token in (0, 17, 39):
        own, chosen = on_device(x[token : token + 1], weight, bias, 4, True)
        assert own.equal(shares[token : token + 1])
        assert chosen.equal(experts[token : token + 1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": torch.zeros(4, 8).half()}, "weight has dtype torch.float16: convert it to torch.float32"),
        ({"weight": torch.zeros(4, 9)[:, :8]}, r"weight has stride \(9, 1\): make it contiguous"),
        ({"weight": torch.zeros(4, 7)}, r"weight has shape \(4, 7\): give"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\): give \[4\]"),
        ({"active": 5}, "active has value 5: give 1 to 4, the experts that there are"),
        ({"active": 0}, "active has value 0"),
    ],
)
def test_wrong_arguments_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        route(
            **{"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8), "bias": None, "active": 2, "normalized": True}
            | given
        )
