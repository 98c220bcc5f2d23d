"""A mixture of gated MLPs, each token through a few of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import check_index, check_rows, fail
from kernels.silu_mul import silu_mul, silu_mul_reference

Biases = tuple[Tensor, Tensor]
Gate = Callable[[Tensor], Tensor]

GROUPED_BYTES = 16
"""PyTorch's grouped product wants rows of a multiple of so many bytes."""


def expert_mlp(
    x: Tensor,
    experts: Tensor,
    shares: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: Biases | None = None,
    gate: Gate = silu_mul,
) -> Tensor:
    """The sum over a token's experts of share * down(gate(gate_up(x))), where gate_up and down are linear.

    On a GPU nothing on the host depends on the routing.

    Args:
        x: [T, width], last dimension contiguous; float32, float16 or bfloat16.
        experts: int64 [T, k], of each token, at least one, none of them twice.
        shares: float32 [T, k].
        gate_up: [E, 2 * inner, width], contiguous, of x's dtype: rows of each expert in the order that `gate` takes.
        down: [E, width, inner], the same.
        biases: of gate_up [E, 2 * inner] and of down [E, width], contiguous, of x's dtype; None: there are none.
        gate: [n, 2 * inner] -> [n, inner], such as `silu_mul`.

    Returns:
        [T, width], x's dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(x, experts, shares, gate_up, down, biases)
    if x.is_cuda:
        with torch.cuda.device(x.device):
            return _triton()(x, experts, shares, gate_up, down, biases, gate)
    aligned = all(size * x.itemsize % GROUPED_BYTES == 0 for size in (x.shape[1], down.shape[2]))
    compute = expert_mlp_grouped if aligned else expert_mlp_all
    return compute(x, experts, shares, gate_up, down, biases, gate)


def _check(x: Tensor, experts: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor, biases: Biases | None) -> None:
    """Check the arguments of `expert_mlp`. Raises ValueError naming the argument, its value and the remedy."""
    tokens, width = check_rows("x", x)
    if down.dim() != 3:
        fail("down", "shape", tuple(down.shape), "give [experts, width, inner]")
    num_experts, inner = down.shape[0], down.shape[2]
    active = experts.shape[-1] if experts.dim() else 0
    if not 1 <= active <= num_experts:
        fail("experts", "shape", tuple(experts.shape), f"give [{tokens}, 1 to {num_experts}]")
    check_index("experts", experts, torch.int64, (tokens, active), x.device, "x")
    check_index("shares", shares, torch.float32, (tokens, active), x.device, "x")
    check_index("gate_up", gate_up, x.dtype, (num_experts, 2 * inner, width), x.device, "x")
    check_index("down", down, x.dtype, (num_experts, width, inner), x.device, "x")
    weights = [("gate_up", gate_up), ("down", down)]
    if biases is not None:
        for name, bias, rows in zip(("gate_up's bias", "down's bias"), biases, (2 * inner, width), strict=True):
            check_index(name, bias, x.dtype, (num_experts, rows), x.device, "x")
            weights.append((name, bias))
    for name, weight in weights:
        if not weight.is_contiguous():
            fail(name, "stride", weight.stride(), "make it contiguous")


def expert_mlp_reference(
    x: Tensor,
    experts: Tensor,
    shares: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: Biases | None = None,
    gate: Gate = silu_mul_reference,
) -> Tensor:
    """`expert_mlp`, a token and an expert at a time, in float32."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for token in range(len(x)):
        for expert, share in zip(experts[token].tolist(), shares[token], strict=True):
            inner = gate_up[expert].float() @ x[token].float()
            if biases is not None:
                inner += biases[0][expert]
            part = down[expert].float() @ gate(inner[None])[0]
            if biases is not None:
                part += biases[1][expert]
            out[token] += share * part
    return out.to(x.dtype)


def expert_mlp_grouped(
    x: Tensor,
    experts: Tensor,
    shares: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: Biases | None = None,
    gate: Gate = silu_mul,
) -> Tensor:
    """`expert_mlp`: tokens sorted by expert, and one product for all experts."""
    tokens, active = experts.shape
    ids, order = experts.flatten().sort(stable=True)
    numbers = torch.arange(len(down), device=x.device)
    ends = torch.searchsorted(ids, numbers, right=True, out_int32=True)
    inner = F.grouped_mm(x[order // active], gate_up.mT, offs=ends)
    if biases is not None:
        inner += biases[0][ids]
    sorted_out = F.grouped_mm(gate(inner), down.mT, offs=ends)
    if biases is not None:
        sorted_out += biases[1][ids]
    out = torch.empty_like(sorted_out).index_copy_(0, order, sorted_out).view(tokens, active, x.shape[1])
    return torch.bmm(shares.to(x.dtype)[:, None], out)[:, 0]


def expert_mlp_all(
    x: Tensor,
    experts: Tensor,
    shares: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: Biases | None = None,
    gate: Gate = silu_mul,
) -> Tensor:
    """`expert_mlp`: all tokens through every expert, what is not asked for left out."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(down)):
        chosen = experts == expert
        share = shares.masked_fill(~chosen, 0.0).sum(1, keepdim=True)
        first, second = (None, None) if biases is None else (bias[expert] for bias in biases)
        part = F.linear(gate(F.linear(x, gate_up[expert], first)), down[expert], second)
        out += (share * part).masked_fill_(~chosen.any(1, keepdim=True), 0.0)
    return out.to(x.dtype)


@cache
def _triton() -> Callable:
    from kernels.expert_mlp_triton import expert_mlp_triton

    return expert_mlp_triton
