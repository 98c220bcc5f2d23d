"""Survivors are bit-equal after a move, in slot order, and nothing else is written."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from kernels.compact_stable import compact_stable_reference, compact_stable_torch
from kernels.compact_stable_triton import compact_stable_triton
from tests.kernels.events import make_event, scatter
from tests.kernels.grid import half
from tests.kernels.paged import BACKENDS, GARBAGE, device_of

STABLE = {"triton": compact_stable_triton, "torch": compact_stable_torch, "reference": compact_stable_reference}
ALL = [*BACKENDS, pytest.param("reference", torch.float32, id="reference")]

CASES = [
    pytest.param([40, 20, 0, 33], [32, 16, 32, 32], 16, 2, 2, 40, id="b16-d40"),
    pytest.param([300, 130], [192, 128], 64, 1, 1, 80, id="b64-d80"),
    pytest.param([70], [37], 16, 2, 3, 64, id="b16-odd-budget"),
    pytest.param([300, 10], [256, 10], 256, 1, 1, 32, id="b256-d32"),
]


def survivors(lens, keep):
    """Random kept slots, up to keep[r] of each of lens [L, R, H], ascending, then -1: int32 [L, R, H, max_keep]."""
    kept = torch.full((*lens.shape, max(keep) + 3), -1, dtype=torch.int32)
    for line in product(*map(range, lens.shape)):
        length = int(lens[line])
        count = min(keep[line[1]], length)
        kept[line][:count] = torch.randperm(length)[:count].sort().values.int()
    return kept


class Batch:
    """Caches, two states and an update for one of them, with what every slot held before."""

    def __init__(self, lens, keep, block_size, layers, heads, head_dim, dtype, device, spare=0, apart=False):
        self.event = event = make_event(lens, block_size, layers, heads, head_dim, dtype, device, spare, apart)
        shape = layers, len(lens), heads, event.width
        self.positions = scatter(torch.randint(0, 9999, shape, dtype=torch.int32), event).to(device)
        self.stored = scatter(torch.rand(shape), event).to(device)
        self.update = torch.rand(shape).to(device)
        self.kept = survivors(event.view.lens, keep).to(device)
        self.before = [x.clone() for x in self.written()]

    def written(self):
        return self.event.k_cache, self.event.v_cache, self.positions, self.stored

    def run(self, compact, dst_tables):
        """dst_tables [L, R, H, dst_blocks], or [R, dst_blocks] for all layers and heads."""
        dst_tables = self.event.shared(dst_tables) if dst_tables.dim() == 2 else dst_tables
        states = [self.positions, self.stored]
        compact(self.event.view, states, self.kept, dst_tables, updates=[None, self.update])

    def entries(self, tensors, layer, row, head, slots, tables):
        """What `tensors` (in the order of `written`) hold in a request's slots."""
        block_size = self.event.k_cache.shape[3]
        blocks = tables[layer, row, head].cpu()[[slot // block_size for slot in slots]].long()
        offsets = torch.tensor([slot % block_size for slot in slots], dtype=torch.long)
        return [x.cpu()[layer, blocks, head, offsets] for x in tensors]


def check(batch: Batch, tables) -> None:
    """`tables` are where the survivors are now, as in `Batch.run`."""
    tables = (batch.event.shared(tables) if tables.dim() == 2 else tables).cpu()
    block_size = batch.event.k_cache.shape[3]
    expected = [x.cpu().clone() for x in batch.before]
    for layer, row, head in torch.cartesian_prod(*map(torch.arange, batch.kept.shape[:3])).tolist():
        sources = [slot for slot in batch.kept[layer, row, head].tolist() if slot >= 0]
        if not sources:
            continue
        values = batch.entries(batch.before, layer, row, head, sources, batch.event.view.block_tables)
        values[3] = batch.update.cpu()[layer, row, head, sources]
        for index in range(len(sources)):
            block = int(tables[layer, row, head, index // block_size])
            if block >= 0:
                for x, value in zip(expected, values):
                    x[layer, block, head, index % block_size] = value[index]
    for x, y in zip(batch.written(), expected):
        torch.testing.assert_close(x.cpu(), y, rtol=0, atol=0, equal_nan=True)


@half(
    (("backend", "dtype"), ALL),
    (("lens", "keep", "block_size", "layers", "heads", "head_dim"), CASES),
    ("apart", [pytest.param(False, id="shared"), pytest.param(True, id="apart")]),
)
def test_stable_in_place(backend, dtype, apart, lens, keep, block_size, layers, heads, head_dim):
    device, heads = device_of(backend), heads + apart
    batch = Batch(lens, keep, block_size, layers, heads, head_dim, dtype, device, apart=apart)
    tables = batch.event.view.block_tables[..., : -(-max(keep) // block_size) + 1]
    batch.run(STABLE[backend], tables)
    check(batch, tables)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_each_head_packs_into_blocks_of_its_own(backend):
    """Out of shared blocks: the destinations differ by layer and head, the sources do not."""
    batch = Batch([60, 33], [32, 16], 16, 2, 2, 32, torch.float32, device_of(backend), spare=16)
    dst = batch.event.free.view(2, 2, 2, 2)
    batch.run(STABLE[backend], dst)
    check(batch, dst)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_two_requests_that_share_their_first_blocks(backend):
    """One packs into other blocks, the other too; then each has what it would have alone, the shared blocks theirs."""
    batch = Batch([60, 60], [32, 32], 16, 2, 2, 32, torch.float32, device_of(backend), spare=4)
    tables = batch.event.view.block_tables[0, :, 0].clone()
    tables[1, :2] = tables[0, :2]
    batch.event = replace(batch.event, view=batch.event.view._replace(block_tables=batch.event.shared(tables)))
    dst = batch.event.free.view(2, 2)
    batch.run(STABLE[backend], dst)
    check(batch, dst)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_shared_blocks_kept_whole_are_left_alone(backend):
    """A protected prompt of two blocks that others share: -1 in the destination; the states there stay as well."""
    batch = Batch([75], [64], 16, 2, 2, 32, torch.float32, device_of(backend))
    kept = batch.kept.clone()
    kept[..., :32] = torch.arange(32)
    kept[..., 32:64] = torch.stack([32 + torch.randperm(43)[:32].sort().values for _ in range(4)]).view(2, 1, 2, 32)
    batch.kept = kept
    dst = batch.event.view.block_tables[0, :, 0, :4].clone()
    dst[0, :2] = -1
    batch.run(STABLE[backend], dst)
    check(batch, dst.cpu())


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_destinations_may_be_earlier_blocks_of_the_source(backend):
    """The first block goes to its sharers: slots 0-15 move to a new block, the others to the request's own, in turn."""
    batch = Batch([64], [48], 16, 1, 2, 32, torch.float32, device_of(backend), spare=1)
    source = batch.event.view.block_tables[0, 0, 0]
    dst = torch.stack((batch.event.free[0], source[1], source[2]))[None]
    batch.run(STABLE[backend], dst)
    check(batch, dst.cpu())


def test_stable_walks_in_steps_and_never_reads_garbage_tables():
    """More entries than a program moves at a time, in place, where every step overwrites what the next one holds."""
    batch = Batch([700], [512], 64, 1, 1, 16, torch.float32, device_of("triton"))
    tables = batch.event.view.block_tables[0, :, 0, :9].clone()
    tables[:, 8:] = GARBAGE
    batch.run(compact_stable_triton, tables)
    check(batch, tables.cpu())
