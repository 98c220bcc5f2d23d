"""An engine's cache, the requests in it and their simulations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from kernels.cache_view import shared
from kernels.store_kv import store_kv
from kernels.store_positions import store_positions
from kernels.store_step import store_step
from tests.eviction.dense_event import Tokens, make_tokens
from tests.eviction.dense_simulation import Simulation
from zipage.eviction import registry
from zipage.eviction.budget import Budget
from zipage.eviction.protection import Protection
from zipage.eviction.rule import EvictionRule
from zipage.sampling_params import SamplingParams
from zipage.scheduling.compression import Compression
from zipage.scheduling.plan import CompressionOrder
from zipage.scheduling.planner import plan_compression
from zipage.scheduling.request import Request
from zipage.worker.compression_runner import CompressionResult, CompressionRunner
from zipage.worker.kv_cache import KVCache

SPEC = SimpleNamespace(
    num_layers=2,
    sliding_layers=(),
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    attention=(SimpleNamespace(scale=32**-0.5, soft_cap=None),) * 2,
    inv_freq=(1.0,) * 16,
    rope_attention_factor=1.0,
)
BLOCK_SIZE, RECENT, WINDOW = 16, 16, 16
BUDGET = Budget.from_tokens(64, BLOCK_SIZE)
SEED_STEP = 0xD1342543DE82EF95
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()

NUMBERS = count()

on_every_device = pytest.mark.parametrize("device", DEVICES)
either_way = pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])

CASES = {
    "zipage": ("zipage", {"chunk": 32}, "none"),
    "zipage-prompt": ("zipage", {"chunk": 32, "pooling": "always"}, "prompt"),
    "random": ("random", {}, "none"),
    "random-prompt": ("random", {}, "prompt"),
    "h2o": ("h2o", {}, "sink:37"),
    "page_random": ("page_random", {"page_size": 16}, "none"),
    "page_attention": ("page_attention", {"page_size": 16}, "prompt"),
}
every_case = pytest.mark.parametrize("case", CASES)


@dataclass(eq=False)
class Serving:
    """A poisoned cache, the requests in it and their simulations: what an engine does around its compressions."""

    device: str = "cpu"
    asynchronous: bool = False
    trace: bool = False
    layer_stride: int | None = None
    debug: bool = False
    all_tokens: dict[Request, Tokens] = field(default_factory=dict)
    simulations: dict[Request, Simulation] = field(default_factory=dict)
    ordered: dict[int, Request] = field(default_factory=dict)

    def __post_init__(self):
        options = {"positions": True, "scores": True, "num_query_slots": 8, "window": WINDOW}
        self.cache = KVCache(SPEC, 100, BLOCK_SIZE, torch.float32, torch.device(self.device), **options)
        self.cache.poison(slice(None))
        self.cache.poison_queries(slice(None))
        self.free = torch.randperm(100).tolist()
        self.runner = CompressionRunner(
            self.cache,
            SPEC,
            asynchronous=self.asynchronous,
            layer_stride=self.layer_stride,
            trace=self.trace,
            debug=self.debug,
        )

    def add(self, case: str, seed: int, prompt_len: int = 40, index: int = 0) -> Request:
        name, options, protection = CASES[case]
        tokens = make_tokens(seed, prompt_len=prompt_len)
        policy = registry.make(name, options)
        rule = EvictionRule.of(policy, BUDGET, Protection.parse(protection), RECENT, prompt_len)
        request = Request(
            case, [0] * prompt_len, SamplingParams(), index=index, seed=tokens.seed, max_total_tokens=999, rule=rule
        )
        request.query_slot = len(self.all_tokens)
        self.all_tokens[request] = tokens
        self.simulations[request] = Simulation(
            policy=name,
            options=options,
            keys=tokens.keys.double().numpy(),
            values=tokens.values.double().numpy(),
            queries=tokens.queries.double().numpy(),
            seed=(tokens.seed + index * SEED_STEP) % 2**63,
            prompt_len=prompt_len,
            keep=BUDGET.keep,
            recent=RECENT,
            protection=protection,
        )
        return request

    def grow(self, request: Request, n: int) -> None:
        """Compute the tokens that bring `request` to `n` entries."""
        while len(request.block_ids) * BLOCK_SIZE < n:
            request.block_ids.append(self.free.pop())
        new = torch.arange(request.num_computed, request.num_computed + n - request.cache_len)
        at = torch.arange(request.cache_len, n)
        slots = torch.tensor(request.block_ids)[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        places = request.query_slot * WINDOW + new % WINDOW
        places[:-WINDOW] = -1
        slots, places = slots.to(self.device), places.to(self.device)
        tokens, cache = self.all_tokens[request], self.cache
        each = shared(slots, SPEC.num_kv_heads)
        for layer in range(SPEC.num_layers):
            k, v = (x[layer][:, new].transpose(0, 1).contiguous().to(self.device) for x in (tokens.keys, tokens.values))
            if request.rule.window:
                q = tokens.queries[layer, new].to(self.device)
                store_step(k, v, q, cache.k[layer], cache.v[layer], cache.queries[layer], each, places)
            else:
                store_kv(k, v, cache.k[layer], cache.v[layer], each)
        store_positions(new.int().to(self.device), cache.positions, shared(slots, SPEC.num_kv_heads, SPEC.num_layers))
        request.num_computed += len(new)
        request.cache_len = n

    def order(self, request: Request) -> CompressionOrder:
        """Into fresh blocks; those of protected entries alone stay."""
        rule, number = request.rule, next(NUMBERS)
        self.ordered[number] = request
        fresh, new_ids = [], []
        if not rule.drops_blocks:
            fresh = [self.free.pop() for _ in range(BUDGET.max_blocks - 1 - rule.pinned_blocks)]
            new_ids = request.block_ids[: rule.pinned_blocks] + fresh
        return plan_compression(Compression(number, request, request.block_ids, new_ids, fresh))

    def request_of(self, result: CompressionResult) -> Request:
        return self.ordered[result.order.number]

    def apply(self, result: CompressionResult) -> None:
        """Give the request its new table; what it left is poisoned."""
        order, request = result.order, self.request_of(result)
        kept = order.new_ids
        if request.rule.drops_blocks:
            kept = [order.block_ids[page] for page in result.kept_pages]
        for block in set(order.block_ids) - set(kept):
            self.cache.poison(block)
            self.free.insert(0, block)
        request.block_ids = list(kept)
        request.cache_len = request.rule.keep
        request.num_compressions += 1

    def compress(self, requests: Sequence[Request]) -> list[CompressionResult]:
        self.runner.submit([self.order(request) for request in requests])
        results = self.runner.poll(wait=True)
        for result in results:
            self.apply(result)
        return results

    def entries(self, request: Request) -> list[torch.Tensor]:
        """K and V [L, H, n, d] and positions [L, H, n], on the CPU."""
        cache = self.cache
        tensors = cache.k, cache.v, cache.positions
        return [x[:, request.block_ids].transpose(1, 2).flatten(2, 3)[:, :, : request.cache_len].cpu() for x in tensors]

    def check(self, request: Request, n: int) -> None:
        """The request holds what its simulation keeps of n entries."""
        (expected,) = self.simulations[request].run([n])
        tokens = self.all_tokens[request]
        k, v, positions = self.entries(request)
        for (layer, head), kept in expected.items():
            assert positions[layer, head].tolist() == kept, (request, layer, head)
            assert torch.equal(k[layer, head], tokens.keys[layer, head, kept])
            assert torch.equal(v[layer, head], tokens.values[layer, head, kept])
