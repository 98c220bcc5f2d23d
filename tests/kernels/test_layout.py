"""A wrong argument is named, with its value and what to do."""

import pytest
import torch

from kernels import dispatch


def caches(layers=(), block_size=16, head_dim=64, dtype=torch.float32):
    return [torch.zeros(*layers, 4, 2, block_size, head_dim, dtype=dtype) for _ in range(2)]


def decode_arguments() -> dict:
    k_cache, v_cache = caches()
    tables, lens = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    return {
        "q": torch.randn(3, 6, 64),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_tables": tables,
        "cache_lens": lens,
        "scale": 0.1,
    }


def prefill_arguments() -> dict:
    bounds = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    return {**decode_arguments(), "cu_seqlens": bounds, "max_seqlen": 1}


def store_arguments() -> dict:
    k_cache, v_cache = caches()
    k, v = torch.randn(2, 3, 2, 64)
    return {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": torch.arange(3)}


def copy_arguments() -> dict:
    k_cache, v_cache = caches(layers=(3,))
    return {"k_cache": k_cache, "v_cache": v_cache, "src": torch.tensor([0]), "dst": torch.tensor([1])}


VALID = {
    dispatch.paged_decode: decode_arguments,
    dispatch.paged_prefill: prefill_arguments,
    dispatch.store_kv: store_arguments,
    dispatch.copy_blocks: copy_arguments,
}


@pytest.mark.parametrize("kernel", VALID, ids=lambda kernel: kernel.__name__)
def test_valid_arguments_pass(kernel):
    kernel(**VALID[kernel]())


WRONG = [
    (dispatch.paged_decode, {"q": torch.randn(3, 5, 64)}, r"q has shape \(3, 5, 64\): give .* multiple of 2 heads"),
    (dispatch.paged_decode, {"q": torch.randn(3, 6, 32)}, r"q has shape \(3, 6, 32\)"),
    (dispatch.paged_decode, {"q": torch.randn(3, 6, 64).half()}, r"q has dtype torch.float16: convert it to torch.fl"),
    (dispatch.paged_decode, {"q": torch.randn(3, 64, 6).transpose(1, 2)}, r"q has stride .* contiguous"),
    (dispatch.paged_decode, {"q": torch.randn(3, 6, 64, device="meta")}, r"q has device meta: move it to cpu"),
    (dispatch.paged_decode, {"k_cache": torch.zeros(4, 2, 16)}, r"k_cache has shape \(4, 2, 16\): give one layer"),
    (dispatch.paged_decode, {"k_cache": torch.zeros(4, 2, 48, 64)}, r"k_cache has block size 48: .* power of two"),
    (dispatch.paged_decode, {"k_cache": torch.zeros(4, 2, 512, 64)}, r"k_cache has block size 512"),
    (dispatch.paged_decode, {"k_cache": torch.zeros(4, 2, 16, 320)}, r"k_cache has head_dim 320: use 1 to 256"),
    (dispatch.paged_decode, {"k_cache": torch.zeros(4, 2, 16, 64).int()}, r"k_cache has dtype torch.int32"),
    (
        dispatch.paged_decode,
        {"k_cache": torch.zeros(4, 16, 2, 64).transpose(1, 2)},
        r"k_cache has stride .* contiguous",
    ),
    (dispatch.paged_decode, {"v_cache": torch.zeros(5, 2, 16, 64)}, r"v_cache has shape \(5, 2, 16, 64\)"),
    (dispatch.paged_decode, {"v_cache": torch.zeros(4, 2, 16, 64).half()}, r"v_cache has dtype torch.float16"),
    (dispatch.paged_decode, {"block_tables": torch.zeros(3, 2)}, r"block_tables has dtype .* torch.int32"),
    (
        dispatch.paged_decode,
        {"block_tables": torch.zeros(2, 2).int()},
        r"block_tables has shape \(2, 2\): give \[3, 2\]",
    ),
    (dispatch.paged_decode, {"block_tables": torch.zeros(3).int()}, r"block_tables has shape \(3,\): give \[3, any\]"),
    (dispatch.paged_decode, {"block_tables": torch.zeros(2, 3).int().T}, r"block_tables has stride"),
    (dispatch.paged_decode, {"cache_lens": torch.ones(3).long()}, r"cache_lens has dtype torch.int64"),
    (dispatch.paged_decode, {"cache_lens": torch.ones(4).int()}, r"cache_lens has shape \(4,\): give \[3\]"),
    (dispatch.paged_prefill, {"cu_seqlens": torch.zeros(3).int()}, r"cu_seqlens has shape \(3,\): give \[4\]"),
    (dispatch.paged_prefill, {"cache_lens": torch.ones(3, 1).int()}, r"cache_lens has shape \(3, 1\): give \[any\]"),
    (dispatch.paged_prefill, {"max_seqlen": 4}, r"max_seqlen has value 4: .* up to 3"),
    (dispatch.paged_prefill, {"max_seqlen": torch.tensor(1)}, r"max_seqlen has value 1: give .* an int"),
    (dispatch.store_kv, {"k": torch.randn(3, 4, 64)}, r"k has shape \(3, 4, 64\): give \[tokens, 2, 64\]"),
    (dispatch.store_kv, {"v": torch.randn(2, 2, 64)}, r"v has shape \(2, 2, 64\): give 3 tokens"),
    (dispatch.store_kv, {"slots": torch.arange(3).int()}, r"slots has dtype torch.int32: convert it to torch.int64"),
    (dispatch.store_kv, {"slots": torch.arange(4)}, r"slots has shape \(4,\): give \[3\]"),
    (dispatch.copy_blocks, {"k_cache": torch.zeros(4, 2, 16, 64)}, r"k_cache has shape .* all layers"),
    (dispatch.copy_blocks, {"v_cache": torch.zeros(2, 4, 2, 16, 64)}, r"v_cache has shape \(2, 4, 2, 16, 64\)"),
    (dispatch.copy_blocks, {"dst": torch.arange(2)}, r"dst has shape \(2,\): give \[1\]"),
    (dispatch.copy_blocks, {"src": torch.tensor([0.0])}, r"src has dtype torch.float32"),
]


@pytest.mark.parametrize(
    ("kernel", "wrong", "message"), WRONG, ids=[f"{w[0].__name__}-{next(iter(w[1]))}-{i}" for i, w in enumerate(WRONG)]
)
def test_wrong_argument_is_named(kernel, wrong, message):
    with pytest.raises(ValueError, match=message):
        kernel(**{**VALID[kernel](), **wrong})
