"""Window queries and positions are stored exactly, and touch nothing else."""

import pytest
import torch

from kernels import cpu, reference
from kernels.window_store import store_positions_triton, store_queries_triton
from tests.kernels.paged import BACKENDS, device_of, fused

QUERIES = {"triton": store_queries_triton, "torch": cpu.store_queries_torch, "reference": reference.store_queries}
POSITIONS = {
    "triton": store_positions_triton,
    "torch": cpu.store_positions_torch,
    "reference": reference.store_positions,
}


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("window", "heads", "head_dim", "indices"),
    [
        pytest.param(16, 6, 64, [17, -1, 5, 79, 0], id="w16-d64-padding"),
        pytest.param(5, 40, 128, [24, 3], id="w5-d128-many-heads"),
        pytest.param(1, 3, 80, [4, -1, 2], id="w1-d80"),
        pytest.param(8, 2, 32, [], id="no-tokens"),
    ],
)
def test_store_queries(backend, dtype, window, heads, head_dim, indices):
    device = device_of(backend)
    layers = torch.full((3, 5, window, heads, head_dim), float("nan"), dtype=dtype, device=device)
    expected = layers.clone()
    q = fused(len(indices), heads, head_dim, dtype, device)
    index = torch.tensor(indices, dtype=torch.int64, device=device)
    QUERIES[backend](q, layers[1], index)
    reference.store_queries(q, expected[1], index)
    torch.testing.assert_close(layers, expected, rtol=0, atol=0, equal_nan=True)


def test_a_ring_holds_the_last_window():
    ring = torch.zeros(2, 4, 1, 1)
    positions = torch.arange(10, 17)
    reference.store_queries(positions[-4:].float().view(4, 1, 1), ring, 4 + positions[-4:] % 4)
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
def test_store_positions(backend, block_size, heads, tokens):
    device = device_of(backend)
    state = torch.full((4, 5, heads, block_size), -7, dtype=torch.int32, device=device)
    slots = torch.randperm(5 * block_size)[:tokens]
    slots[::4] = -1
    positions = torch.randint(0, 1 << 30, (tokens,), dtype=torch.int32)
    expected = state.clone().cpu()
    for position, slot in zip(positions.tolist(), slots.tolist()):
        if slot >= 0:
            expected[1:3, slot // block_size, :, slot % block_size] = position
    POSITIONS[backend](positions.to(device), state[1:3], slots.to(device))
    assert torch.equal(state.cpu(), expected)
