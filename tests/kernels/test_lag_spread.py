"""Spread over the range of the next partition, against the reference."""

import pytest
import torch

from kernels.lag_spread import LEAST_RANGE, lag_spread, lag_spread_reference
from kernels.lag_spread_triton import lag_spread_triton
from tests.kernels.events import make_event
from tests.kernels.grid import half
from tests.kernels.paged import TRITON_DTYPES, device_of, upcast


def starts_of(event, starts):
    """int32 [L, R, H], the same for all layers and heads."""
    return event.shared(torch.tensor(starts, dtype=torch.int32, device=event.k_cache.device))


def test_the_reference_by_hand():
    event = make_event([7], 16, 1, 1, 2)
    event.view.k_cache[0, int(event.view.block_tables[0, 0, 0, 0]), 0, :7] = torch.tensor(
        [[9.0, 9], [1, 0], [3, 2], [0, 4], [2, 8], [5, 5], [6, 6]]
    )
    out = lag_spread_reference(event.view, starts_of(event, [1]), 2)[0, 0, 0, 0, :7]
    # Ranges of partition 2: 0..2 and 4..8; of partition 3: 5..6 and 5..6.
    first = torch.tensor([[1 / 2, -1], [3 / 2, -1 / 2]]).std(dim=-1)
    second = torch.tensor([[-5.0, -1], [-3, 3]]).std(dim=-1)
    torch.testing.assert_close(out, torch.cat([torch.zeros(1), first, second, torch.zeros(2)]))


@pytest.mark.usefixtures("poisoned_empty")
@half(
    ("dtype", TRITON_DTYPES),
    (
        ("lens", "starts", "block_size", "head_dim", "partition"),
        [
            pytest.param([37, 0, 16, 70], [4, 4, 4, 9], 16, 40, 8, id="b16-p8"),
            pytest.param([130, 64], [0, 60], 64, 64, 30, id="b64-p30"),
            pytest.param([257], [3], 256, 32, 100, id="b256-p100"),
            pytest.param([40, 5], [1, 1], 16, 128, 2, id="p2"),
        ],
    ),
    ("apart", [pytest.param(False, id="shared"), pytest.param(True, id="apart")]),
)
def test_lag_spread(dtype, apart, lens, starts, block_size, head_dim, partition):
    event = make_event(lens, block_size, 2, 1 + apart, head_dim, dtype, device_of("triton"), apart=apart)
    flat = event.view.block_tables[0, 0, 0, 0]
    event.view.v_cache[:, flat, :, :, 1] = 3.0  # a channel without a range
    starts = starts_of(event, starts)
    out = lag_spread_triton(event.view, starts, partition, LEAST_RANGE)
    expected = lag_spread_reference(upcast(event.view), starts.cpu(), partition)
    assert apart or (expected > 0).any()
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-5, atol=2e-6)


def test_wrong_arguments_are_named():
    event = make_event([20], 16, 1, 1, 16)
    with pytest.raises(ValueError, match="partition"):
        lag_spread(event.view, starts_of(event, [0]), 0)
    with pytest.raises(ValueError, match="starts"):
        lag_spread(event.view, torch.zeros(1, dtype=torch.int32), 4)
