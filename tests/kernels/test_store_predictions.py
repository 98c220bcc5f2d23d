"""Predictions are stored where slots say, touch nothing else, and do not depend on the tokens beside them."""

import pytest
import torch

from kernels.cache_view import shared
from kernels.store_predictions import store_predictions_reference, store_predictions_torch
from kernels.store_predictions_triton import store_predictions_triton
from tests.kernels.paged import device_of

BACKENDS = {
    "triton": store_predictions_triton,
    "torch": store_predictions_torch,
    "reference": store_predictions_reference,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "block_size", "heads", "tokens"),
    [
        pytest.param(64, 16, 3, 5, id="narrow"),
        pytest.param(700, 64, 1, 19, id="several-tiles"),
        pytest.param(64, 16, 2, 0, id="nothing"),
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["shared", "apart"])
def test_store_predictions(backend, dtype, apart, width, block_size, heads, tokens):
    device = device_of(backend)
    state = torch.full((5, heads, block_size), -7.0, device=device)
    slots = torch.randperm(5 * block_size)[:tokens]
    slots[::4] = -1
    slots = torch.stack([slots.roll(i) for i in range(heads)], dim=1) if apart else shared(slots, heads)
    hidden = torch.randn(tokens, 2 * width).to(dtype)[:, :width]
    weight, bias = torch.randn(heads, width), torch.randn(heads)
    expected = state.double().cpu()
    for token, head in (slots >= 0).nonzero().tolist():
        block, offset = divmod(int(slots[token, head]), block_size)
        expected[block, head, offset] = (hidden[token].double() * weight[head].double()).sum() + bias[head].double()
    BACKENDS[backend](*(x.to(device) for x in (hidden, weight, bias)), state, slots.to(device))
    torch.testing.assert_close(state.double().cpu(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(state.cpu() == -7.0, expected == -7.0)


def test_a_token_alone_equals_the_token_in_a_crowd():
    """Bit for bit on a GPU, whatever the batch: what a prefill predicts is what its chunks do."""
    device = device_of("triton")
    hidden, weight, bias = (torch.randn(n, device=device) for n in ((21, 600), (2, 600), (2,)))
    slots = shared(torch.arange(21, device=device), 2)
    whole, parts = (torch.zeros(2, 2, 16, device=device) for _ in range(2))
    store_predictions_triton(hidden, weight, bias, whole, slots)
    for first, last in ((0, 1), (1, 10), (10, 21)):
        store_predictions_triton(hidden[first:last], weight, bias, parts, slots[first:last])
    assert torch.equal(whole, parts)
