"""The small operations of a decoder layer: each against the reference, in the memory that the model hands over."""

import math
from functools import partial

import pytest
import torch

from kernels.add_rms_norm import add_rms_norm_reference, add_rms_norm_torch
from kernels.add_rms_norm_triton import add_rms_norm_triton
from kernels.cache_view import shared
from kernels.clamped_swiglu import clamped_swiglu_reference, clamped_swiglu_torch
from kernels.clamped_swiglu_triton import clamped_swiglu_triton
from kernels.gelu_mul import gelu_mul_reference, gelu_mul_torch
from kernels.gelu_mul_triton import gelu_mul_triton
from kernels.qk_norm_rope import qk_norm_rope_reference, qk_norm_rope_torch
from kernels.qk_norm_rope_triton import qk_norm_rope_triton
from kernels.silu_mul import silu_mul_reference, silu_mul_torch
from kernels.silu_mul_triton import silu_mul_triton
from kernels.store_step import store_step_reference, store_step_torch
from kernels.store_step_triton import store_step_triton
from tests.kernels.paged import BACKENDS, device_of, fused

NORM = {"triton": add_rms_norm_triton, "torch": add_rms_norm_torch}
GATES = {
    "silu": (silu_mul_reference, {"triton": silu_mul_triton, "torch": silu_mul_torch}),
    "gelu": (gelu_mul_reference, {"triton": gelu_mul_triton, "torch": gelu_mul_torch}),
    "clamped": (
        partial(clamped_swiglu_reference, alpha=1.702, limit=7.0),
        {
            "triton": partial(clamped_swiglu_triton, alpha=1.702, limit=7.0),
            "torch": partial(clamped_swiglu_torch, alpha=1.702, limit=7.0),
        },
    ),
}
ROTATE = {"triton": qk_norm_rope_triton, "torch": qk_norm_rope_torch}
STORE = {"triton": store_step_triton, "torch": store_step_torch}

EPS = 1e-6
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_rounded_alike(actual, expected, roundings=1, atol=0.0):
    """Equal but for float32 errors, which move a few elements by one rounding of the dtype a stage."""
    assert actual.dtype == expected.dtype
    step = torch.finfo(expected.dtype).eps
    rtol = 8 * step if expected.dtype == torch.float32 else roundings * step
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=rtol, atol=max(atol, rtol / 4))
    if expected.dtype != torch.float32:
        assert ((actual.cpu() - expected.cpu()).abs() > atol).sum() <= 0.02 * expected.numel()


def rows(tokens, width, dtype, device, spare=0):
    """[tokens, width], random, with `spare` columns of NaN between one row and the next."""
    memory = torch.full((tokens, width + spare), float("nan"), dtype=dtype, device=device)
    memory[:, :width] = torch.randn(tokens, width)
    return memory[:, :width]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "width", "spare"),
    [
        pytest.param(1, 4096, 0, id="one-row"),
        pytest.param(5, 384, 0, id="w384"),
        pytest.param(3, 896, 32, id="w896-strided"),
        pytest.param(2, 1, 0, id="w1"),
        pytest.param(0, 64, 0, id="no-rows"),
    ],
)
@pytest.mark.parametrize(("add", "offset"), [(False, 0.0), (True, 0.0), (True, 1.0)], ids=["norm", "add", "add-offset"])
def test_add_rms_norm(backend, dtype, tokens, width, spare, add, offset, poisoned_empty):
    device = device_of(backend)
    hidden, delta = (rows(tokens, width, dtype, device, spare) for _ in range(2))
    weight = torch.randn(width).to(device, dtype)
    delta = delta if add else None
    expected_hidden = hidden.clone()
    out = NORM[backend](hidden, delta, weight, EPS, offset)
    expected = add_rms_norm_reference(expected_hidden, delta, weight, EPS, offset)
    assert torch.equal(hidden, expected_hidden), "the sum is rounded as hidden += delta rounds it"
    assert_rounded_alike(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_of_the_rounded_sum_and_rounded_once(dtype):
    """As `hidden += delta` and PyTorch's own norm, so that fusing them changes no token."""
    hidden, delta, weight = (torch.randn(shape).to(dtype) for shape in ((40, 512), (40, 512), (512,)))
    summed = hidden + delta
    expected = torch.nn.functional.rms_norm(summed, (512,), weight, EPS)
    out = add_rms_norm_reference(hidden, delta, weight, EPS)
    assert torch.equal(hidden, summed)
    assert_rounded_alike(out, expected)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "width", "spare"),
    [
        pytest.param(1, 384, 0, id="one-row"),
        pytest.param(4, 2432, 0, id="w2432"),
        pytest.param(3, 7, 5, id="w7-strided"),
        pytest.param(0, 64, 0, id="no-rows"),
    ],
)
@pytest.mark.parametrize("kind", GATES)
def test_gates(kind, backend, dtype, tokens, width, spare, poisoned_empty):
    reference, gates = GATES[kind]
    gate_up = rows(tokens, 2 * width, dtype, device_of(backend), spare)
    gate_up[:1] *= 60
    before = gate_up.clone()
    out = gates[backend](gate_up)
    assert out.shape == (tokens, width)
    # Below -3, where 1 + tanh cancels, PyTorch's GELU has no more than an absolute accuracy, times up.
    atol = 3e-5 if kind == "gelu" else 0.0
    assert_rounded_alike(out, reference(before), roundings=2, atol=atol)
    assert torch.equal(gate_up, before)


def test_gates_by_hand():
    """gelu_new of transformers, and gpt-oss's where neither is clamped, where both are, and where up is, from below."""
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    assert gelu_mul_reference(x)[0].tolist() == pytest.approx([0.841192 * 3, -0.045402 * 4], abs=1e-5)
    x = torch.tensor([[1.0, 2.0, 9.0, 9.0, -9.0, -9.0]])
    expected = [3 / (1 + math.exp(-1.702)), 56 / (1 + math.exp(-1.702 * 7)), 54 / (1 + math.exp(1.702 * 9))]
    assert clamped_swiglu_reference(x, 1.702, 7.0)[0].tolist() == pytest.approx(expected)


def angles(tokens, rotary_dim, factor, device):
    """cos and sin of positions far apart, as `RotaryEmbedding` gives them."""
    positions = torch.randint(0, 40_000, (tokens, 1, 1)).float()
    turns = positions * 10_000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    cos, sin = turns.cos() * factor, turns.sin() * factor
    return torch.cat((cos, cos), dim=-1).to(device), sin.to(device)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "rotary_dim", "spare"),
    [
        pytest.param(1, 4, 2, 64, 64, 0, id="one-token-d64"),
        pytest.param(3, 14, 2, 96, 96, 0, id="d96"),
        pytest.param(2, 32, 8, 128, 128, 16, id="d128-strided"),
        pytest.param(2, 24, 8, 128, 96, 16, id="d128-of-which-96-rotate"),
        pytest.param(3, 4, 2, 64, 16, 0, id="d64-of-which-16-rotate"),
        pytest.param(2, 3, 1, 2, 2, 0, id="d2"),
        pytest.param(0, 4, 2, 64, 64, 0, id="no-tokens"),
    ],
)
@pytest.mark.parametrize(
    ("norm", "offset"), [(False, 0.0), (True, 0.0), (True, 1.0)], ids=["rotary", "norm", "norm-offset"]
)
def test_qk_norm_rope(backend, dtype, tokens, heads, kv_heads, head_dim, rotary_dim, spare, norm, offset):
    device = device_of(backend)
    qkv = rows(tokens, (heads + 2 * kv_heads) * head_dim, dtype, device, spare)
    weights = [(torch.randn(head_dim) - offset).to(device, dtype) if norm else None for _ in range(2)]
    args = *weights, EPS, *angles(tokens, rotary_dim, 1.3, device), heads, kv_heads, offset
    before = qkv.clone()
    outs = ROTATE[backend](qkv, *args)
    assert [x.shape for x in outs] == [(tokens, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    assert all(x.stride()[1:] == (head_dim, 1) for x in outs)
    q, k, v = qk_norm_rope_reference(before, *args)
    assert_rounded_alike(outs[0], q, roundings=4)
    assert_rounded_alike(outs[1], k, roundings=4)
    assert torch.equal(outs[2], v)


def test_rotary_turns_pairs_of_halves():
    """Of head 0 of 4 dimensions: (x0, x2) by one angle, (x1, x3) by the other, both lengthened by the factor."""
    qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0] * 3])
    cos, sin = torch.tensor([[[0.0, 2.0, 0.0, 2.0]]]), torch.tensor([[[1.0, 0.0]]])
    q, k, v = qk_norm_rope_reference(qkv, None, None, EPS, cos, sin, 1, 1)
    assert q.flatten().tolist() == k.flatten().tolist() == [-3.0, 4.0, 1.0, 8.0]
    assert v.flatten().tolist() == [1.0, 2.0, 3.0, 4.0]


def test_the_rest_of_a_head_that_turns_in_part_stays():
    """Of head 0 of 4 dimensions: (x0, x1) by one angle."""
    cos, sin = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0]]])
    q, k, _ = qk_norm_rope_reference(torch.tensor([[1.0, 2.0, 3.0, 4.0] * 3]), None, None, EPS, cos, sin, 1, 1)
    assert q.flatten().tolist() == k.flatten().tolist() == [-2.0, 1.0, 3.0, 4.0]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("block_size", "kv_heads", "heads", "head_dim", "slots", "indices"),
    [
        pytest.param(16, 2, 8, 64, [5, -1, 31, 79], [-1, 7, 0, 19], id="d64-padding"),
        pytest.param(64, 1, 3, 80, [319], [4], id="one-token-d80"),
        pytest.param(64, 2, 2, 32, [-1, 3], [17, 5], id="d32-queries-alone"),
        pytest.param(16, 20, 40, 128, [3, 20, -1], [-1, -1, 14], id="d128-many-heads"),
        pytest.param(16, 2, 4, 96, [], [], id="no-tokens"),
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["shared", "apart"])
def test_store_step(backend, dtype, apart, block_size, kv_heads, heads, head_dim, slots, indices):
    device = device_of(backend)
    k, v, q = (fused(len(slots), n, head_dim, dtype, device) for n in (kv_heads, kv_heads, heads))
    caches = torch.full((2, 3, 5, kv_heads, block_size, head_dim), float("nan"), dtype=dtype, device=device)
    queries = torch.full((3, 4, 5, heads, head_dim), float("nan"), dtype=dtype, device=device)
    expected, expected_queries = caches.clone(), queries.clone()
    slots, indices = torch.tensor([slots, indices], dtype=torch.int64, device=device)
    slots = torch.stack([slots.roll(h) for h in range(kv_heads)], dim=1) if apart else shared(slots, kv_heads)
    STORE[backend](k, v, q, caches[0, 1], caches[1, 1], queries[1], slots, indices)
    store_step_reference(k, v, q, expected[0, 1], expected[1, 1], expected_queries[1], slots, indices)
    torch.testing.assert_close(caches, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(queries, expected_queries, rtol=0, atol=0, equal_nan=True)
