import subprocess
import sys

import pytest
import torch

from kernels import dispatch, reference
from tests.kernels.paged import BOUNDS, DEVICE, error, make_paged, starts

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from kernels import dispatch
cache, tables, lens = torch.randn(2, 1, 16, 32), torch.ones(1, 1).int(), torch.full((1,), 5).int()
dispatch.store_kv(torch.randn(1, 1, 32), torch.randn(1, 1, 32), cache, cache, torch.tensor([20]))
dispatch.paged_decode(torch.randn(1, 1, 32), cache, cache, tables, lens, 1.0)
dispatch.paged_prefill(torch.randn(1, 1, 32), cache, cache, tables, torch.tensor([0, 1]).int(), lens, 1, 1.0)
dispatch.copy_blocks(cache[None], cache[None], torch.tensor([0]), torch.tensor([1]))
"""


def test_runs_on_a_cpu_without_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


@pytest.mark.parametrize("device", sorted({"cpu", DEVICE}))
def test_a_step_of_a_layer(device):
    """Store the new entries, then prefill one request, then decode it, all through the engine's entry points."""
    k_cache, v_cache, tables, lens = make_paged([40], 16, 2, 64, torch.float32, device).tuple()
    bounds = starts([10], device)
    slots = (tables[0, [1, 2]].long()[:, None] * 16 + torch.arange(16, device=device)).flatten()[14:24]
    k, v, q = torch.randn(10, 2, 64), torch.randn(10, 2, 64), torch.randn(10, 6, 64)
    k_ref, v_ref = k_cache.cpu().clone(), v_cache.cpu().clone()
    dispatch.store_kv(k.to(device), v.to(device), k_cache, v_cache, slots)
    reference.store_kv(k, v, k_ref, v_ref, slots.cpu())
    torch.testing.assert_close(k_cache.cpu(), k_ref, rtol=0, atol=0, equal_nan=True)

    host = k_ref, v_ref, tables.cpu()
    out = dispatch.paged_prefill(q.to(device), k_cache, v_cache, tables, bounds, lens, 10, 0.1)
    assert error(out, reference.paged_prefill(q, *host, bounds.cpu(), lens.cpu(), 10, 0.1)) < BOUNDS[torch.float32]
    out = dispatch.paged_decode(q[:1].to(device), k_cache, v_cache, tables, lens, 0.1)
    assert error(out, reference.paged_decode(q[:1], *host, lens.cpu(), 0.1)) < BOUNDS[torch.float32]
