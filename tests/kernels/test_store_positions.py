"""Positions are stored exactly, and touch nothing else; a query slot is a ring."""

import pytest
import torch

from kernels.cache_view import shared
from kernels.store_positions import store_positions_reference, store_positions_torch
from kernels.store_positions_triton import store_positions_triton
from kernels.store_step import store_queries_reference
from tests.kernels.paged import device_of

POSITIONS = {
    "triton": store_positions_triton,
    "torch": store_positions_torch,
    "reference": store_positions_reference,
}


def test_a_ring_holds_the_last_window():
    ring = torch.zeros(2, 4, 1, 1)
    positions = torch.arange(10, 17)
    store_queries_reference(positions[-4:].float().view(4, 1, 1), ring, 4 + positions[-4:] % 4)
    assert ring[1].flatten().tolist() == [16, 13, 14, 15]
    assert ring[0].eq(0).all()


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize(
    ("block_size", "heads", "tokens"),
    [
        pytest.param(16, 3, 5, id="b16"),
        pytest.param(64, 1, 150, id="b64-several-tiles"),
        pytest.param(16, 2, 0, id="nothing"),
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["shared", "apart"])
def test_store_positions(backend, apart, block_size, heads, tokens):
    device = device_of(backend)
    state = torch.full((4, 5, heads, block_size), -7, dtype=torch.int32, device=device)
    slots = torch.randperm(5 * block_size)[:tokens]
    slots[::4] = -1
    slots = shared(slots, heads, 2)
    if apart:
        slots = torch.stack([slots[0, :, 0].roll(i) for i in range(2 * heads)]).view(2, heads, -1).transpose(1, 2)
    positions = torch.randint(0, 1 << 30, (tokens,), dtype=torch.int32)
    expected = state.clone().cpu()
    for layer, token, head in (slots >= 0).nonzero().tolist():
        block, offset = divmod(int(slots[layer, token, head]), block_size)
        expected[1 + layer, block, head, offset] = positions[token]
    POSITIONS[backend](positions.to(device), state[1:3], slots.to(device))
    assert torch.equal(state.cpu(), expected)
