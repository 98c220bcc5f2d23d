import pytest
import torch

from kernels.cache_view import CacheView
from kernels.decode_pieces import decode_pieces
from kernels.decode_pieces_triton import decode_pieces_triton
from kernels.decode_shares_triton import share_decodes
from kernels.decode_spans import decode_spans
from kernels.paged_decode import _check_pieces, paged_decode, paged_decode_reference, paged_decode_torch
from kernels.paged_decode_triton import paged_decode_triton
from tests.kernels.paged import BACKENDS, BOUNDS, DEVICE, device_of, error, fused, make_paged, upcast

CASES = [  # contexts, block size, KV heads, group, head_dim
    pytest.param([1], 16, 2, 3, 64, id="c1-b16-g3-d64"),
    pytest.param([63], 64, 1, 4, 96, id="c63-b64-g4-d96"),
    pytest.param([257], 256, 2, 1, 128, id="c257-b256-mha-d128"),
    pytest.param([257, 0, 63, 1], 16, 2, 3, 80, id="mixed-b16-g3-d80"),
    pytest.param([300, 17], 64, 1, 4, 128, id="mixed-b64-g4-d128"),
    pytest.param([1, 16, 15, 257], 256, 1, 3, 64, id="mixed-b256-g3-d64"),
    pytest.param([128, 64, 16], 64, 1, 1, 32, id="full-tiles-b64-mha-d32"),
    pytest.param([70], 16, 1, 20, 256, id="c70-b16-g20-d256"),
    pytest.param([0, 0], 16, 1, 3, 64, id="empty-b16-g3-d64"),
    pytest.param([(257, 0), (63, 130), (0, 0), (1, 16)], 16, 2, 3, 80, id="apart-b16-g3-d80"),
    pytest.param([(17, 300, 63), (64, 0, 257)], 64, 3, 1, 64, id="apart-b64-mha-d64"),
]


def cut_to(wanted):
    """Decode attention of requests cut into about so many pieces."""
    return lambda q, view, scale: paged_decode_triton(q, view, scale, decode_pieces_triton(view, wanted))


def check(attend, contexts, block_size, kv_heads, group, head_dim, dtype, device):
    paged = make_paged(contexts, block_size, kv_heads, head_dim, dtype, device)
    q = fused(len(contexts), kv_heads * group, head_dim, dtype, device)
    scale = head_dim**-0.5
    out = attend(q, paged, scale)
    assert out.shape == q.shape
    assert out.dtype == dtype
    expected = paged_decode_reference(q.cpu().float(), upcast(paged), scale)
    assert error(out, expected) < BOUNDS[dtype]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(("contexts", "block_size", "kv_heads", "group", "head_dim"), CASES)
def test_decode(backend, dtype, contexts, block_size, kv_heads, group, head_dim):
    attend = paged_decode_triton if backend == "triton" else paged_decode_torch
    check(attend, contexts, block_size, kv_heads, group, head_dim, dtype, device_of(backend))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("wanted", [1, 6, 40])
@pytest.mark.parametrize("block_size", [16, 256])
def test_cutting_changes_nothing(wanted, block_size):
    """With 20 pieces of one request the combining loop goes round twice."""
    contexts = [2500, 0] if wanted == 40 else [400, 0, 1, 129, 700]
    check(cut_to(wanted), contexts, block_size, 1, 3, 64, torch.float32, DEVICE)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("wanted", [6, 40])
@pytest.mark.parametrize("block_size", [16, 256])
def test_heads_of_a_request_take_only_their_own_pieces(wanted, block_size):
    """Of a request's pieces, cut as its longest head, a head has all, or some, or one, or none."""
    contexts = [(700, 0, 300), (20, 640, 129), (0, 1, 0), (384, 256, 400)]
    check(cut_to(wanted), contexts, block_size, 3, 2, 64, torch.float32, DEVICE)


def test_pieces_are_counted_anew_in_every_layer():
    """The programs of one layer leave the counts as they found them, with heads of any length."""
    view = make_paged([(700, 0), (300, 640)], 64, 2, 64, torch.float32, DEVICE)
    q = torch.randn(2, 4, 64, device=DEVICE)
    pieces = decode_pieces_triton(view, 12)
    assert pieces.starts[-1] > 6
    outs = [paged_decode_triton(q, view, 0.1, pieces) for _ in range(2)]
    assert torch.equal(*outs)
    assert pieces.arrived.eq(0).all()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("piece_bytes", [1, 50_000])
def test_torch_pieces_change_nothing(monkeypatch, piece_bytes):
    """Requests one by one, and a few to a piece with the shorter ones padded."""
    monkeypatch.setattr("kernels.paged_decode.PIECE_BYTES", piece_bytes)
    contexts = [5, 300, 0, 16, 17, 48, 1, 299, 33]
    check(paged_decode_torch, [(n, contexts[-1 - i]) for i, n in enumerate(contexts)], 64, 2, 3, 64, torch.half, "cpu")
    check(paged_decode_torch, contexts, 64, 2, 3, 64, torch.float32, "cpu")


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_what_is_not_finite_costs_no_other_request(backend, dtype):
    """Shorter ones, longer ones, and one of the same length."""
    attend = paged_decode_triton if backend == "triton" else paged_decode_torch
    device = device_of(backend)
    paged = make_paged([40, 100, 300, 300, 17], 16, 2, 64, dtype, device)
    q = fused(5, 4, 64, dtype, device)
    for bad in range(5):
        broken = paged._replace(v_cache=paged.v_cache.clone())
        broken.v_cache[paged.block_tables[bad, 0, : -(-int(paged.lens[bad, 0]) // 16)].long()] = float("nan")
        out = attend(q, broken, 0.125)
        assert out.isfinite().flatten(1).all(dim=1).tolist() == [row != bad for row in range(5)]


def test_large_scores_stay_finite():
    """Scores near 1000 overflow exp2 unless the running maximum is taken off first."""
    paged = make_paged([200], 64, 1, 64, torch.float32, DEVICE)
    q = 40 * torch.randn(1, 3, 64, device=DEVICE)
    expected = paged_decode_reference(q.cpu(), upcast(paged), 1.0)
    for wanted in (1, 2):
        assert error(cut_to(wanted)(q, paged, 1.0), expected) < 1e-3
    assert error(paged_decode_torch(q.cpu(), upcast(paged), 1.0), expected) < 1e-3


def test_addresses_past_two_to_the_31():
    """The last block of a cache of more than 2^31 elements. Memory that nobody touches is never really taken."""
    blocks = 2**31 // (256 * 128) + 2
    try:
        cache = torch.empty(blocks, 1, 256, 128, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("this machine does not lend 4.3 GB")
    cache[-1].normal_()
    tables = torch.tensor([[blocks - 1]], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([100], dtype=torch.int32, device=DEVICE)
    q = torch.randn(1, 2, 128).to(DEVICE, torch.float16)
    last = cache[-1:].cpu().float()
    host = CacheView.shared(last, last, tables.cpu() * 0, lens.cpu())
    expected = paged_decode_reference(q.cpu().float(), host, 0.1)
    assert error(paged_decode_triton(q, CacheView.shared(cache, cache, tables, lens), 0.1), expected) < 1e-3


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("contexts", [[257, 0, 63, 1, 300], [0, 0], [(257, 0), (63, 130)]], ids=["", "empty", "apart"])
def test_spans_of_a_layer_are_those_of_the_next(contexts):
    view = make_paged(contexts, 64, 2, 64, torch.float32, "cpu")
    pieces = decode_pieces(view)
    assert (pieces is None) == view.heads_differ
    following = view._replace(k_cache=view.k_cache.flip(-1), v_cache=view.v_cache.flip(-1))
    q = torch.randn(len(contexts), 6, 64)
    assert error(paged_decode(q, following, 0.1, pieces), paged_decode_reference(q, following, 0.1)) < 1e-5


def test_pieces_of_another_device_are_refused():
    view, q = make_paged([20, 9], 16, 2, 64, torch.float32), torch.randn(2, 4, 64)
    for pieces in (decode_pieces_triton(view, 3), share_decodes(view, 64, 2, 3)):
        with pytest.raises(ValueError, match=f"pieces has type {type(pieces).__name__}: give decode_pieces"):
            paged_decode(q, view, 0.1, pieces)


@pytest.mark.parametrize("divide", [decode_pieces_triton, lambda view: share_decodes(view, 64, 2, 3)])
def test_pieces_of_another_batch_are_refused(monkeypatch, divide):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    q, pieces = torch.randn(2, 4, 64), divide(make_paged([20, 9, 1], 16, 2, 64, torch.float32))
    with pytest.raises(ValueError, match=r"pieces.arrived has shape .*: give decode_pieces of this view, \(2, 2\)"):
        _check_pieces(pieces, q, make_paged([20, 9], 16, 2, 64, torch.float32))
    with pytest.raises(ValueError, match="pieces has type DecodeSpans"):
        _check_pieces(
            decode_spans(make_paged([20, 9], 16, 2, 64, torch.float32)), q, make_paged([9], 16, 2, 64, q.dtype)
        )
