"""Routers and mixtures of experts on a GPU, launched and in graphs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

import torch

from kernels.clamped_swiglu import clamped_swiglu, clamped_swiglu_reference
from kernels.expert_mlp import expert_mlp, expert_mlp_reference
from kernels.route import route, route_reference
from tests.gpu.kernel_cases import BOUNDS, DEVICE, DRY, Checks, error


def check_experts(checks: Checks, dtypes: Sequence[str]) -> None:
    """A mixture of experts, also in a graph that is replayed with other tokens for other experts; and gpt-oss's.

    Token 0 and its experts stay: what it gets must not change by a bit with its neighbours.
    """
    width, inner, num_experts, active = (32, 16, 6, 2) if DRY else (2048, 768, 128, 8)
    for name, biased, tokens in product(dtypes, (False, True), (5,) if DRY else (1, 64, 1032)):
        options = {"device": DEVICE, "dtype": getattr(torch, name)}
        case = {"biased": biased, "tokens": tokens}
        x = torch.randn(tokens, width, **options)
        gate_up = torch.randn(num_experts, 2 * inner, width, **options) * width**-0.5
        down = torch.randn(num_experts, width, inner, **options) * inner**-0.5
        router = torch.randn(num_experts, width, device=DEVICE) * width**-0.5
        shares, experts = route(x, router, None, active, biased)
        expected = route_reference(x, router, None, active, biased)[0]
        checks.add("route", name, error(shares, expected), BOUNDS["float32"], **case)
        given = x, experts, shares, gate_up, down
        gates, reference_gates = {}, {}
        if biased:
            biases = torch.randn(num_experts, 2 * inner, **options), torch.randn(num_experts, width, **options)
            limits = {"alpha": 1.702, "limit": 7.0}
            gates = {"biases": biases, "gate": partial(clamped_swiglu, **limits)}
            reference_gates = {"biases": biases, "gate": partial(clamped_swiglu_reference, **limits)}
        out, graph = expert_mlp(*given, **gates), None
        first = out[0].clone()
        for replay in range(1 if DRY else 3):
            expected = expert_mlp_reference(*given, **reference_gates)
            checks.add("expert_mlp", name, error(out, expected), 4 * BOUNDS[name], replay=replay, **case)
            checks.add("expert_mlp alone", name, int((out[0] != first).sum()), 0, replay=replay, **case)
            if DRY:
                continue
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = expert_mlp(*given, **gates)
            x[1:].normal_()
            experts[1:] = torch.rand(tokens - 1, num_experts // 2**replay, device=DEVICE).topk(active).indices
            graph.replay()
