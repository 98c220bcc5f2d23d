"""The memory plan by hand."""

from types import SimpleNamespace

import pytest
import torch

from tests.engine.compressed import make_llm
from tests.eviction.cases import CASES
from tests.tiny_models import save_tiny_model
from zipage.config import EngineConfig
from zipage.eviction import registry
from zipage.eviction.budget import Budget
from zipage.models.attention import AttentionSpec
from zipage.models.delta_net_spec import DeltaNetSpec
from zipage.models.spec import ModelSpec
from zipage.worker.kv_cache import KVCache
from zipage.worker.memory_plan import (
    MemoryPlan,
    block_bytes,
    check_states_fit,
    large_states,
    plan_memory,
    query_slot_bytes,
)
from zipage.worker.recurrent_states import RecurrentStates
from zipage.worker.worker import DeviceMemory

MIB, GIB = 2**20, 2**30
QWEN3_8B = SimpleNamespace(num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, recurrent=None, sliding_layers=())
TINY = SimpleNamespace(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, recurrent=None, sliding_layers=())
QWEN3_NEXT = SimpleNamespace(
    num_layers=12,
    num_heads=16,
    num_kv_heads=2,
    head_dim=256,
    sliding_layers=(),
    recurrent=DeltaNetSpec(
        layers=tuple(i for i in range(48) if i % 4 < 3), num_key_heads=16, num_value_heads=32, key_dim=128,
        value_dim=128, taps=4, grouped=True,
    ),
)  # fmt: skip
BUDGET = Budget.from_tokens(2048, 256)
MAX_MODEL_LEN = 40960


def plan(
    policy="zipage", options=None, free=40 * GIB, spec=QWEN3_8B, dtype=torch.bfloat16, budget=BUDGET, **config
) -> MemoryPlan:
    config = EngineConfig(model="none", **config)
    return plan_memory(
        config,
        spec,
        dtype,
        weight_bytes=0,
        free_bytes=free,
        policy=registry.make(policy, options or {}),
        max_blocks=budget.max_blocks,
        max_model_len=config.max_model_len or MAX_MODEL_LEN,
    )


def test_bytes_of_a_block_and_of_a_query_slot():
    # 36 layers * 8 heads * 256 slots = 73,728 entries of 2 * 128 * 2 bytes; an int32 of each is 0.28125 MiB.
    assert block_bytes(QWEN3_8B, 256, torch.bfloat16) == 36 * MIB
    assert block_bytes(QWEN3_8B, 256, torch.bfloat16, positions=True) == 36 * MIB + 294_912
    assert block_bytes(QWEN3_8B, 256, torch.bfloat16, positions=True, scores=True) == 36 * MIB + 589_824
    # 36 layers * 16 queries * 32 heads * 128 dimensions * 2 bytes.
    assert query_slot_bytes(QWEN3_8B, 16, torch.bfloat16) == 4_718_592 == 4.5 * MIB
    assert query_slot_bytes(QWEN3_8B, 0, torch.bfloat16) == 0


def test_a_plan_by_hand():
    # A block is 38,338,560 bytes; 9 of them and 4,718,592 bytes of queries are 349,765,632.
    # 42,949,672,960 / 349,765,632 = 122.8; (42,949,672,960 - 122 * 4,718,592) / 38,338,560 = 1105.26.
    it = plan()
    assert it.block_bytes == 38_338_560
    assert (it.num_query_slots, it.query_slot_bytes, it.max_blocks_per_request) == (122, 4_718_592, 9)
    assert it.num_blocks == 1105
    assert it.query_bytes == 575_668_224
    assert it.cache_bytes + it.query_bytes <= 40 * GIB
    assert str(it).endswith(", 122 query slots of 4.50 MiB, at most 9 blocks a request")


def test_a_policy_without_queries_or_state():
    # 42,949,672,960 / (9 * 38,043,648) = 125.4; 42,949,672,960 / 38,043,648 = 1128.96.
    it = plan("random")
    assert it.block_bytes == 38_043_648
    assert (it.num_query_slots, it.query_slot_bytes, it.num_blocks) == (125, 0, 1128)


def test_what_bounds_the_query_slots():
    assert plan(max_num_seqs=64).num_query_slots == 64
    # (42,949,672,960 - 64 * 4,718,592) / 38,338,560 = 1112.4.
    assert plan(max_num_seqs=64).num_blocks == 1112
    short = plan(max_model_len=1000)
    assert short.max_blocks_per_request == 4
    assert short.num_query_slots == 42_949_672_960 // (4 * 38_338_560 + 4_718_592) == 271
    for num_blocks, slots in ((100, 11), (18, 2), (5, 1), (10_000, 512)):
        given = plan(num_blocks=num_blocks)
        assert (given.num_blocks, given.num_query_slots) == (num_blocks, slots)


def test_an_interval_of_several_blocks_is_planned_for():
    it = plan(budget=Budget.from_tokens(2048, 256, 1000))
    assert it.max_blocks_per_request == 8 + 4
    assert it.num_query_slots == 42_949_672_960 // (12 * 38_338_560 + 4_718_592) == 92


def test_full_kv_plans_neither_slots_nor_positions():
    it = plan("full")
    assert it == MemoryPlan(1137, 256, 36 * MIB, 0, 0)  # 40,960 MiB / 36 MiB = 1137.8
    assert "query slots" not in str(it)
    assert plan("full", free=None).num_blocks == GIB // (36 * MIB)


def gpt_oss(**options) -> MemoryPlan:
    """Of the shape of gpt-oss-20b: half of 24 layers see 128 entries. A block of a layer takes 512 KiB."""
    heads = {"num_heads": 64, "num_kv_heads": 8, "head_dim": 64, "scale": 0.125}
    layers = [AttentionSpec(**heads, window=None if i % 2 else 128) for i in range(24)]
    spec = ModelSpec(
        architecture="gpt_oss", vocab_size=9, width=8, mlp_width=8, rms_norm_eps=1e-6, inv_freq=(1.0,) * 32,
        max_position=131072, attention=layers,
    )  # fmt: skip
    return plan(spec=spec, **options)


def test_windows_come_first_and_blocks_of_full_layers_are_the_rest():
    # A window of 128 lies in two blocks of 256; a step of 8,192 tokens takes 32 more and one that begins within one.
    it = gpt_oss(policy="full")
    assert (it.block_bytes, it.sliding_block_bytes) == (6 * MIB, 6 * MIB)
    assert (it.num_windows, it.num_sliding_blocks) == (512, 512 * 2 + 33)
    assert it.num_blocks == (40 * GIB) // (6 * MIB) - 1057
    assert it.cache_bytes <= 40 * GIB
    assert "sliding layers 6.19 GiB = 1057 blocks (6.00 MiB each) for windows of 512 requests" in str(it)
    # (1,024 - 33 * 6) / (2 * 6 + 8 * 6) = 13.8
    it = gpt_oss(policy="full", kv_cache_memory_bytes=GIB)
    assert (it.num_windows, it.num_sliding_blocks, it.num_blocks) == (13, 59, 111)
    # Longer requests than three blocks there are none: (1,024 - 198) / (2 * 6 + 3 * 6) = 27.5
    assert gpt_oss(policy="full", kv_cache_memory_bytes=GIB, max_model_len=768).num_windows == 27
    # Two blocks hold any request whole, and nothing is kept for chunks: 1,024 / (2 * 6 + 2 * 6) = 42.7
    it = gpt_oss(policy="full", kv_cache_memory_bytes=GIB, max_model_len=512)
    assert (it.num_windows, it.num_sliding_blocks) == (42, 84)
    assert gpt_oss(policy="full", num_blocks=7).num_windows == 7
    with pytest.raises(ValueError, match=r"no room for .* beside 220200960 bytes of sliding layers: raise gpu_mem"):
        gpt_oss(policy="full", kv_cache_memory_bytes=211 * MIB)


def test_a_window_is_no_longer_than_a_request_can_be():
    for max_model_len, each in ((1, 1), (256, 1), (257, 2)):
        it = gpt_oss(policy="full", max_model_len=max_model_len)
        assert (it.num_windows, it.num_sliding_blocks) == (512, 512 * each)
    assert gpt_oss(policy="full", max_model_len=513).num_sliding_blocks == 512 * 2 + 33


def test_query_slots_are_counted_in_what_windows_leave():
    it = gpt_oss(policy="random", kv_cache_memory_bytes=4 * GIB)
    # (4,096 - 198) / (12 + 8 * 6.09375) = 64.1; 4,096 - 161 * 6 = 3,130 MiB are 57.07 requests of nine blocks.
    assert (it.block_bytes, it.query_slot_bytes) == (6 * MIB + 12 * 8 * 256 * 4, 0)
    assert (it.num_windows, it.num_sliding_blocks, it.num_query_slots) == (64, 161, 57)
    assert it.num_blocks == 3130 * MIB // it.block_bytes
    assert gpt_oss(kv_cache_memory_bytes=4 * GIB).query_slot_bytes == 12 * 16 * 64 * 64 * 2, "of full layers alone"
    with pytest.raises(
        ValueError, match=r"exceed [0-9]+ bytes beside 220200960 bytes of sliding layers: raise gpu_mem"
    ):
        gpt_oss(kv_cache_memory_bytes=220 * MIB)


def test_a_slab_of_host_memory_takes_blocks_of_either_kind():
    it = gpt_oss(policy="random", swap_space=1.0)
    assert it.slab_bytes == it.block_bytes > it.sliding_block_bytes
    assert (it.slab_blocks, it.slab_sliding_blocks, it.num_host_slabs) == (1, 1, GIB // it.block_bytes)
    small = gpt_oss(policy="random", swap_space=1.0, block_size=16)
    assert (small.slab_blocks, small.slab_sliding_blocks) == (16, 16)


def test_no_room_says_what_would_make_some():
    assert plan(free=349_765_632).num_query_slots == 1
    with pytest.raises(ValueError, match=r"no room for one request: 9 KV blocks.*lower budget_tokens"):
        plan(free=349_765_631)
    with pytest.raises(ValueError, match="exceed 0 bytes"):
        plan(free=-5)
    with pytest.raises(ValueError, match="no room for a KV block"):
        plan("full", free=35 * MIB)


@pytest.mark.parametrize("policy", ["full", "zipage"])
def test_recurrent_states_are_told_and_blocks_are_those_of_layers_that_attend(policy):
    """By hand: 36 layers, each 32 * 128 * 128 numbers of four bytes, and 3 inputs of 8,192 channels of two."""
    it = plan(policy, spec=QWEN3_NEXT, num_blocks=100, max_num_seqs=8)
    row = 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert it.state_bytes == 8 * row
    entry = 2 * 256 * 2 + (8 if policy == "zipage" else 0)
    assert it.block_bytes == 12 * 2 * 256 * entry
    assert f"recurrent states {8 * row / GIB:.2f} GiB" in str(it)
    states = RecurrentStates(QWEN3_NEXT.recurrent, 8, torch.bfloat16, torch.device("meta"))
    assert states.nbytes == it.state_bytes
    check_states_fit(QWEN3_NEXT, torch.bfloat16, 8, 8 * row + 1)
    with pytest.raises(
        ValueError, match=r"max_num_seqs=8: recurrent states of 0\.58 GiB exceed .*: lower max_num_seqs"
    ):
        check_states_fit(QWEN3_NEXT, torch.bfloat16, 8, 8 * row)
    assert plan(policy).state_bytes == 0
    assert large_states(plan(policy), 8) is None
    assert large_states(it, 8) == (
        f"max_num_seqs=8: recurrent states take 0.58 GiB, {8 * row / (8 * row + it.cache_bytes):.0%} of what they and "
        "the KV cache have, whether requests run or not (73.7 MiB each): lower max_num_seqs to what runs at a time"
    )
    assert large_states(plan(policy, spec=QWEN3_NEXT, num_blocks=400, max_num_seqs=8), 8) is None
    check_states_fit(QWEN3_8B, torch.bfloat16, 8, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cache_takes_what_the_plan_says(dtype):
    it = plan(spec=TINY, dtype=dtype, block_size=16, num_blocks=30, max_num_seqs=3)
    cache = KVCache(TINY, 30, 16, dtype, torch.device("cpu"), positions=True, scores=True, num_query_slots=3, window=16)
    assert [x.shape[:2] for x in cache.entry_tensors] == [(2, 30)] * 4
    assert sum(x.nbytes for x in cache.entry_tensors) == it.cache_bytes
    assert cache.queries.shape == (2, 3, 16, 4, 8)
    assert cache.queries.nbytes == it.query_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))


ONE_OF_EACH = {case.policy: case for case in CASES}


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (None, {}),
        *((case, {}) for case in ONE_OF_EACH.values()),
        (ONE_OF_EACH["snapkv"], {"allocation": "pyramid", "enable_prefix_caching": False}),
    ],
    ids=str,
)
def test_an_engine_keeps_what_its_plan_says_under_every_policy(folder, case, options):
    """Keys, values, and all that lies beside them: to the byte."""
    llm = make_llm(folder, case, num_blocks=None, kv_cache_memory_bytes=3_000_000, **options)
    cache, it = llm._core.runner.cache, llm.memory_plan
    queries = 0 if cache.queries is None else cache.queries.nbytes
    assert (sum(x.nbytes for x in cache.entry_tensors), queries) == (it.cache_bytes, it.query_bytes)
    assert 0 <= 3_000_000 - it.cache_bytes - it.query_bytes < it.block_bytes


@pytest.mark.parametrize("left", [0, 100, 7000])
def test_what_is_planned_and_what_others_take_fill_the_share(left):
    """Whatever the measurement left behind is in the plan, and is taken from the cache once."""
    total, weights, peak, others = 100_000, 30_000, 5_000, 2_000
    memory = DeviceMemory.of(weights, left, peak, total - others - weights - left, 0.1 * total)
    assert memory.weights + memory.activations + memory.free + others == 0.9 * total
