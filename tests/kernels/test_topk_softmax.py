"""The experts of tokens, each way to choose them against the reference."""

import pytest
import torch

from kernels.topk_softmax import topk_softmax, topk_softmax_reference, topk_softmax_torch
from kernels.topk_softmax_triton import topk_softmax_triton
from tests.kernels.paged import DEVICE


def on_device(logits, active, normalized):
    return tuple(x.cpu() for x in topk_softmax_triton(logits.to(DEVICE), active, normalized))


WAYS = pytest.mark.parametrize("choose", [topk_softmax_torch, on_device], ids=["torch", "triton"])


@WAYS
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "active"), [(5, 128, 8), (3, 32, 4), (2, 60, 4), (1, 3, 3), (0, 8, 2)]
)
def test_equals_the_reference(choose, tokens, num_experts, active, normalized, poisoned_empty):
    logits = 5 * torch.randn(tokens, num_experts + 4)[:, :num_experts]
    shares, experts = choose(logits, active, normalized)
    expected, chosen = topk_softmax_reference(logits, active, normalized)
    assert experts.equal(chosen)
    torch.testing.assert_close(shares, expected)


def test_of_equal_logits_the_first_are_chosen():
    shares, experts = on_device(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), 2, True)
    assert experts.tolist() == [[1, 2]]
    assert shares.tolist() == [[0.5, 0.5]]


@WAYS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_cost_their_token_alone(choose, value):
    """Whatever its shares, its experts are ones that there are, and none comes twice."""
    logits = torch.randn(3, 6)
    logits[1] = value
    shares, experts = choose(logits, 4, True)
    expected, chosen = topk_softmax_reference(logits, 4, True)
    assert experts[::2].equal(chosen[::2])
    torch.testing.assert_close(shares[::2], expected[::2])
    assert shares[1].isnan().all()
    assert len(set(experts[1].tolist()) & set(range(6))) == 4


@pytest.mark.parametrize(
    ("logits", "active", "message"),
    [
        (torch.zeros(2, 4).half(), 2, "logits has dtype torch.float16: convert them to torch.float32"),
        (torch.zeros(2, 4), 5, "active has value 5: give 1 to 4, the experts that there are"),
        (torch.zeros(2, 4), 0, "active has value 0"),
    ],
)
def test_wrong_arguments_are_named(logits, active, message):
    with pytest.raises(ValueError, match=message):
        topk_softmax(logits, active, True)
