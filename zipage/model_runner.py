"""A step's plan to tensors, through the model, to tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.dispatch import copy_blocks
from zipage.kv_cache import KVCache
from zipage.model.decoder import Decoder
from zipage.model.spec import ModelSpec
from zipage.paged_attention import PagedAttention
from zipage.request import Request
from zipage.sampler import Sampler
from zipage.sampling_params import SamplingParams
from zipage.scheduler import StepPlan


@dataclass(slots=True)
class StepResult:
    """Tokens (and log-probabilities where asked for) of `plan.sampled`; seconds on the device."""

    token_ids: list[int]
    logprobs: list[float] | None
    device_time: float


class ModelRunner:
    """Runs plans over one model and one cache.

    Args:
        decoder: the model, on `device`.
        spec: its shapes.
        max_num_seqs: rows of the batch.
        max_model_len: longest request, in tokens; sizes the block-table rows.
    """

    def __init__(
        self, decoder: Decoder, spec: ModelSpec, device: torch.device, *, max_num_seqs: int, max_model_len: int
    ) -> None:
        self.decoder = decoder
        self.spec = spec
        self.device = device
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.sampler = Sampler(max_num_seqs, spec.vocab_size, device)
        self.scale = spec.head_dim**-0.5
        self.cache: KVCache | None = None
        self._tables = np.zeros((0, 0), dtype=np.int32)
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def attach(self, cache: KVCache) -> None:
        """Use `cache` from now on."""
        self.cache = cache
        columns = -(-self.max_model_len // cache.block_size)
        self._tables = np.zeros((self.max_num_seqs, columns), dtype=np.int32)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step. Waits for its tokens."""
        if self.device.type == "cuda":
            self._events[0].record()
        start = time.perf_counter()
        if plan.copies:
            src, dst = np.array(plan.copies, dtype=np.int64).T
            copy_blocks(self.cache.k, self.cache.v, self._tensor(src), self._tensor(dst))
        logits = self.forward(plan)
        tokens, logprobs = self.sampler.sample(logits, plan.sampled) if plan.sampled else (logits.new_empty(0), None)
        if self.device.type == "cuda":
            self._events[1].record()
        token_ids = tokens.tolist()
        logprob_list = None if logprobs is None else logprobs.tolist()
        if self.device.type == "cuda":
            self._events[1].synchronize()
            device_time = self._events[0].elapsed_time(self._events[1]) / 1000
        else:
            device_time = time.perf_counter() - start
        return StepResult(token_ids, logprob_list, device_time)

    def forward(self, plan: StepPlan) -> Tensor:
        """Logits [len(plan.sampled), vocab] of a plan's requests."""
        token_ids, positions, last, attention = self._batch(plan)
        hidden = self.decoder(token_ids, positions, attention)
        return self.decoder.logits(hidden if last is None else hidden[last])

    def _batch(self, plan: StepPlan) -> tuple[Tensor, Tensor, Tensor | None, PagedAttention]:
        size = self.cache.block_size
        decodes, prefills = plan.decodes, plan.prefills
        for request in decodes:
            if request.num_table_written != len(request.block_ids):
                self._write_table(request)
        tokens = [request.token_ids[-1] for request in decodes]
        positions = [request.num_computed for request in decodes]
        lens = np.array([request.cache_len for request in decodes], dtype=np.int64)
        rows = np.array([request.row for request in decodes], dtype=np.int64)
        slots = self._tables[rows, lens // size].astype(np.int64) * size + lens % size
        attention = PagedAttention(self.cache, self.scale, slots=None, num_decodes=len(decodes))
        if decodes:
            attention.decode_lens = self._tensor(lens + 1, np.int32)
            attention.decode_tables = self._tensor(self._tables[rows, : int(lens.max()) // size + 1])
        if not prefills:
            attention.slots = self._tensor(slots)
            return self._tensor(tokens, np.int64), self._tensor(positions, np.int64), None, attention

        slot_parts = [slots]
        last = list(range(len(decodes)))
        cu_seqlens, prefill_lens = [0], []
        for request, num_tokens in prefills:
            self._write_table(request)
            begin = request.num_computed
            tokens += request.token_ids[begin : begin + num_tokens]
            positions += range(begin, begin + num_tokens)
            entries = np.arange(request.cache_len, request.cache_len + num_tokens)
            slot_parts.append(self._tables[request.row, entries // size].astype(np.int64) * size + entries % size)
            cu_seqlens.append(cu_seqlens[-1] + num_tokens)
            prefill_lens.append(request.cache_len + num_tokens)
            if begin + num_tokens == request.num_tokens:
                last.append(len(tokens) - 1)
        rows = [chunk.request.row for chunk in prefills]
        attention.slots = self._tensor(np.concatenate(slot_parts))
        attention.prefill_tables = self._tensor(self._tables[rows, : -(-max(prefill_lens) // size)])
        attention.prefill_lens = self._tensor(prefill_lens, np.int32)
        attention.cu_seqlens = self._tensor(cu_seqlens, np.int32)
        attention.max_seqlen = max(chunk.num_tokens for chunk in prefills)
        return (
            self._tensor(tokens, np.int64),
            self._tensor(positions, np.int64),
            self._tensor(last, np.int64),
            attention,
        )

    def _write_table(self, request: Request) -> None:
        begin = request.num_table_written
        self._tables[request.row, begin : len(request.block_ids)] = request.block_ids[begin:]
        request.num_table_written = len(request.block_ids)

    def _tensor(self, values: list | np.ndarray, dtype: type | None = None) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
        if self.device.type == "cuda":
            return host.pin_memory().to(self.device, non_blocking=True)
        return host

    @torch.inference_mode()
    def measure_peak(self, num_tokens: int, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that the largest step takes above what is allocated now (CUDA).

        Runs prompts of `num_tokens` tokens in all through model and sampler on a small cache of its own, with as many
        rows sampled as the batch may have and every sampling option on.
        """
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        length = min(num_tokens, self.max_model_len)
        num_blocks = -(-length // block_size)
        cache = KVCache(self.spec, num_blocks, block_size, dtype, self.device)
        cache_bytes = torch.cuda.memory_allocated(self.device) - before
        chunks = [length] * (num_tokens // length) + [num_tokens % length] * bool(num_tokens % length)
        entries = np.concatenate([np.arange(n) for n in chunks])
        attention = PagedAttention(
            cache,
            self.scale,
            slots=self._tensor(entries, np.int64),
            prefill_tables=self._tensor(np.tile(np.arange(num_blocks), (len(chunks), 1)), np.int32),
            prefill_lens=self._tensor(chunks, np.int32),
            cu_seqlens=self._tensor(np.cumsum([0, *chunks]), np.int32),
            max_seqlen=length,
        )
        tokens = self._tensor(np.zeros(num_tokens), np.int64)
        hidden = self.decoder(tokens, self._tensor(entries, np.int64), attention)
        rows = min(self.max_num_seqs, num_tokens)
        params = SamplingParams(temperature=0.7, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=True)
        requests = [Request("peak", [0], params, max_total_tokens=2) for _ in range(rows)]
        for row, request in enumerate(requests):
            request.row = row
        sampler = Sampler(self.max_num_seqs, self.spec.vocab_size, self.device)
        sampler.sample(self.decoder.logits(hidden[:rows]), requests)
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before - cache_bytes
        del cache, attention, hidden, sampler, tokens
        torch.cuda.empty_cache()
        return peak
