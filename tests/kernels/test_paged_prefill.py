import sys

import pytest
import torch

from kernels import paged_prefill_gluon
from kernels.attention_form import PLAIN, AttentionForm
from kernels.cache_view import shared
from kernels.hopper import hopper_kernels
from kernels.paged_decode import paged_decode, paged_decode_reference, paged_decode_torch
from kernels.paged_decode_triton import paged_decode_triton
from kernels.paged_prefill import (
    gpu_kernel,
    paged_prefill,
    paged_prefill_reference,
    paged_prefill_torch,
)
from kernels.paged_prefill_triton import paged_prefill_triton
from tests.kernels.paged import BACKENDS, BOUNDS, device_of, error, fused, make_paged, starts, upcast

ATTEND = {"triton": paged_prefill_triton, "torch": paged_prefill_torch}
DECODE = {"triton": paged_decode_triton, "torch": paged_decode_torch}
CASES = [  # queries, contexts, block size, KV heads, group, head_dim
    pytest.param([1], [1], 16, 1, 3, 64, id="n1-c1-b16-g3-d64"),
    pytest.param([63], [63], 64, 1, 2, 96, id="n63-c63-b64-g2-d96"),
    pytest.param([257], [257], 256, 1, 1, 128, id="n257-c257-b256-mha-d128"),
    pytest.param([64], [128], 64, 1, 1, 64, id="n64-c128-full-tiles-b64-mha-d64"),
    pytest.param([5, 0, 63, 1], [130, 30, 63, 17], 16, 2, 2, 80, id="mixed-chunks-b16-g2-d80"),
    pytest.param([150, 20], [150, 257], 256, 1, 3, 64, id="mixed-chunks-b256-g3-d64"),
    pytest.param([40], [70], 16, 1, 1, 256, id="n40-c70-b16-mha-d256"),
    pytest.param([5, 0, 63], [(130, 5), (30, 0), (63, 100)], 16, 2, 2, 80, id="apart-chunks-b16-g2-d80"),
    pytest.param([40, 1], [(150, 40), (1, 257)], 64, 2, 3, 64, id="apart-b64-g3-d64"),
]


def check(attend, queries, contexts, block_size, kv_heads, group, head_dim, dtype, device):
    paged = make_paged(contexts, block_size, kv_heads, head_dim, dtype, device)
    q = fused(sum(queries), kv_heads * group, head_dim, dtype, device)
    bounds, scale = starts(queries, device), head_dim**-0.5
    out = attend(q, paged, bounds, max(queries), scale)
    assert out.shape == q.shape
    assert out.dtype == dtype
    expected = paged_prefill_reference(q.cpu().float(), upcast(paged), bounds.cpu(), max(queries), scale)
    assert error(out, expected) < BOUNDS[dtype]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(("queries", "contexts", "block_size", "kv_heads", "group", "head_dim"), CASES)
def test_prefill(backend, dtype, queries, contexts, block_size, kv_heads, group, head_dim):
    check(ATTEND[backend], queries, contexts, block_size, kv_heads, group, head_dim, dtype, device_of(backend))


@pytest.mark.usefixtures("poisoned_empty")
def test_torch_masks_in_parts(monkeypatch):
    monkeypatch.setattr("kernels.paged_prefill.MASKED_QUERIES", 16)
    check(paged_prefill_torch, [50, 33], [90, 120], 16, 2, 3, 64, torch.float32, "cpu")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_chunks_equal_the_whole(backend):
    """A prompt in three chunks gives what it gives at once."""
    device = device_of(backend)
    view = make_paged([100], 16, 1, 64, torch.float32, device)
    q = torch.randn(100, 2, 64, device=device)
    whole = ATTEND[backend](q, view, starts([100], device), 100, 0.125)
    for first, last in ((0, 16), (16, 59), (59, 100)):
        bounds, held = starts([last - first], device), view._replace(lens=torch.full_like(view.lens, last))
        part = ATTEND[backend](q[first:last], held, bounds, last - first, 0.125)
        assert error(part, whole[first:last].cpu()) < BOUNDS[torch.float32]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_decodes_and_chunks_write_into_one_output(backend):
    """As in a graph of both: three decodes in six rows of them, chunks of 4 and 7 tokens, and two tokens of nobody."""
    device = device_of(backend)
    lens = [33, 5, 90, 20, 50, 40]
    view = make_paged(lens, 16, 2, 64, torch.float32, device)
    q = torch.randn(16, 6, 64, device=device)
    decodes = view._replace(lens=shared(torch.tensor([*lens[:3], 0, 0, 0], dtype=torch.int32, device=device), 2))
    chunks = view._replace(lens=view.lens[3:], block_tables=view.block_tables[3:])
    bounds = torch.tensor([3, 7, 14, 14], dtype=torch.int32, device=device)
    out = torch.full_like(q, 7.0)
    DECODE[backend](q[:6], decodes, 0.125, out=out[:6])
    assert ATTEND[backend](q, chunks, bounds, 16, 0.125, out) is out
    expected = torch.full(q.shape, 7.0)
    expected[:3] = paged_decode_reference(q[:6].cpu(), upcast(decodes), 0.125)[:3]
    expected[3:14] = paged_prefill_reference(q.cpu(), upcast(chunks), bounds.cpu(), 16, 0.125)[3:14]
    assert error(out, expected) < BOUNDS[torch.float32]


@pytest.mark.parametrize(
    ("out", "field"),
    [
        (torch.empty(5, 4, 64), "shape"),
        (torch.empty(4, 6, 64).transpose(0, 1), "stride"),
        (torch.empty(6, 4, 64, dtype=torch.half), "dtype"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(out, field):
    view, q = make_paged([9] * 6, 16, 2, 64, torch.float32), torch.randn(6, 4, 64)
    with pytest.raises(ValueError, match=f"out has .*{field}"):
        paged_decode(q, view, 0.125, out=out)
    with pytest.raises(ValueError, match=f"out has .*{field}"):
        paged_prefill(q, view, starts([1] * 6, q.device), 1, 0.125, out)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_queries(backend):
    device = device_of(backend)
    view = make_paged([20], 16, 1, 64, torch.float32, device)
    q = torch.randn(0, 2, 64, device=device)
    assert ATTEND[backend](q, view, starts([0], device), 0, 0.125).shape == (0, 2, 64)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(paged_prefill_gluon, "has_warpgroups", lambda device: True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "form", "chosen"),
    [
        (torch.bfloat16, 128, PLAIN, "gluon"),
        (torch.float16, 64, AttentionForm(sinks=torch.zeros(4)), "gluon"),
        (torch.float32, 128, PLAIN, "triton"),
        (torch.bfloat16, 96, PLAIN, "triton"),
        (torch.bfloat16, 256, PLAIN, "triton"),
        (torch.bfloat16, 128, AttentionForm(window=4096), "triton"),
        (torch.bfloat16, 128, AttentionForm(soft_cap=30.0), "triton"),
    ],
)
def test_hopper_has_a_kernel_for_some(dtype, head_dim, form, chosen):
    kernels = {"gluon": paged_prefill_gluon.paged_prefill_gluon, "triton": paged_prefill_triton}
    assert gpu_kernel(torch.zeros(3, 4, head_dim, dtype=dtype), form) is kernels[chosen]


@pytest.mark.usefixtures("hopper")
def test_hopper_has_a_kernel_for_rows_of_queries_that_a_descriptor_holds():
    heads_first = torch.zeros(4, 3, 128, dtype=torch.bfloat16)
    fused = torch.zeros(3, 6 * 128, dtype=torch.bfloat16)
    shifted = torch.zeros(3, 4 * 128 + 4, dtype=torch.bfloat16)[:, 4:]
    assert gpu_kernel(fused[:, : 4 * 128].view(3, 4, 128), PLAIN) is paged_prefill_gluon.paged_prefill_gluon
    assert gpu_kernel(heads_first.transpose(0, 1), PLAIN) is paged_prefill_triton
    assert gpu_kernel(shifted.view(3, 4, 128), PLAIN) is paged_prefill_triton


def test_other_gpus_have_the_kernel_in_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    q = torch.zeros(3, 4, 128, dtype=torch.bfloat16)
    paged_prefill_gluon.has_warpgroups.cache_clear()
    assert gpu_kernel(q, PLAIN) is paged_prefill_triton
    paged_prefill_gluon.has_warpgroups.cache_clear()


@pytest.mark.usefixtures("hopper")
def test_another_gluon_costs_speed_alone(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "kernels.paged_prefill_gluon", None)
    monkeypatch.delattr("kernels.paged_prefill_gluon")
    hopper_kernels.cache_clear()
    for _ in range(2):
        assert gpu_kernel(torch.zeros(3, 4, 128, dtype=torch.bfloat16), PLAIN) is paged_prefill_triton
    hopper_kernels.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Gluon" in caplog.text
