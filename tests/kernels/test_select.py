"""Exactly `keep` slots, `must` among them, the best of the others, ties to the higher slot."""

import pytest
import torch

from kernels.select import select_reference, select_torch
from kernels.select_triton import select_triton
from tests.kernels.paged import device_of

SELECT = {"triton": select_triton, "torch": select_torch, "reference": select_reference}
BACKENDS = ["triton", "torch"]
INF = float("inf")


def ints(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def batch(lens: list[int], width: int, layers=2, heads=3):
    """Scores with many ties, -inf among them, and garbage past n."""
    scores = torch.randint(-3, 4, (layers, len(lens), heads, width)) * 0.1
    scores[torch.rand_like(scores) < 0.1] = -INF
    past = torch.arange(width) >= ints(lens)[:, None, None]
    return torch.where(past, torch.where(torch.rand_like(scores) < 0.5, INF, float("nan")), scores)


def check(backend, scores, must, lens, keep, max_keep):
    device = device_of(backend)
    args = scores, must, ints(lens), ints(keep)
    kept = SELECT[backend](*(x.to(device) for x in args), max_keep).cpu()
    expected = select_reference(*args, max_keep)
    assert kept.dtype == torch.int32
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lens", "keep", "width"),
    [
        pytest.param([40, 17, 0, 3], [16, 16, 16, 16], 48, id="mixed-b16"),
        pytest.param([41], [40], 64, id="evicts-one"),
        pytest.param([700, 300], [512, 100], 768, id="two-lengths"),
        pytest.param([100, 100], [100, 1], 112, id="all-and-one"),
        pytest.param([30, 20], [0, 20], 32, id="nothing"),
    ],
)
@pytest.mark.parametrize("per_head", [False, True], ids=["must-shared", "must-per-head"])
def test_select(backend, lens, keep, width, per_head):
    scores = batch(lens, width)
    shape = scores.shape if per_head else (len(lens), width)
    must = torch.rand(shape) < 0.2
    rank = (must & (torch.arange(width) < ints(lens).view(-1, 1, 1) if per_head else must)).cumsum(-1)
    must &= rank <= (ints(keep).view(-1, 1, 1) if per_head else ints(keep)[:, None])  # past n, must means nothing
    check(backend, scores, must, lens, keep, max(keep) + (5 if max(keep) + 5 <= width else 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_every_size_and_sign(backend):
    sizes = torch.randn(2, 1, 2, 200) * 10.0 ** torch.randint(-40, 38, (2, 1, 2, 200))
    check(backend, sizes, torch.zeros(1, 200, dtype=torch.bool), [190], [77], 77)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_constant_scores_keep_must_and_the_youngest(backend):
    must = torch.zeros(1, 32, dtype=torch.bool)
    must[0, [0, 1, 30]] = True
    scores = torch.zeros(1, 1, 1, 32)
    scores[..., ::2] = -0.0
    device = device_of(backend)
    kept = SELECT[backend](scores.to(device), must.to(device), ints([31], device), ints([8], device), 8)
    assert kept.flatten().tolist() == [0, 1, 25, 26, 27, 28, 29, 30]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_must_goes_before_infinite_scores(backend):
    scores = torch.full((1, 1, 1, 16), INF)
    scores[..., 2] = -INF
    must = torch.zeros(1, 16, dtype=torch.bool)
    must[0, 2] = True
    device = device_of(backend)
    kept = SELECT[backend](scores.to(device), must.to(device), ints([16], device), ints([3], device), 3)
    assert kept.flatten().tolist() == [2, 14, 15]
