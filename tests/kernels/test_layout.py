"""A wrong argument is named, with its value and what to do."""

import inspect

import pytest
import torch

from kernels.add_rms_norm import add_rms_norm
from kernels.attended import attended
from kernels.attention_score import attention_score
from kernels.cache_view import CacheView, shared
from kernels.compact_stable import compact_stable
from kernels.copy_blocks import copy_blocks
from kernels.paged_decode import paged_decode
from kernels.paged_prefill import paged_prefill
from kernels.pool_scores import pool_scores
from kernels.qk_norm_rope import qk_norm_rope
from kernels.redundancy import redundancy
from kernels.sample_from_logits import sample_from_logits
from kernels.select import select
from kernels.silu_mul import silu_mul
from kernels.store_kv import store_kv
from kernels.store_positions import store_positions
from kernels.store_predictions import store_predictions
from kernels.store_step import store_step


def caches(layers=(), block_size=16, head_dim=64, dtype=torch.float32):
    return [torch.zeros(*layers, 4, 2, block_size, head_dim, dtype=dtype) for _ in range(2)]


def decode_arguments() -> dict:
    k_cache, v_cache = caches()
    tables, lens = torch.zeros(3, 5, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    view = CacheView.shared(k_cache, v_cache, tables, lens)
    return {"q": torch.randn(3, 6, 64), **view._asdict(), "scale": 0.1}


def prefill_arguments() -> dict:
    bounds = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    return {**decode_arguments(), "cu_seqlens": bounds, "max_seqlen": 1}


def store_arguments() -> dict:
    k_cache, v_cache = caches()
    k, v = torch.randn(2, 3, 2, 64)
    return {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": shared(torch.arange(3), 2)}


def copy_arguments() -> dict:
    k_cache, v_cache = caches(layers=(3,))
    return {"k_cache": k_cache, "v_cache": v_cache, "src": torch.tensor([0]), "dst": torch.tensor([1])}


def event_arguments() -> dict:
    k_cache = torch.randn(3, 4, 2, 16, 32)
    tables, lens = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32), torch.tensor([20, 16], dtype=torch.int32)
    return CacheView.shared(k_cache, k_cache.clone(), tables, lens)._asdict()


def score_arguments() -> dict:
    numbers = torch.zeros(2, dtype=torch.int32)
    queries = {"q_cache": torch.randn(3, 2, 8, 6, 32), "query_slots": numbers, "window_ends": numbers + 20}
    return {**event_arguments(), **queries, "scale": 0.1}


def attended_arguments() -> dict:
    return {**score_arguments(), "threshold": 1e-4}


def redundancy_arguments() -> dict:
    return {**event_arguments(), "tau": 0.4}


def line_arguments() -> dict:
    return {"scores": torch.randn(3, 2, 2, 32), "lens": event_arguments()["lens"]}


def pool_arguments() -> dict:
    return {**line_arguments(), "width": 5, "kind": "max", "limit": torch.ones(3, 2, 2, dtype=torch.int32)}


def select_arguments() -> dict:
    forced, keep = torch.zeros(2, 32, dtype=torch.bool), torch.full((2,), 16, dtype=torch.int32)
    return {**line_arguments(), "forced": shared(forced, 2, 3), "keep": shared(keep, 2, 3), "max_keep": 16}


def stable_arguments() -> dict:
    event = event_arguments()
    kept = torch.arange(16, dtype=torch.int32).expand(3, 2, 2, 16).contiguous()
    dst_tables = event["block_tables"][..., :1]
    return {**event, "states": [torch.zeros(3, 4, 2, 16)], "kept": kept, "dst_tables": dst_tables}


def store_positions_arguments() -> dict:
    state = torch.zeros(3, 4, 2, 16, dtype=torch.int32)
    return {"positions": torch.arange(3, dtype=torch.int32), "state": state, "slots": shared(torch.arange(3), 2, 3)}


def store_predictions_arguments() -> dict:
    scorer = {"weight": torch.zeros(2, 64), "bias": torch.zeros(2)}
    return {"hidden": torch.randn(3, 64), **scorer, "state": torch.zeros(4, 2, 16), "slots": shared(torch.arange(3), 2)}


def store_step_arguments() -> dict:
    queries = {"q": torch.randn(3, 6, 64), "q_cache": torch.zeros(2, 8, 6, 64), "indices": torch.arange(3)}
    return {**store_arguments(), **queries}


def norm_arguments() -> dict:
    hidden, delta = torch.randn(2, 3, 64)
    return {"hidden": hidden, "delta": delta, "weight": torch.ones(64), "eps": 1e-6}


def gate_arguments() -> dict:
    return {"gate_up": torch.randn(3, 64)}


def rotary_arguments() -> dict:
    return {
        "qkv": torch.randn(3, (4 + 2 * 2) * 16),
        "q_weight": torch.ones(16),
        "k_weight": torch.ones(16),
        "eps": 1e-6,
        "cos": torch.randn(3, 1, 16),
        "sin": torch.randn(3, 1, 8),
        "num_heads": 4,
        "num_kv_heads": 2,
    }


def sample_arguments() -> dict:
    return {"logits": torch.randn(3, 50), "temperature": torch.ones(3), "u": torch.full((3,), 0.5, dtype=torch.float64)}


VALID = {
    paged_decode: decode_arguments,
    paged_prefill: prefill_arguments,
    store_kv: store_arguments,
    copy_blocks: copy_arguments,
    store_positions: store_positions_arguments,
    store_predictions: store_predictions_arguments,
    store_step: store_step_arguments,
    add_rms_norm: norm_arguments,
    silu_mul: gate_arguments,
    qk_norm_rope: rotary_arguments,
    sample_from_logits: sample_arguments,
    attended: attended_arguments,
    attention_score: score_arguments,
    redundancy: redundancy_arguments,
    pool_scores: pool_arguments,
    select: select_arguments,
    compact_stable: stable_arguments,
}


def call(kernel, arguments: dict) -> None:
    """Fields of a view are given beside the other arguments."""
    if "view" in inspect.signature(kernel).parameters:
        view = CacheView(*(arguments.pop(name) for name in CacheView._fields))
        arguments["view"] = view
    kernel(**arguments)


@pytest.mark.parametrize("kernel", VALID, ids=lambda kernel: kernel.__name__)
def test_valid_arguments_pass(kernel):
    call(kernel, VALID[kernel]())


WRONG = [
    (paged_decode, {"q": torch.randn(3, 5, 64)}, r"q has shape \(3, 5, 64\): give .* multiple of 2 heads"),
    (paged_decode, {"q": torch.randn(3, 6, 32)}, r"q has shape \(3, 6, 32\)"),
    (paged_decode, {"q": torch.randn(3, 6, 64).half()}, r"q has dtype torch.float16: convert it to torch.fl"),
    (paged_decode, {"q": torch.randn(3, 64, 6).transpose(1, 2)}, r"q has stride .* contiguous"),
    (paged_decode, {"q": torch.randn(3, 6, 64, device="meta")}, r"q has device meta: move it to cpu"),
    (paged_decode, {"k_cache": torch.zeros(4, 2, 16)}, r"k_cache has shape \(4, 2, 16\): give one layer"),
    (paged_decode, {"k_cache": torch.zeros(4, 2, 48, 64)}, r"k_cache has block size 48: .* power of two"),
    (paged_decode, {"k_cache": torch.zeros(4, 2, 512, 64)}, r"k_cache has block size 512"),
    (paged_decode, {"k_cache": torch.zeros(4, 2, 16, 320)}, r"k_cache has head_dim 320: use 1 to 256"),
    (paged_decode, {"k_cache": torch.zeros(4, 2, 16, 64).int()}, r"k_cache has dtype torch.int32"),
    (
        paged_decode,
        {"k_cache": torch.zeros(4, 16, 2, 64).transpose(1, 2)},
        r"k_cache has stride .* contiguous",
    ),
    (paged_decode, {"v_cache": torch.zeros(5, 2, 16, 64)}, r"v_cache has shape \(5, 2, 16, 64\)"),
    (paged_decode, {"v_cache": torch.zeros(4, 2, 16, 64).half()}, r"v_cache has dtype torch.float16"),
    (paged_decode, {"block_tables": torch.zeros(3, 2, 5)}, r"block_tables has dtype .* torch.int32"),
    (
        paged_decode,
        {"block_tables": torch.zeros(2, 2, 5).int()},
        r"block_tables has shape \(2, 2, 5\): give \[3, 2, 5\]",
    ),
    (paged_decode, {"block_tables": torch.zeros(3, 5).int()}, r"block_tables has shape \(3, 5\): give \[3, 2, 5\]"),
    (paged_decode, {"block_tables": torch.zeros(3, 5, 2).int().mT}, r"block_tables has stride"),
    (paged_decode, {"lens": torch.ones(3, 2).long()}, r"lens has dtype torch.int64"),
    (paged_decode, {"lens": torch.ones(3, 3).int()}, r"lens has shape \(3, 3\): give \[3, 2\]"),
    (paged_prefill, {"cu_seqlens": torch.zeros(3).int()}, r"cu_seqlens has shape \(3,\): give \[4\]"),
    (paged_prefill, {"lens": torch.ones(3).int()}, r"lens has shape \(3,\): give \[any, 2\]"),
    (paged_prefill, {"max_seqlen": 4}, r"max_seqlen has value 4: .* up to 3"),
    (paged_prefill, {"max_seqlen": torch.tensor(1)}, r"max_seqlen has value 1: give .* an int"),
    (store_kv, {"k": torch.randn(3, 4, 64)}, r"k has shape \(3, 4, 64\): give \[tokens, 2, 64\]"),
    (store_kv, {"v": torch.randn(2, 2, 64)}, r"v has shape \(2, 2, 64\): give 3 tokens"),
    (store_kv, {"slots": torch.zeros(3, 2).int()}, r"slots has dtype torch.int32: convert it to torch.int64"),
    (store_kv, {"slots": torch.arange(3)}, r"slots has shape \(3,\): give \[3, 2\]"),
    (copy_blocks, {"k_cache": torch.zeros(4, 2, 16, 64)}, r"k_cache has shape .* all layers"),
    (copy_blocks, {"v_cache": torch.zeros(2, 4, 2, 16, 64)}, r"v_cache has shape \(2, 4, 2, 16, 64\)"),
    (copy_blocks, {"dst": torch.arange(2)}, r"dst has shape \(2,\): give \[1\]"),
    (copy_blocks, {"src": torch.tensor([0.0])}, r"src has dtype torch.float32"),
    (store_step, {"q": torch.randn(3, 5, 64)}, r"q has shape \(3, 5, 64\): give \[tokens, 6, 64\]"),
    (store_step, {"q": torch.randn(3, 6, 64).half()}, r"q has dtype .* as q_cache is"),
    (store_step, {"q_cache": torch.zeros(2, 6, 64)}, r"q_cache has shape .* one layer"),
    (store_step, {"q_cache": torch.zeros(2, 6, 8, 64).transpose(1, 2)}, r"q_cache has stride"),
    (store_step, {"indices": torch.arange(2)}, r"indices has shape \(2,\): give \[3\]"),
    (store_positions, {"positions": torch.arange(3)}, r"positions has dtype torch.int64"),
    (store_positions, {"state": torch.zeros(3, 4, 2, 16)}, r"state has dtype .* use torch.int32"),
    (store_positions, {"state": torch.zeros(4, 2, 16).int()}, r"state has shape"),
    (store_positions, {"slots": torch.zeros(3, 2).long()}, r"slots has shape \(3, 2\): give \[3, 3, 2\]"),
    (store_predictions, {"hidden": torch.zeros(3, 64).long()}, r"hidden has dtype torch.int64: use float32"),
    (store_predictions, {"weight": torch.zeros(2, 32)}, r"weight has shape \(2, 32\): give \[2, 64\]"),
    (store_predictions, {"weight": torch.zeros(64, 2).T}, r"weight has stride \(1, 2\): make it contiguous"),
    (store_predictions, {"bias": torch.zeros(3)}, r"bias has shape \(3,\): give \[2\]"),
    (store_predictions, {"state": torch.zeros(3, 4, 2, 16)}, r"state has shape .* give \[num_blocks, heads, slots\]"),
    (store_predictions, {"state": torch.zeros(4, 2, 16).half()}, r"state has dtype torch.float16"),
    (store_predictions, {"slots": torch.zeros(2, 2).long()}, r"slots has shape \(2, 2\): give \[3, 2\]"),
    (store_step, {"slots": torch.zeros(4, 2).long()}, r"slots has shape \(4, 2\): give \[3, 2\]"),
    (store_step, {"indices": torch.arange(3).int()}, r"indices has dtype torch.int32"),
    (store_step, {"q_cache": torch.zeros(2, 8, 6, 64).half()}, r"q_cache has dtype .* as k_cache is"),
    (
        store_step,
        {"q": torch.randn(2, 6, 64), "indices": torch.arange(2)},
        r"q has shape \(2, 6, 64\): give 3 tokens of 64 dimensions, as k has",
    ),
    (
        store_step,
        {"q": torch.randn(3, 6, 32), "q_cache": torch.zeros(2, 8, 6, 32)},
        r"q has shape \(3, 6, 32\): give 3 tokens of 64 dimensions",
    ),
    (add_rms_norm, {"hidden": torch.randn(3, 2, 64)}, r"hidden has shape .* give \[rows, columns\]"),
    (add_rms_norm, {"hidden": torch.randn(1, 16385)}, r"hidden has width 16385: use up to 16384"),
    (add_rms_norm, {"hidden": torch.randn(3, 64).double()}, r"hidden has dtype torch.float64"),
    (add_rms_norm, {"hidden": torch.randn(64, 3).T}, r"hidden has stride .* last dimension contiguous"),
    (add_rms_norm, {"delta": torch.randn(2, 64)}, r"delta has shape \(2, 64\): give \[3, 64\]"),
    (add_rms_norm, {"delta": torch.randn(3, 64).half()}, r"delta has dtype torch.float16"),
    (add_rms_norm, {"weight": torch.ones(63)}, r"weight has shape \(63,\): give \[64\]"),
    (add_rms_norm, {"weight": torch.ones(64, device="meta")}, r"weight has device meta: .* where hidden is"),
    (silu_mul, {"gate_up": torch.randn(3, 63)}, r"gate_up has width 63: give as many columns of up"),
    (silu_mul, {"gate_up": torch.randn(3, 0)}, r"gate_up has shape \(3, 0\)"),
    (qk_norm_rope, {"qkv": torch.randn(3, 130)}, r"qkv has width 130: give 8 heads of one even head_dim"),
    (qk_norm_rope, {"qkv": torch.randn(3, 8 * 15)}, r"qkv has width 120: .* even head_dim"),
    (qk_norm_rope, {"num_heads": 0}, r"num_heads has value 0: give an int from 1"),
    (qk_norm_rope, {"cos": torch.randn(3, 16)}, r"cos has shape \(3, 16\): give \[3, 1, 16\]"),
    (
        qk_norm_rope,
        {"cos": torch.randn(3, 1, 18)},
        r"cos has width 18: give an even number of columns up to head_dim 16",
    ),
    (qk_norm_rope, {"cos": torch.randn(3, 1, 12)}, r"sin has shape \(3, 1, 8\): give \[3, 1, 6\]"),
    (qk_norm_rope, {"cos": torch.randn(3, 2, 16)[:, :1]}, r"cos has stride .* make it contiguous"),
    (qk_norm_rope, {"sin": torch.randn(3, 1, 8).half()}, r"sin has dtype torch.float16: .* torch.float32"),
    (qk_norm_rope, {"k_weight": None}, r"k_weight has value None: give both norms' weights or neither"),
    (qk_norm_rope, {"q_weight": torch.ones(8)}, r"q_weight has shape \(8,\): give \[16\]"),
    (sample_from_logits, {"logits": torch.randn(50)}, r"logits has shape \(50,\): give \[rows, columns\]"),
    (sample_from_logits, {"temperature": torch.ones(3, 1)}, r"temperature has shape \(3, 1\): give \[3\]"),
    (sample_from_logits, {"u": torch.ones(3)}, r"u has dtype torch.float32: convert it to torch.float64"),
    (attention_score, {"q_cache": torch.randn(3, 2, 8, 5, 32)}, r"q_cache has shape .* multiple of 2 heads"),
    (attention_score, {"q_cache": torch.randn(2, 2, 8, 6, 32)}, r"q_cache has shape .* give \[3, slots"),
    (attention_score, {"q_cache": torch.randn(3, 2, 8, 6, 32).half()}, r"q_cache has dtype torch.float16"),
    (attention_score, {"k_cache": torch.randn(4, 2, 16, 32)}, r"k_cache has shape .* all layers"),
    (
        attention_score,
        {"lens": torch.ones(3, 3, 2).int()},
        r"block_tables has shape \(3, 2, 2, 2\): give \[3, 3, 2, 2\]",
    ),
    (attention_score, {"window_ends": torch.ones(2)}, r"window_ends has dtype torch.float32"),
    (attention_score, {"query_slots": torch.ones(3).int()}, r"query_slots has shape \(3,\): give \[2\]"),
    (attention_score, {"softmax": "none"}, r"softmax has value 'none': use one of all, cut, group_cut"),
    (attention_score, {"group": "sum"}, r"group has value 'sum': use one of max, mean"),
    (attention_score, {"window": "last"}, r"window has value 'last'"),
    (attention_score, {"soft_cap": 0.0}, r"soft_cap has value 0.0: give a number above 0"),
    (attention_score, {"sinks": torch.ones(6)}, r"sinks has shape, dtype and stride .* give floats \[3, 6\]"),
    (attended, {"sinks": torch.ones(6, 3).T}, r"sinks has shape, dtype and stride .* contiguous"),
    (attended, {"q_cache": torch.randn(3, 2, 8, 5, 32)}, r"q_cache has shape .* multiple of 2 heads"),
    (attended, {"threshold": 0.0}, r"threshold has value 0.0: give a number in \(0, 1\]"),
    (redundancy, {"chunk": 48}, r"chunk has value 48: give a power of two from 16"),
    (redundancy, {"chunk": 8}, r"chunk has value 8"),
    (redundancy, {"tau": 0.0}, r"tau has value 0.0: give a temperature above 0"),
    (pool_scores, {"width": 4}, r"width has value 4: give an odd number"),
    (pool_scores, {"kind": "sum"}, r"kind has value 'sum': use one of max, avg"),
    (pool_scores, {"limit": torch.ones(2).int()}, r"limit has shape \(2,\): give \[3, 2, 2\]"),
    (
        select,
        {"scores": torch.randn(2, 2, 32)},
        r"scores has shape .* give \[layers, requests, heads, slots\]",
    ),
    (select, {"scores": torch.randn(3, 2, 32, 2).mT}, r"scores has stride .* make it contiguous"),
    (select, {"forced": torch.zeros(3, 2, 2, 32)}, r"forced has dtype torch.float32: convert it to torch.bool"),
    (select, {"forced": torch.zeros(2, 32).bool()}, r"forced has shape \(2, 32\): give \[3, 2, 2, 32\]"),
    (select, {"forced": torch.zeros(2, 2, 32).bool()}, r"forced has shape .* give \[3, 2, 2, 32\]"),
    (select, {"max_keep": 33}, r"max_keep has value 33: .* up to 32"),
    (select, {"keep": torch.ones(3, 2, 2).long()}, r"keep has dtype torch.int64"),
    (compact_stable, {"kept": torch.zeros(3, 2, 2, 17).int()}, r"kept has shape .* up to 16 entries"),
    (compact_stable, {"dst_tables": torch.zeros(2, 1).int()}, r"dst_tables has shape .* give \[3, 2, 2, any\]"),
    (compact_stable, {"states": [torch.zeros(3, 4, 2, 16).half()]}, r"states\[0\] has dtype torch.float16"),
    (compact_stable, {"states": [torch.zeros(3, 5, 2, 16)]}, r"states\[0\] has shape .* \[3, 4, 2, 16\]"),
    (compact_stable, {"updates": []}, r"updates has length 0: give 1"),
    (compact_stable, {"updates": [torch.zeros(3, 2, 2, 32).int()]}, r"updates\[0\] has dtype torch.int32"),
    (compact_stable, {"updates": [torch.zeros(3, 2, 2, 16)]}, r"updates\[0\] has shape .* \[3, 2, 2, 32\]"),
    (compact_stable, {"kept": torch.zeros(3, 2, 3, 16).int()}, r"kept has shape .* give \[3, 2, 2, any\]"),
    (compact_stable, {"v_cache": torch.randn(3, 5, 2, 16, 32)}, r"v_cache has shape \(5, 2, 16, 32\)"),
]


@pytest.mark.parametrize(
    ("kernel", "wrong", "message"), WRONG, ids=[f"{w[0].__name__}-{next(iter(w[1]))}-{i}" for i, w in enumerate(WRONG)]
)
def test_wrong_argument_is_named(kernel, wrong, message):
    with pytest.raises(ValueError, match=message):
        call(kernel, {**VALID[kernel](), **wrong})
