"""Hopper's decode attention, run on numpy; on a GPU, tests/gpu compares it with the same reference."""

import pytest
import torch

from kernels import paged_decode_gluon as gluon
from kernels.attention_form import AttentionForm
from kernels.cache_view import CacheView
from kernels.decode_shares_triton import share_decodes
from kernels.paged_decode import paged_decode_reference
from kernels.tiles import score_scale
from tests.kernels.gluon_on_numpy import Descriptor, Pointer, run_programs
from tests.kernels.paged import error, fused, make_paged


def decode(q, view, programs, sinks=None, before=None):
    """[B, Hq, d], and how many copies began early.

    Args:
        before: the caches without what this step wrote; given, the programs start early.
    """
    (kv_heads, block_size, head_dim), batch = view.k_cache.shape[1:], len(q)
    group, early = q.shape[1] // kv_heads, before is not None
    caches = [cache.view(-1, head_dim) for cache in (*view[:2], *(before or view[:2]))]
    k_desc, v_desc = (Descriptor(*caches[i::2], gluon.PART.value) for i in range(2))
    shares = share_decodes(view, gluon.TILE, gluon.LINE_COST, programs)
    nan = float("nan")
    out, acc = torch.full((batch, kv_heads * group, head_dim), nan), torch.full((2 * programs, group, head_dim), nan)
    maxima, sums = torch.full((2, 2 * programs, group), nan)
    starts, units, arrived, fresh = shares
    few = gluon.FEW_HEADS if group <= gluon.FEW_HEADS else gluon.MOST_GROUP
    run_programs(
        gluon, "_attend_shares", programs, Pointer.to(q, late=True), k_desc, v_desc, Pointer.to(view.block_tables),
        Pointer.to(view.lens), Pointer.to(starts), Pointer.to(units), Pointer.to(arrived, late=True),
        Pointer.to(fresh), *(Pointer.to(x, late=True) for x in (out, acc, maxima, sums)),
        sinks if sinks is None else Pointer.to(sinks), score_scale(head_dim**-0.5, None), group, kv_heads,
        *q.stride()[:2], *view.block_tables.stride()[:2], *view.lens.stride(), block_size, HEAD_DIM=head_dim,
        SPAN=min(block_size, gluon.TILE), TILE=gluon.TILE, STAGES=gluon.STAGES, LINE_COST=gluon.LINE_COST, GROUP=few,
        CHUNK=max(4, gluon.CHUNK_ELEMENTS // (few * head_dim)), DEPENDENT=early, EARLY=early, waited=not early,
    )  # fmt: skip
    assert not arrived.any()
    return out, k_desc.early


LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 700]


@pytest.mark.parametrize("programs", [1, 7, 300])
@pytest.mark.parametrize(
    ("contexts", "block_size", "kv_heads", "group", "head_dim"),
    [
        (LENGTHS, 16, 2, 3, 64),
        (LENGTHS, 256, 1, 16, 128),
        ([700], 32, 1, 1, 64),
        ([0, 0], 64, 2, 5, 64),
        ([(0, 65, 300), (64, 1, 0), (128, 129, 700)], 64, 3, 7, 128),
    ],
)
def test_any_share_of_any_line(programs, contexts, block_size, kv_heads, group, head_dim):
    """Also of fewer units than programs. Nothing is read past the last line, of lengths or queries."""
    view, heads = make_paged(contexts, block_size, kv_heads, head_dim, torch.float32), kv_heads * group
    q, sinks = fused(len(contexts), heads, head_dim, torch.float32), torch.randn(heads) if group > 3 else None
    out, _ = decode(q, view, programs, sinks)
    expected = paged_decode_reference(q, view, head_dim**-0.5, AttentionForm(sinks=sinks))
    assert error(out, expected) < 2e-6


@pytest.mark.parametrize("programs", [1, 9, 200])
@pytest.mark.parametrize(
    ("rows", "early"),
    [
        ([("a", 700), ("b", 64), ("c", 65), ("", 0), ("d", 1)], True),
        ([("a", 200), *(("b", n) for n in range(1, 20)), ("", 0)], False),
        ([*(("a", n) for n in range(120, 140)), *(("b", n) for n in range(63, 66)), ("c", 300)], False),
        ([("a", 130), ("", 0), ("b", 300), ("", 0)], True),  # one token of a prompt
    ],
    ids=["decodes", "a prompt", "two prompts first", "prompts of one token"],
)
def test_what_the_kernels_ahead_write_is_read_after_them(rows, early, programs):
    """Rows are a request and its length, of which a step writes the last entry."""
    names = [name for name, _ in rows]
    longest = dict(rows)
    paged = make_paged(list(longest.values()), 16, 2, 64, torch.float32)
    tables = paged.block_tables[[list(longest).index(name) for name in names], 0]
    view = CacheView.shared(*paged[:2], tables, torch.tensor([n for _, n in rows], dtype=torch.int32))
    before = [cache.clone() for cache in paged[:2]]
    for table, (_, n) in zip(tables, rows, strict=True):
        for cache in before if n else ():
            cache[table[(n - 1) // 16], :, (n - 1) % 16] = float("nan")
    q = fused(len(rows), 4, 64, torch.float32)
    out, copies = decode(q, view, programs, before=before)
    assert error(out, paged_decode_reference(q, view, 64**-0.5)) < 2e-6
    assert (copies > 0) == early
