"""Windows, soft caps and sinks: the reference against a sum over entries, and both ways to compute against it."""

import math
from dataclasses import replace

import pytest
import torch

from kernels.attention_form import PLAIN, AttentionForm
from kernels.cache_view import CacheView
from kernels.decode_pieces_triton import decode_pieces_triton
from kernels.paged_decode import paged_decode, paged_decode_reference, paged_decode_torch
from kernels.paged_decode_triton import paged_decode_triton
from kernels.paged_prefill import paged_prefill, paged_prefill_reference, paged_prefill_torch
from kernels.paged_prefill_triton import paged_prefill_triton
from tests.kernels.grid import half
from tests.kernels.paged import BACKENDS, BOUNDS, DEVICE, GARBAGE, device_of, error, fused, make_paged, starts, upcast

DECODE = {"triton": paged_decode_triton, "torch": paged_decode_torch}
PREFILL = {"triton": paged_prefill_triton, "torch": paged_prefill_torch}
FORMS = {
    "window": {"window": 40},
    "own-entry-alone": {"window": 1},
    "wide": {"window": 100_000},
    "cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 130, "soft_cap": 5.0, "sinks": True},
}


def make_form(name: str, heads: int, device="cpu", **options) -> AttentionForm:
    options = FORMS[name] | options
    if options.get("sinks"):
        options["sinks"] = 2 * torch.randn(heads, device=device)
    return AttentionForm(**options)


def on_host(form: AttentionForm) -> AttentionForm:
    return form if form.sinks is None else replace(form, sinks=form.sinks.cpu())


def bound(dtype: torch.dtype, form: AttentionForm) -> float:
    """A kernel's tanh is exact to a rounding of 1, which the cap multiplies."""
    return BOUNDS[dtype] + (5e-6 if form.soft_cap else 0)


@pytest.mark.parametrize("name", FORMS)
def test_the_reference_by_hand(name):
    """One head, entry by entry, in Python's floats."""
    view = make_paged([50], 16, 1, 8, torch.float32)
    form, q = make_form(name, 1), torch.randn(3, 1, 8)
    out = paged_prefill_reference(q, view, starts([3]), 3, 0.3, form)
    table = view.block_tables[0, 0]
    for query in range(3):
        own = 47 + query
        weights, total = {}, 0.0 if form.sinks is None else math.exp(form.sinks.item())
        for entry in range(own + 1):
            if form.window is None or entry > own - form.window:
                key = view.k_cache[table[entry // 16], 0, entry % 16]
                score = 0.3 * float(q[query, 0] @ key)
                if form.soft_cap is not None:
                    score = form.soft_cap * math.tanh(score / form.soft_cap)
                weights[entry] = math.exp(score)
                total += weights[entry]
        expected = sum(w / total * view.v_cache[table[e // 16], 0, e % 16] for e, w in weights.items())
        torch.testing.assert_close(out[query, 0], expected)
    last = paged_decode_reference(q[2:], view, 0.3, form)
    torch.testing.assert_close(last[0], out[2])


@pytest.mark.usefixtures("poisoned_empty")
@half(
    (("backend", "dtype"), BACKENDS),
    ("name", FORMS),
    (
        ("contexts", "block_size", "head_dim"),
        [
            pytest.param([300, 0, 39, 41, 1], 16, 64, id="b16-d64"),
            pytest.param([(300, 17), (0, 257)], 256, 32, id="apart-b256-d32"),
        ],
    ),
)
def test_decode(backend, dtype, name, contexts, block_size, head_dim):
    device = device_of(backend)
    view = make_paged(contexts, block_size, 2, head_dim, dtype, device)
    q, form = fused(len(contexts), 6, head_dim, dtype, device), make_form(name, 6, device)
    out = DECODE[backend](q, view, 0.2, form=form)
    expected = paged_decode_reference(q.cpu().float(), upcast(view), 0.2, on_host(form))
    assert error(out, expected) < bound(dtype, form)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("wanted", "block_size"), [(6, 16), (40, 256)])
@pytest.mark.parametrize("window", [None, 40, 200, 390])
def test_cut_requests_take_each_sink_once(window, wanted, block_size):
    """Windows begin in a request's first piece, in the last one, and in those between; heads differ in their pieces."""
    view = make_paged([(400, 1), (0, 520), (129, 300)], block_size, 2, 32, torch.float32, DEVICE)
    q, pieces = torch.randn(3, 6, 32, device=DEVICE), decode_pieces_triton(view, wanted)
    form = make_form("sinks", 6, DEVICE, window=window)
    out = paged_decode_triton(q, view, 0.2, pieces, form=form)
    assert error(out, paged_decode_reference(q.cpu(), upcast(view), 0.2, on_host(form))) < BOUNDS[torch.float32]
    assert pieces.arrived.eq(0).all()


@pytest.mark.usefixtures("poisoned_empty")
@half(
    (("backend", "dtype"), BACKENDS),
    ("name", FORMS),
    (
        ("queries", "contexts", "block_size", "head_dim"),
        [
            pytest.param([150, 0, 63, 1], [170, 30, 63, 200], 16, 64, id="b16-d64"),
            pytest.param([70, 5], [(257, 70), (5, 100)], 256, 32, id="apart-b256-d32"),
        ],
    ),
)
def test_prefill(backend, dtype, name, queries, contexts, block_size, head_dim):
    """Chunks from the start and from inside a request; rows of a tile whose windows begin tiles apart."""
    device = device_of(backend)
    view = make_paged(contexts, block_size, 2, head_dim, dtype, device)
    q, form = fused(sum(queries), 4, head_dim, dtype, device), make_form(name, 4, device)
    bounds = starts(queries, device)
    out = PREFILL[backend](q, view, bounds, max(queries), 0.2, form=form)
    expected = paged_prefill_reference(q.cpu().float(), upcast(view), bounds.cpu(), max(queries), 0.2, on_host(form))
    assert error(out, expected) < bound(dtype, form)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(("window", "block_size"), [(1, 16), (17, 16), (40, 16), (130, 32)])
def test_blocks_before_all_windows_are_not_read(backend, dtype, window, block_size):
    """They may be another request's by now: of each request, one decode and one chunk."""
    device, contexts, queries = device_of(backend), [300, 39, 1, 170], [60, 7, 1, 1]
    view = make_paged(contexts, block_size, 2, 64, dtype, device)
    bounds, form = starts(queries, device), AttentionForm(window=window)
    chunks, decodes = (fused(count, 4, 64, dtype, device) for count in (sum(queries), 4))
    host, tables = upcast(view), view.block_tables[:, 0].clone()
    expected = (
        paged_prefill_reference(chunks.cpu().float(), host, bounds.cpu(), max(queries), 0.2, form),
        paged_decode_reference(decodes.cpu().float(), host, 0.2, form),
    )
    for past, which in (([n - q for n, q in zip(contexts, queries)], 0), ([n - 1 for n in contexts], 1)):
        for row, position in enumerate(past):
            for place in range(max(0, position - window + 1) // block_size):
                view.k_cache[tables[row, place]] = view.v_cache[tables[row, place]] = float("nan")
                view.block_tables[row, 0, place] = GARBAGE
        if which:
            out = DECODE[backend](decodes, view, 0.2, form=form)
        else:
            out = PREFILL[backend](chunks, view, bounds, max(queries), 0.2, form=form)
        assert error(out, expected[which]) < BOUNDS[dtype]


def test_torch_masks_in_parts(monkeypatch):
    monkeypatch.setattr("kernels.paged_prefill.MASKED_QUERIES", 16)
    view, q, form = make_paged([90, 120], 16, 2, 32, torch.float32), torch.randn(83, 4, 32), make_form("all", 4)
    out = paged_prefill_torch(q, view, starts([50, 33]), 50, 0.2, form=form)
    assert error(out, paged_prefill_reference(q, view, starts([50, 33]), 50, 0.2, form)) < BOUNDS[torch.float32]


def test_scores_far_below_zero_stay_finite():
    """Rows that have seen nothing yet don't raise the maximum that is taken off."""
    view = make_paged([200], 16, 1, 32, torch.float32, DEVICE)
    view = CacheView(view.k_cache.abs(), *view[1:])
    q = -40 * torch.rand(100, 1, 32, device=DEVICE)
    form, bounds = AttentionForm(window=20), starts([100], DEVICE)
    out = paged_prefill_triton(q, view, bounds, 100, 1.0, form=form)
    assert error(out, paged_prefill_reference(q.cpu(), upcast(view), bounds.cpu(), 100, 1.0, form)) < 1e-3


def test_plain_is_plain():
    assert PLAIN.is_plain
    assert not any(make_form(name, 2).is_plain for name in FORMS)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (AttentionForm(window=0), "window has value 0: give an int from 1"),
        (AttentionForm(soft_cap=-1.0), "soft_cap has value -1.0: give a number above 0"),
        (
            AttentionForm(sinks=torch.zeros(3)),
            r"sinks has shape and dtype \(\(3,\), torch.float32\): give floats \[4\]",
        ),
        (AttentionForm(sinks=torch.zeros(4, 2)[:, 0]), r"sinks has stride \(2,\): make it contiguous"),
        (AttentionForm(sinks=torch.zeros(4).int()), r"sinks has .*: give floats \[4\]"),
        (AttentionForm(sinks=torch.zeros(4, device="meta")), "sinks has device meta: move it to cpu"),
    ],
)
def test_wrong_forms_are_named(form, message):
    view, q = make_paged([20], 16, 2, 32, torch.float32), torch.randn(1, 4, 32)
    with pytest.raises(ValueError, match=message):
        paged_decode(q, view, 0.2, form=form)
    with pytest.raises(ValueError, match=message):
        paged_prefill(q, view, starts([1]), 1, 0.2, form=form)
