"""Exactly `keep` slots, `forced` among them, the best of the others, ties to the higher slot."""

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


def batch(lens: torch.Tensor, width: int):
    """Scores with many ties, -inf among them, and garbage past n."""
    scores = torch.randint(-3, 4, (*lens.shape, width)) * 0.1
    scores[torch.rand_like(scores) < 0.1] = -INF
    past = torch.arange(width) >= lens[..., None]
    return torch.where(past, torch.where(torch.rand_like(scores) < 0.5, INF, float("nan")), scores)


def check(backend, scores, forced, lens, keep, max_keep):
    device = device_of(backend)
    args = scores, forced, lens, keep
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
@pytest.mark.parametrize("apart", ["nothing", "lens", "lens, keep and must"])
def test_select(backend, lens, keep, width, apart):
    """`apart`: what differs by layer and head. The rest is expanded, with strides of 0."""
    most = max(keep) + (5 if max(keep) + 5 <= width else 0)
    shape = 2, len(lens), 3
    lens, keep = ints(lens)[:, None], ints(keep)[:, None]
    if apart != "nothing":
        lens = (lens * torch.rand(shape)).int().maximum(lens.clamp(max=1))
    if apart == "lens, keep and must":
        keep = (keep * torch.rand(shape)).int()
    lens, keep = lens.expand(shape), keep.expand(shape)
    if apart == "lens, keep and must":
        forced = torch.rand(*shape, width) < 0.2
    else:
        forced = (torch.rand(len(lens[0]), 1, width) < 0.2).expand(*shape, width)
    rank = (forced & (torch.arange(width) < lens[..., None])).cumsum(-1)
    # Past n, must means nothing; before it, it names no more than stay, of all heads where they share it.
    allowed = rank <= keep[..., None]
    forced = forced & (allowed if apart == "lens, keep and must" else allowed.all(2, keepdim=True).all(0, keepdim=True))
    check(backend, batch(lens, width), forced, lens, keep, most)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_every_size_and_sign(backend):
    sizes = torch.randn(2, 1, 2, 200) * 10.0 ** torch.randint(-40, 38, (2, 1, 2, 200))
    forced = torch.zeros(200, dtype=torch.bool).expand(sizes.shape)
    check(backend, sizes, forced, ints([190]).expand(2, 1, 2), ints([77]).expand(2, 1, 2), 77)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_constant_scores_keep_must_and_the_youngest(backend):
    forced = torch.zeros(1, 1, 1, 32, dtype=torch.bool)
    forced[..., [0, 1, 30]] = True
    scores = torch.zeros(1, 1, 1, 32)
    scores[..., ::2] = -0.0
    device = device_of(backend)
    kept = SELECT[backend](scores.to(device), forced.to(device), ints([[[31]]], device), ints([[[8]]], device), 8)
    assert kept.flatten().tolist() == [0, 1, 25, 26, 27, 28, 29, 30]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_must_goes_before_infinite_scores(backend):
    scores = torch.full((1, 1, 1, 16), INF)
    scores[..., 2] = -INF
    forced = torch.zeros(1, 1, 1, 16, dtype=torch.bool)
    forced[..., 2] = True
    device = device_of(backend)
    kept = SELECT[backend](scores.to(device), forced.to(device), ints([[[16]]], device), ints([[[3]]], device), 3)
    assert kept.flatten().tolist() == [2, 14, 15]
