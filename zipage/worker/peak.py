"""What a step and a compression take at most, measured before the caches are made."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernels.attention_form import AttentionForm
from kernels.spans import Spans
from zipage.eviction.rule import EvictionRule
from zipage.models.shard import WHOLE, Shard
from zipage.models.spec import ModelSpec
from zipage.sampling_params import MOST_LOGPROBS, SamplingParams
from zipage.scheduling.plan import CompressionOrder, RowStart, TableGrowth
from zipage.tile_table import TileTable
from zipage.transfer import to_device
from zipage.worker.compression_runner import CompressionRunner
from zipage.worker.compressor import LAUNCH_ENTRIES
from zipage.worker.kv_cache import KVCache
from zipage.worker.mixed_attention import LayerGroup
from zipage.worker.model_runner import ModelRunner
from zipage.worker.output_norms import OutputNorms
from zipage.worker.paged_attention import PagedAttention
from zipage.worker.step_recurrence import StepRecurrence
from zipage.worker.tile_tables import TileTables
from zipage.worker.tiled_attention import TiledAttention


@torch.inference_mode()
def measure_peak(
    runner: ModelRunner,
    block_size: int,
    dtype: torch.dtype,
    *,
    rule: EvictionRule | None = None,
    asynchronous: bool = False,
    layer_stride: int | None = None,
    shard: Shard = WHOLE,
    model_heads: int | None = None,
    calibration: Mapping[str, Tensor] | None = None,
    outputs: OutputNorms | None = None,
) -> int:
    """Bytes that a step takes at most above what is allocated afterwards (CUDA), caches not counted.

    Runs the largest step and, where requests are compressed, the largest compression, each on a small cache of its
    own. What these leave behind, such as workspaces of libraries, stays allocated, and is not counted.

    Args:
        rule: of compressions; None for full KV.
        asynchronous: a compression runs beside a step, so that both peaks may fall together.
        layer_stride: layers of one launch of a compression, as in `compress`.
        shard, model_heads, calibration, outputs: of compressions, as `CompressionRunner` takes them. All ranks measure
            together.

    Raises:
        RuntimeError: the largest compression failed.
    """
    num_tokens = runner.max_num_batched_tokens
    num_blocks = -(-min(num_tokens, runner.max_model_len) // block_size)
    tiled = rule is not None and rule.allocation is not None
    cache = KVCache(
        runner.spec,
        num_blocks,
        block_size,
        dtype,
        runner.device,
        positions=tiled,
        tiled=tiled,
        recurrent=runner.recurrent,
        num_sliding_blocks=num_blocks,
    )
    step = _peak_of(runner.device, lambda: run_largest_step(runner, cache, num_tokens))
    tables, sliding_tables = runner.block_tables(cache), runner.sliding_tables(cache)
    held = tables.nbytes + (0 if sliding_tables is None else sliding_tables.nbytes)
    if not runner.enforce_eager:
        # Graphs keep what they allocate, beside what other steps do; the largest needs most, and all share it.
        graphs = runner.step_graphs(cache, tables, sliding_tables)
        held += _peak_of(runner.device, graphs.warm_up_largest) + graphs.kept_bytes
        del graphs
    del cache, tables, sliding_tables
    if rule is not None:
        kept = {"positions": True, "scores": rule.policy.num_states, "predictions": rule.policy.predicts}
        options = kept | {"num_query_slots": 1, "window": rule.window, "tiled": tiled}
        longest = -(-runner.max_model_len // block_size)
        # Budget and interval may be beyond any request.
        cache = KVCache(runner.spec, 1 + min(rule.kept_blocks, longest), block_size, dtype, runner.device, **options)
        options = {"shard": shard, "model_heads": model_heads, "calibration": calibration, "outputs": outputs}
        options["forms"] = runner.groups.full.forms
        compress = partial(run_compression, cache, runner.spec.full, rule, layer_stride, asynchronous, **options)
        shapes = largest_batches(runner, rule, block_size)
        compression = max(_peak_of(runner.device, partial(compress, *shape)) for shape in shapes)
        # The shape of most compressions to come, so that its kernels are compiled before requests wait for them.
        compress(min(rule.max_blocks, longest), 1)
        del cache, compress
        step = step + compression if asynchronous else max(step, compression)
    torch.cuda.empty_cache()
    return step + held


def largest_batches(runner: ModelRunner, rule: EvictionRule, block_size: int) -> list[tuple[int, int]]:
    """Blocks of a request, and requests, of the batches of compressions that take most memory, within `batches`' bound.

    One has the longest tables, which a launch may exceed its bound for. The other has as many requests as may come at
    once, and tables as long as go with them: what is kept of each request over all layers grows with their number.
    """
    most = LAUNCH_ENTRIES // (runner.spec.num_kv_heads * block_size)
    longest = -(-runner.max_model_len // block_size)
    shortest = min(rule.kept_blocks + 1, longest)
    long, many = (max(1, min(runner.max_num_seqs, most // blocks)) for blocks in (longest, shortest))
    return [(longest, long), (max(shortest, min(longest, most // many)), many)]


def _peak_of(device: torch.device, run: Callable[[], None]) -> int:
    """What a second run takes above what is there before it: the first leaves behind what stays."""
    run()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def run_largest_step(runner: ModelRunner, cache: KVCache, num_tokens: int) -> None:
    """Prompts of `num_tokens` tokens in all, as many rows sampled as the batch may have, with every option on; in
    recurrent layers, prompts of so many rows.
    """
    length = min(num_tokens, runner.max_model_len)
    chunks = [length] * (num_tokens // length) + [num_tokens % length] * bool(num_tokens % length)
    entries = np.concatenate([np.arange(n) for n in chunks])
    tensor = partial(to_device, device=runner.device)
    if cache.tiled:
        layers, heads = runner.spec.num_layers, runner.spec.num_kv_heads
        tiles = np.arange(cache.k.shape[1]).reshape(layers * heads, -1)
        size = tiles.shape[1], cache.block_size, runner.device
        tables = TileTables(1, *size, num_layers=layers, num_heads=heads)
        tables.write(TableGrowth(0, 0, TileTable.of_columns(tiles)))
        tables.upload()
        attention = TiledAttention(
            cache,
            runner.spec.attention,
            tables,
            rows=tensor(np.zeros(num_tokens), dtype=np.int64),
            entries=tensor(entries, dtype=np.int64),
            positions=tensor(entries, dtype=np.int64),
            query_indices=None,
            num_decodes=0,
            width=tiles.shape[1],
            chunks=chunks,
        )
    else:
        slots, lens = tensor(entries, dtype=np.int64), tensor(chunks, dtype=np.int32)
        prefill_tables = tensor(np.tile(np.arange(cache.k.shape[1]), (len(chunks), 1)), dtype=np.int32)
        bounds = tensor(np.cumsum([0, *chunks]), dtype=np.int32)

        def prompts(cache: KVCache, group: LayerGroup) -> PagedAttention:
            chunks = {"prefill_tables": prefill_tables, "prefill_lens": lens, "cu_seqlens": bounds}
            return PagedAttention(cache, group.attention, slots, max_seqlen=length, forms=group.forms, **chunks)

        attention = runner.groups.over(cache, prompts)
    tokens = tensor(np.zeros(num_tokens), dtype=np.int64)
    rows = min(runner.max_num_seqs, num_tokens)
    recurrence = None
    if runner.recurrent is not None:
        # As many prompts as may be: each has a chunk of its own to compute, however short.
        states = tensor(np.arange(rows), dtype=np.int64)
        starts = tensor(np.arange(rows + 1) * num_tokens // rows, dtype=np.int32)
        recurrence = StepRecurrence(runner.recurrent, Spans(states[:0]), Spans(states, starts, states >= 0))
    hidden = runner.decoder(tokens, tensor(entries, dtype=np.int64), attention, recurrence=recurrence)
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "logit_bias": {0: 1.0}}
    every_option = SamplingParams(temperature=0.7, top_p=0.9, min_p=0.01, logprobs=MOST_LOGPROBS, **penalties)
    for row in range(rows):
        # Rows of two kinds are drawn apart, which takes a copy of their logits.
        params = every_option if row else SamplingParams(temperature=0.7)
        runner.sampler.begin(RowStart(row, params, num_prompt_tokens=1, token_ids=array("i", [0])))
    ones = np.ones(rows, dtype=np.int64)
    runner.sampler.sample(runner.decoder.logits(hidden[:rows]), np.arange(rows), ones, ones)


def run_compression(
    cache: KVCache,
    spec: ModelSpec,
    rule: EvictionRule,
    layer_stride: int | None,
    asynchronous: bool,
    num_blocks: int,
    num_requests: int,
    shard: Shard = WHOLE,
    model_heads: int | None = None,
    calibration: Mapping[str, Tensor] | None = None,
    outputs: OutputNorms | None = None,
    forms: Sequence[AttentionForm] | None = None,
) -> None:
    """Compress requests of `num_blocks` blocks in one batch.

    All read the first block that none writes, wherever they read, and write the same zeros into those before it: what a
    compression allocates depends on its shapes alone.
    """
    for x in (*cache.entry_tensors, *([] if cache.queries is None else [cache.queries])):
        x.zero_()
    num_entries = num_blocks * cache.block_size
    new_ids = list(range(min(rule.kept_blocks, num_blocks)))
    tables = [len(new_ids)] * num_blocks, new_ids
    if rule.allocation is not None:  # survivors stay in their lines' own first tiles
        lines = spec.num_layers * spec.num_kv_heads
        columns = np.minimum(np.arange(num_blocks), len(new_ids))
        tables = TileTable.of_columns(columns * lines + np.arange(lines)[:, None]), []
    orders = [
        CompressionOrder(number, rule, *tables, num_entries=num_entries, window_end=num_entries, query_slot=0)
        for number in range(num_requests)
    ]
    options = {
        "shard": shard,
        "model_heads": model_heads,
        "calibration": calibration,
        "outputs": outputs,
        "forms": forms,
    }
    runner = CompressionRunner(
        cache, spec, asynchronous=asynchronous, layer_stride=layer_stride, trace=False, **options
    )
    runner.submit(orders)
    results = runner.poll(wait=True)
    runner.close()
    for result in results:
        if result.error is not None:
            raise RuntimeError(f"the largest compression could not be measured: {result.error}")
