"""Scores of attention with soft caps and sinks, against the references: a part of `check_kernels`."""

from __future__ import annotations

import torch

from kernels.attended import attended_reference
from kernels.attention_score import attention_score_reference
from kernels.attention_score_triton import attended_triton, attention_score_triton
from tests.gpu.check_compression import (
    BOUND,
    HEADS,
    KINDS,
    LAYERS,
    LENS,
    SHAPES,
    difference,
    host_of,
    make_event,
    window_queries,
)
from tests.gpu.kernel_cases import DEVICE, Checks


def check_score_forms(checks: Checks, dtypes: tuple[str, ...], every: bool) -> None:
    """Of the dtypes named; `every` shape, or the first few."""
    for number, (name, head_dim, block_size, group, window) in enumerate(SHAPES if every else SHAPES[:5]):
        if name not in dtypes:
            continue
        lens = tuple(n if n == 0 or n >= window else window for n in LENS)
        event = make_event(lens, block_size, head_dim, getattr(torch, name))
        q_cache, slots, ends = window_queries(event, window, HEADS * group)
        soft_cap = None if number % 3 == 2 else 5.0
        sinks = None if number % 3 == 1 else 2 * torch.randn(LAYERS, HEADS * group, device=DEVICE).to(q_cache.dtype)
        form = {"soft_cap": soft_cap, "sinks": sinks}
        host_form = {"soft_cap": soft_cap, "sinks": None if sinks is None else sinks.cpu().float()}
        case = {"head_dim": head_dim, "block_size": block_size, "group": group, "window": window, "soft_cap": soft_cap}
        args = q_cache, event, slots, ends, 2 * head_dim**-0.5
        host = q_cache.cpu().float(), host_of(event), slots.cpu(), ends.cpu(), 2 * head_dim**-0.5
        for kind in ("zipage", "r_kv", "r_kv_mean", "morphkv"):
            expected = attention_score_reference(*host, **KINDS[kind], **host_form)
            out = attention_score_triton(*args, **KINDS[kind], **form)
            checks.add(
                "score_forms", name, difference(out, expected), BOUND, kind=kind, sinks=sinks is not None, **case
            )
        more, fewer = (attended_reference(*host, 0.01 * factor, **host_form) for factor in (1 - BOUND, 1 + BOUND))
        out = attended_triton(*args, 0.01, **form).cpu()
        wrong = ((out & ~more) | (fewer & ~out)).count_nonzero().item()
        checks.add("attended_forms", name, wrong, 0, sinks=sinks is not None, **case)
