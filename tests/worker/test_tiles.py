"""A step and a compression over tiles, by the kernels of a CPU and by those of a GPU, interpreted."""

import importlib

import numpy as np
import pytest
import torch

from kernels.decode_pieces_triton import decode_pieces_triton
from kernels.paged_decode_triton import paged_decode_triton
from tests.engine.compressed import greedy, make_llm, random_prompts, record_events, tokens_of
from tests.eviction.cases import SMALL_CHUNK, Case
from tests.tiny_models import VOCAB, save_tiny_model
from zipage.models.attention import AttentionSpec
from zipage.scheduling.plan import TableGrowth
from zipage.scheduling.tile_pool import TilePool
from zipage.tile_table import TileTable
from zipage.worker import tiled_attention
from zipage.worker.kv_cache import KVCache
from zipage.worker.tile_tables import TileTables
from zipage.worker.tiled_attention import TiledAttention

SIZE, WINDOW = 16, 4
KERNELS = (
    *("attention_score", "compact_stable", "paged_decode", "paged_prefill", "redundancy", "select"),
    *("store_kv", "store_positions", "store_step"),
)


class Spec:
    attention = tuple(AttentionSpec(num_heads=6, num_kv_heads=3, head_dim=32, scale=scale) for scale in (0.2, 0.4))
    num_layers, num_heads, num_kv_heads, head_dim, sliding_layers = 2, 6, 3, 32, ()


@pytest.fixture
def interpreted(monkeypatch):
    """A CPU computes by the kernels of a GPU."""
    for name in KERNELS:
        found = getattr(importlib.import_module(f"kernels.{name}_triton"), f"{name}_triton")
        monkeypatch.setattr(importlib.import_module(f"kernels.{name}"), f"{name}_torch", found)
    monkeypatch.setattr(tiled_attention, "decode_pieces", decode_pieces_triton)
    monkeypatch.setattr(tiled_attention, "paged_decode", paged_decode_triton)


def scrambled(lens: np.ndarray, cache_len: int, length: int, tiles: list[int]) -> TileTable:
    """A table of `length` columns by the scheduler's count, whose lines hold `lens` entries."""
    extra = lens - cache_len
    counts = -(-(extra + length * SIZE) // SIZE)
    table = np.full((len(lens), counts.max()), -1, dtype=np.int32)
    for line, count in zip(table, counts, strict=True):
        line[:count] = [tiles.pop() for _ in range(count)]
    return TileTable(table, counts, extra, length)


STEPS = {  # cache length before the step, columns, tokens of the step, entries of each line beyond the cache length
    "decodes": [(20, 2, 1, [0] * 6), (40, 3, 1, [-7, 9, 0, 3, -24, 19]), (15, 1, 1, [1, -8, -15, 0, 1, 1])],
    "prefills": [(0, 1, 7, [0] * 6), (16, 3, 18, [0] * 6), (7, 1, 5, [4, -3, 0, 1, 2, 3])],
    "both": [(31, 2, 1, [1, -5, 0, 2, 9, -30]), (0, 1, 3, [0] * 6), (32, 3, 1, [-16, 16, 0, 0, 32, -32])],
}


@pytest.mark.parametrize("interpret", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("queries", [False, True], ids=["", "queries"])
@pytest.mark.parametrize("step", STEPS)
def test_each_head_attends_to_its_own_entries(step, queries, interpret, request):
    if interpret:
        request.getfixturevalue("interpreted")
    generator = torch.Generator().manual_seed(0)
    requests = sorted(STEPS[step], key=lambda row: row[2] > 1)
    options = {"num_query_slots": 4, "window": WINDOW} if queries else {}
    cache = KVCache(Spec, 12, SIZE, torch.float32, torch.device("cpu"), positions=True, tiled=True, **options)
    cache.poison(slice(None))
    cache.poison_queries(slice(None))
    tiles = torch.randperm(cache.k.shape[1], generator=generator).tolist()
    tables = TileTables(4, 6, SIZE, torch.device("cpu"), num_layers=2, num_heads=3)
    held, rows, entries, query_indices = {}, [], [], []
    for row, (cache_len, length, new, extra) in enumerate(requests):
        table = scrambled(np.array(extra) + cache_len, cache_len, length, tiles)
        tables.write(TableGrowth(row, 0, table[:]))
        for line, count in enumerate(table.lens(cache_len).tolist()):
            x = torch.randn(2, count, 32, generator=generator)
            held[row, divmod(line, 3)] = x
            for j in range(count):
                tile = int(table.tiles[line, j // SIZE])
                cache.k[0, tile, 0, j % SIZE], cache.v[0, tile, 0, j % SIZE] = x[:, j]
        rows += [row] * new
        entries += range(cache_len, cache_len + new)
        query_indices += [row * WINDOW + j % WINDOW if new - j <= WINDOW else -1 for j in range(new)]
    counts = [new for _, _, new, _ in requests]
    total, num_decodes = sum(counts), counts.count(1)
    rows.append(tables.empty_row)  # as in a graph that is wider than the batch
    entries.append(-1)
    query_indices.append(-1)
    padded = num_decodes == len(requests)
    last = None if padded else total
    attention = TiledAttention(
        cache,
        Spec.attention,
        tables,
        rows=torch.tensor(rows[:last]),
        entries=torch.tensor(entries[:last]),
        positions=torch.arange(1000, 1000 + len(rows[:last])),
        query_indices=torch.tensor(query_indices[:last]) if queries else None,
        num_decodes=num_decodes + padded,
        width=None if padded else tables.width(np.array(rows[:total])),
        chunks=counts[num_decodes:],
    )
    assert (cache.positions >= 1000).sum() == 6 * total
    for layer in range(2):
        q, k, v = (torch.randn(len(rows[:last]), heads, 32, generator=generator) for heads in (6, 3, 3))
        out = attention(layer, q, k, v)
        assert out.isfinite().all()
        first = 0
        for row, new in enumerate(counts):
            for head in range(3):
                old = held[row, (layer, head)]
                keys, values = (torch.cat((a, b[first : first + new, head])) for a, b in zip(old, (k, v), strict=True))
                for i in range(new):
                    seen = old.shape[1] + i + 1
                    for place in (2 * head, 2 * head + 1):
                        logits = keys[:seen] @ q[first + i, place] * Spec.attention[layer].scale
                        expected = logits.softmax(0) @ values[:seen]
                        assert torch.allclose(out[first + i, place], expected, atol=2e-5), (row, head, i)
            if queries:
                for j in range(max(0, new - WINDOW), new):
                    assert torch.equal(cache.queries[layer, row, j % WINDOW], q[first + j])
            first += new


def test_tables_follow_growth_and_replacement():
    pool = TilePool(40, SIZE, 6)
    tables = TileTables(2, 12, SIZE, torch.device("cpu"), num_layers=2, num_heads=3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = pool.allocate(int(rng.integers(1, 4)))
        tables.write(TableGrowth(1, 0, table[:]))
        for _ in range(3):
            told = len(table)
            table += pool.allocate(1)
            tables.write(TableGrowth(1, told, table[told:]))
            check_row(tables, table)
        kept = rng.integers(1, SIZE * table.counts + 1)
        table, left = table.cut(kept, SIZE, SIZE)
        pool.free(left)
        table += pool.allocate(2)
        tables.write(TableGrowth(1, 0, table[:]))
        check_row(tables, table)
        pool.free(table)


def check_row(tables: TileTables, table: TileTable) -> None:
    tables.upload()
    for line, count in enumerate(table.counts.tolist()):
        layer, head = divmod(line, 3)
        assert tables.tables[layer, 1, head, :count].tolist() == table.tiles[line, :count].tolist()
        assert int(tables.extra[layer, 1, head]) == table.extra[line]
    assert tables.width(np.array([1])) == table.counts.max()


def test_an_engine_on_the_kernels_of_a_gpu_keeps_the_same(tmp_path, request):
    folder = save_tiny_model("qwen3", tmp_path, num_hidden_layers=2)
    prompts = random_prompts([44, 47], VOCAB)
    found = []
    for interpret in (False, True):
        if interpret:
            request.getfixturevalue("interpreted")
        options = {"allocation": "adaptive", "allocation_options": {"round": "entry"}, "enable_prefix_caching": False}
        llm = make_llm(folder, Case("zipage", SMALL_CHUNK), 32, trace_positions=True, **options)
        events = record_events(llm)
        tokens = tokens_of(llm.generate(prompts, greedy(8), use_tqdm=False))
        found.append((tokens, [event.kept_positions.tolist() for event in events]))
    assert found[0] == found[1]
    assert len(found[0][1]) == 2
