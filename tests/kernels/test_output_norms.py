"""Norms of projected values, against the reference."""

import pytest
import torch

from kernels.output_norms import output_norms, output_norms_reference, output_norms_torch
from kernels.output_norms_triton import output_norms_triton
from tests.kernels.events import difference, make_event
from tests.kernels.grid import half
from tests.kernels.paged import BACKENDS, device_of, upcast

NORMS = {"triton": output_norms_triton, "torch": output_norms_torch, "reference": output_norms_reference}
BOUNDS = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""The CPU path rounds each product to the dtype of the weights; the kernel sums them as they are."""


def projections(event, group: int, width: int) -> list[torch.Tensor]:
    layers, _, heads, _, head_dim = event.v_cache.shape
    return [torch.randn(width, heads * group * head_dim).to(event.v_cache) for _ in range(layers)]


@pytest.mark.usefixtures("poisoned_empty")
@half(
    (("backend", "dtype"), BACKENDS),
    (
        ("lens", "starts", "block_size", "head_dim", "group", "width"),
        [
            pytest.param([37, 0, 16, 70], [4, 0, 16, 69], 16, 40, 3, 50, id="b16-g3-ragged"),
            pytest.param([130, 64], [0, 60], 64, 64, 1, 128, id="b64-mha"),
            pytest.param([257], [130], 256, 32, 4, 96, id="b256-g4"),
        ],
    ),
    ("norm", ["l1", "l2"]),
    ("apart", [pytest.param(False, id="shared"), pytest.param(True, id="apart")]),
)
def test_output_norms(backend, dtype, norm, apart, lens, starts, block_size, head_dim, group, width):
    event = make_event(lens, block_size, 2, 1 + apart, head_dim, dtype, device_of(backend), apart=apart)
    starts = event.shared(torch.tensor(starts, dtype=torch.int32, device=event.v_cache.device))
    weights = projections(event, group, width)
    out = NORMS[backend](event.view, weights, starts, norm)
    expected = output_norms_reference(upcast(event.view), [w.cpu().float() for w in weights], starts.cpu(), norm)
    assert apart or (expected > 0).any()
    assert difference(out, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_by_hand(backend):
    event = make_event([3], 16, 1, 1, 2, device=device_of(backend))
    block = int(event.view.block_tables[0, 0, 0, 0])
    event.v_cache[0, block, 0, :3] = torch.tensor([[5.0, 7], [1, 2], [-3, 0]])
    # Of the first query head 3 x, 4 x + y; of the second y, -y.
    weight = torch.tensor([[3.0, 0, 0, 1], [4, 1, 0, -1]], device=event.v_cache.device)
    starts = event.shared(torch.tensor([1], dtype=torch.int32, device=event.v_cache.device))
    l1, l2 = (NORMS[backend](event.view, [weight], starts, norm)[0, 0, 0].cpu() for norm in ("l1", "l2"))
    torch.testing.assert_close(l1[:4], torch.tensor([0, (9 + 4) / 2, (21 + 0) / 2, 0]))
    torch.testing.assert_close(l2[:4], torch.tensor([0, (45**0.5 + 8**0.5) / 2, 15 / 2, 0]))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_heads_may_lie_in_one_cache(backend):
    """As tiles do: one pool, which each layer and head sees whole."""
    event = make_event([20, 40], 16, 1, 1, 32, device=device_of(backend))
    layers, heads = 2, 3
    caches = [x.expand(layers, -1, heads, -1, -1) for x in event.view[:2]]
    tables = torch.stack([event.view.block_tables[0, i % 2] for i in range(layers * heads)]).view(layers, 1, heads, -1)
    lens = torch.stack([event.view.lens[0, i % 2] for i in range(layers * heads)]).view(layers, 1, heads)
    view = event.view._replace(k_cache=caches[0], v_cache=caches[1], block_tables=tables.contiguous(), lens=lens)
    weights = [torch.randn(24, heads * 2 * 32, device=lens.device) for _ in range(layers)]
    starts = torch.zeros_like(lens)
    out = NORMS[backend](view, weights, starts)
    expected = output_norms_reference(upcast(view), [w.cpu() for w in weights], starts.cpu())
    assert difference(out, expected) < 5e-6
    assert difference(output_norms(view, weights, starts), expected) < 5e-6


def test_wrong_arguments_are_named():
    event = make_event([20], 16, 2, 1, 16)
    weights, starts = projections(event, 2, 8), event.shared(torch.zeros(1, dtype=torch.int32))
    for kwargs, message in (
        ({"weights": weights[:1]}, "weights"),
        ({"weights": [w[:, :24] for w in weights]}, "weights"),
        ({"weights": [w.half() for w in weights]}, "weights"),
        ({"weights": [weights[0], weights[1].T.contiguous().T]}, "weights"),
        ({"starts": starts.long()}, "starts"),
        ({"norm": "l3"}, "norm"),
    ):
        with pytest.raises(ValueError, match=message):
            output_norms(**{"view": event.view, "weights": weights, "starts": starts, "norm": "l1"} | kwargs)
