"""A fabricated model that notices every wrong entry."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from tests.scheduling.fabricated import EOS
from tests.scheduling.fabricated_memory import FabricatedMemory
from tests.scheduling.fabricated_sliding import FabricatedSliding
from tests.scheduling.shadow import Shadow, after, after_eviction, survivors
from zipage.scheduling.batch import Batch
from zipage.scheduling.compression import Compression
from zipage.scheduling.plan import Restore, Save
from zipage.scheduling.planner import plan_step
from zipage.scheduling.request import Request, Status
from zipage.scheduling.scheduler import Scheduler
from zipage.scheduling.triggers import Pressure


@dataclass(eq=False)
class _Flight:
    order: Compression
    steps_left: int
    write_in: int
    kept_blocks: list[int] | None = None
    entries: list[int] | None = None


@dataclass
class FabricatedModel(FabricatedMemory):
    """Stands in for runner, compressor and swap: keeps, per physical slot, what the entry in it was computed from.

    Where a batch and its plan say the same, it goes by the plan, as the worker does.

    Whatever a request reads over its block table is compared with its shadow. Blocks that nobody may read any more are
    poisoned, so that a stale, foreign, overwritten or lost entry shows.

    Attributes:
        max_delay: compressions are completed up to this many steps after their order; 0: at once.
        orders: compressions are ordered behind every step, as the engine does; else when a test says so.
        overlaps: a step's tokens are booked once the next step is under way.
        events: how often what happened.
        compressed: (request, entries, blocks) of each order.
    """

    scheduler: Scheduler
    seed: int = 0
    max_delay: int = 0
    orders: bool = True
    overlaps: bool = False
    events: Counter = field(default_factory=Counter)
    compressed: list[tuple[Request, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        pool = self.scheduler.pool
        super().__init__(pool)
        self.tables: list[list[int]] = [[0] * pool.num_blocks for _ in range(self.scheduler.max_num_seqs)]
        self.rings: list[dict[int, tuple[int, int]]] = [{} for _ in range(self.scheduler.slots.num_slots)]
        self.shadows: dict[int, Shadow] = {}
        self.host_copies: dict[int, tuple[list[list[int | None]], dict | None]] = {}
        self.flights: list[_Flight] = []
        self.rng = random.Random(self.seed)
        self.sliding = None if self.scheduler.sliding is None else FabricatedSliding(self.scheduler, self.events)
        self._under_way: tuple[Batch, list[int]] | None = None

    def shadow(self, request: Request) -> Shadow:
        return self.shadows.setdefault(request.number, Shadow())

    # A step

    def step(self, eos_share: float = 0.0) -> tuple[Batch, list[Request]]:
        self.poll()
        batch = self.schedule()
        return batch, self.execute(batch, eos_share)

    def poll(self) -> None:
        """Bring on the compressions under way."""
        for flight in self.flights.copy():
            self._advance(flight)

    def compress(self) -> int:
        """Order compressions; those without delay are done at once. Returns how many were ordered."""
        orders = self.scheduler.order_compressions()
        self.events["deferrals"] += sum(map(self.scheduler.trigger.is_deferred, self.scheduler.running))
        self._poison_fresh()
        for order in orders:
            flight = self._begin(order)
            if not self.max_delay:
                self._advance(flight)
        return len(orders)

    def execute(self, batch: Batch, eos_share: float = 0.0) -> list[Request]:
        """Carry out a batch and book it. Returns the requests that ended."""
        plan = plan_step(batch, self.scheduler.take_dropped())
        self._drop(plan.drops)
        for swap, save in zip(batch.paused, plan.saves, strict=True):
            self.save(swap.request, save)
        for preemption in batch.preempted:
            self.shadow(preemption.request).forget()
            if self.sliding is not None:
                self.sliding.forget(preemption.request.number)
        fresh = set(self._fresh)
        self._poison_fresh()
        for swap, restore in zip(batch.resumed, plan.restores, strict=True):
            self._restore(swap.request, restore, fresh)
        for src, dst in batch.copies:
            self._assert_writable(dst)
            self.cells[dst] = self.cells[src].copy()
        if self.sliding is not None:
            self.sliding.begin(plan)
        self._bind_slots()
        for row, first, block_ids in plan.tables:
            self.tables[row][first : first + len(block_ids)] = block_ids
        assert [start.row for start in plan.starts] == [request.row for request in batch.entered]
        assert all(request.num_tokens - request.num_computed == 1 for request in batch.decodes)
        assert plan.num_decodes == len(batch.decodes)
        requests = batch.decodes + [chunk.request for chunk in batch.prefills]
        tokens = plan.token_ids.tolist()
        columns = (plan.rows, plan.counts, plan.positions, plan.lens, plan.query_slots, plan.token_rows)
        for request, *numbers in zip(requests, *(column.tolist() for column in columns), strict=True):
            row, count, position, length, query_slot, token_row = numbers
            assert (position, length) == (request.num_computed, request.cache_len)
            known, tokens = tokens[:count], tokens[count:]
            if token_row >= 0:
                before, sampled = self._under_way
                assert before.sampled[token_row] is request
                known = [sampled[token_row]]
            self._compute(request, row, known, query_slot)
        assert not tokens
        assert [r for r, samples in zip(requests, plan.samples, strict=True) if samples] == batch.sampled
        self.scheduler.advance(batch)
        if self.orders:
            changes = self.flights or self._under_way or not batch.is_empty or not self.scheduler.has_unfinished
            assert self.compress() or changes, "nothing runs, nothing will change"
        rng = self.rng
        tokens = [EOS if eos_share and rng.random() < eos_share else rng.randrange(10, 1000) for _ in batch.sampled]
        finished = self.settle()
        self._under_way = batch, tokens
        if not self.overlaps:
            finished = self.settle()
        self.check()
        return finished

    def settle(self) -> list[Request]:
        """Book the tokens of the step under way."""
        if self._under_way is None:
            return []
        (batch, tokens), self._under_way = self._under_way, None
        ended = sum(request.finish_reason is not None for request in batch.sampled)
        self.events["tokens_dropped"] += ended
        return self.scheduler.update(batch, tokens)

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        self._poison_dead()
        if self.sliding is not None:
            self.sliding.poison_dead()
        by_pressure = isinstance(scheduler.trigger, Pressure)
        for request in scheduler.running:
            shadow = self.shadow(request)
            num_known = request.num_tokens - request.num_pending
            assert num_known >= shadow.num_tokens, f"{request}: forgot tokens"
            shadow.num_tokens = num_known
            rule = request.rule
            if rule is not None and not by_pressure:
                blocks = rule.max_blocks
                if not shadow.rounds:
                    blocks = max(blocks, -(-request.num_prompt_tokens // self.size))
                assert request.cache_len <= blocks * self.size, f"{request}: over its bound"
                assert len(request.block_ids) <= blocks, f"{request}: owns too much"

    def _compute(self, request: Request, row: int, tokens: list[int], query_slot: int) -> None:
        assert request.status is Status.RUNNING
        shadow = self.shadow(request)
        size, cells = self.size, self.cells
        n, position = request.cache_len, request.num_computed
        entries = shadow.entries
        if not entries and n:
            assert shadow.rounds == 0
            previous = 0
            for token in request.token_ids[:n]:
                previous = after(previous, token)
                entries.append(previous)
            shadow.num_computed = n
            self.events["prefix_hits"] += 1
        assert position == shadow.num_computed, f"{request}: position {position} after {shadow.num_computed}"
        assert n == len(entries), f"{request}: {n} entries, should be {len(entries)}"
        table = self.tables[row]
        seen = self._read(table, n)
        assert seen == entries, f"{request}: reads wrong entries"
        ring = self.rings[query_slot] if query_slot >= 0 else None
        writable = -1
        for i, token in enumerate(tokens):
            block, offset = table[(n + i) // size], (n + i) % size
            if block != writable:
                self._assert_writable(block)
                writable = block
            if shadow.rounds:
                value = after_eviction(position + i, token, seen)
            else:
                value = after(seen[-1] if seen else 0, token)
            cells[block][offset] = value
            seen.append(value)
            entries.append(value)
            if ring is not None:
                ring[(position + i) % request.rule.window] = (request.number, position + i)
        shadow.num_computed += len(tokens)
        if self.sliding is not None:
            self.sliding.compute(request, row, entries[len(entries) - len(tokens) :])

    # Query slots

    def _bind_slots(self) -> None:
        """Whoever got a slot finds nothing of use in it."""
        for request in self.scheduler.running:
            if request.query_slot >= 0:
                shadow = self.shadow(request)
                if shadow.slot != request.query_slot:
                    shadow.slot = request.query_slot
                    self.rings[request.query_slot] = {}
            elif request.rule is not None:
                self.shadow(request).slot = -1

    # Swaps

    def save(self, request: Request, swap: Save) -> None:
        shadow = self.shadow(request)
        assert swap.number not in self.host_copies, f"{request}: paused twice"
        assert self._read(swap.block_ids, request.cache_len) == shadow.entries, f"{request}: saves wrong entries"
        ring = None
        if swap.query_slot >= 0:
            ring = self.rings[swap.query_slot].copy() if shadow.slot == swap.query_slot else {}
        self.host_copies[swap.number] = [self.cells[block].copy() for block in swap.block_ids], ring
        shadow.slot = -1
        if self.sliding is not None:
            self.sliding.save(swap)

    def _restore(self, request: Request, swap: Restore, fresh: set[int]) -> None:
        shadow = self.shadow(request)
        cells, ring = self.host_copies.pop(swap.number)
        assert len(cells) == len(swap.block_ids)
        for place, (block, saved) in enumerate(zip(swap.block_ids, cells)):
            if place < swap.num_shared:
                assert self.cells[block] == saved, f"{request}: block {block} was to be unchanged"
            else:
                # A sample admitted by the same batch may share it already: it reads after this.
                assert block in fresh, f"wrote into block {block}"
                assert not self.pool.is_indexed(block), f"wrote into block {block}"
                self.cells[block] = saved.copy()
        assert (swap.query_slot >= 0) == (ring is not None), f"{request}: its queries and its slot don't fit"
        if ring is not None:
            self.rings[swap.query_slot] = ring
            shadow.slot = swap.query_slot
        self.events["resumes"] += 1
        self.events["resumes_with_shared_blocks"] += swap.num_shared > 0

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            del self.host_copies[number]
            if self.sliding is not None:
                self.sliding.forget(number)

    # Compressions

    def _begin(self, order: Compression) -> _Flight:
        request, rule, size = order.request, order.request.rule, self.size
        n = request.cache_len
        shadow = self.shadow(request)
        assert n == len(shadow.entries)
        assert n > rule.keep, f"{request}: nothing to evict"
        if not isinstance(self.scheduler.trigger, Pressure):
            most = rule.max_blocks * size
            if not shadow.rounds:
                most = max(rule.max_blocks, -(-request.num_prompt_tokens // size)) * size
            assert n == most, f"{request}: compressed at {n} entries, should be {most}"
        delay = self.rng.randint(0, self.max_delay)
        flight = _Flight(order, delay, self.rng.randint(0, delay))
        self.flights.append(flight)
        self.compressed.append((request, n, len(order.block_ids)))
        self.events["compressions"] += 1
        self.events["pinned_shared"] += any(self.pool.ref_counts[b] > 1 for b in order.block_ids[: rule.pinned_blocks])
        self.events["moved_off_shared"] += bool(order.fresh)
        self.events["recomputed_then_compressed"] += request.num_preemptions > 0 and not shadow.rounds
        return flight

    def _advance(self, flight: _Flight) -> None:
        if flight.write_in == 0:
            self._write_survivors(flight)
        if flight.steps_left == 0:
            self._complete(flight)
        flight.write_in -= 1
        flight.steps_left -= 1

    def _write_survivors(self, flight: _Flight) -> None:
        order = flight.order
        request, rule, size = order.request, order.request.rule, self.size
        shadow = self.shadow(request)
        n = request.cache_len
        source = self._read(order.block_ids, n)
        assert source == shadow.entries, f"{request}: its entries changed before they were compressed"
        if rule.window:
            end = request.num_computed
            wanted = {p % rule.window: (request.number, p) for p in range(end - rule.window, end)}
            assert shadow.slot == request.query_slot
            assert self.rings[request.query_slot] == wanted, f"{request}: the queries of its window are not all there"
        kept = survivors(request, n, shadow.rounds)
        entries = [source[i] for i in kept]
        if rule.drops_blocks:
            flight.kept_blocks = [i // size for i in kept[::size]]
        else:
            pinned = rule.pinned_blocks
            assert kept[: pinned * size] == list(range(pinned * size))
            assert order.new_ids[:pinned] == order.block_ids[:pinned]
            assert len(order.new_ids) * size == len(entries)
            for place in range(pinned, len(order.new_ids)):
                self._assert_writable(order.new_ids[place])
                self.cells[order.new_ids[place]] = entries[place * size : (place + 1) * size]
        flight.entries = entries

    def _complete(self, flight: _Flight) -> None:
        self.flights.remove(flight)
        order = flight.order
        request, shadow = order.request, self.shadow(order.request)
        before = request.cache_len, len(order.block_ids)
        done = self.scheduler.complete(order.number, flight.kept_blocks)
        assert (done.request, done.round) == (request, shadow.rounds)
        assert (done.entries_before, done.blocks_before) == before
        assert done.entries_after == len(flight.entries) == done.blocks_after * self.size
        shadow.entries = flight.entries
        shadow.rounds += 1
        assert request.num_compressions == shadow.rounds
        if request.status is Status.FINISHED:
            self.events["ended_while_compressing"] += 1
            return
        assert request.cache_len == len(shadow.entries) == len(request.block_ids) * self.size
        assert self._read(request.block_ids, request.cache_len) == shadow.entries

    def abort(self, request: Request) -> None:
        self.scheduler.finish([request], "abort")

    def pause(self, request: Request, batch: Batch | None = None) -> None:
        """Pause a request that this step doesn't run: with a batch still to be executed, or at once."""
        self.scheduler.pause(request, batch or (now := Batch()))
        if batch is None:
            self.save(request, plan_step(now).saves[0])

    # Rules of scheduling

    def schedule(self) -> Batch:
        """The scheduler's batch, checked against its rules."""
        scheduler = self.scheduler
        running = list(scheduler.running)
        if not scheduler.has_unfinished:
            return scheduler.schedule()
        slots = {request.number: request.query_slot for request in running}
        oldest = min((queue[0] for queue in (running, scheduler.waiting) if queue), key=lambda r: r.number)
        batch = scheduler.schedule()
        events = self.events
        events["empty"] += batch.is_empty
        assert batch.num_tokens <= scheduler.max_num_batched_tokens
        computed = [r.number for r in batch.decodes] + [c.request.number for c in batch.prefills]
        assert len(set(computed)) == len(computed), "a request runs twice in one step"
        assert all(chunk.num_tokens > 0 for chunk in batch.prefills)
        left = [swap.request for swap in batch.paused] + [preemption.request for preemption in batch.preempted]
        if oldest in left:
            alone = running == [oldest] and isinstance(scheduler.trigger, Pressure)
            assert alone, "the oldest request left for another"
        for swap in batch.resumed:
            # One that was never compressed may share all its blocks, so that it needs none to come back.
            assert swap.request not in left or not swap.request.num_compressions, "paused and resumed by one batch"
        numbers = [request.number for request in scheduler.waiting]
        assert numbers == sorted(numbers), "the queue is out of order"
        self._check_entered(slots, batch)
        events["pauses"] += len(batch.paused)
        swap_space, copied = scheduler.swap_space, [not swap.request.num_compressions for swap in batch.paused]
        events["copied_instead_of_computed"] += sum(copied)
        events["swap_space_full"] += bool(batch.preempted) and 0 < swap_space.num_slabs <= swap_space.num_used
        if copied and all(copied):
            assert swap_space.num_used <= swap_space.num_slabs
        events["preemptions"] += len(batch.preempted)
        events["stalls"] += batch.num_stalled
        events["left_and_returned_at_once"] += sum(request.status is Status.RUNNING for request in left)
        return batch

    def _check_entered(self, slots: dict[int, int], batch: Batch) -> None:
        """Nobody is overtaken, but for samples that wait for their prompt; and no slot goes past an older request that
        needs one.
        """
        scheduler = self.scheduler
        entered = [chunk.request for chunk in batch.prefills if chunk.request.number not in slots]
        resumed = [swap.request for swap in batch.resumed]
        for request in scheduler.waiting:
            if any(other.number > request.number for other in entered + resumed):
                assert any(s.status is Status.RUNNING for s in request.siblings if s is not request), "overtaken"
        got = [r.number for r in scheduler.running if r.query_slot >= 0 and slots.get(r.number) != r.query_slot]
        for request in scheduler.running:
            if request.number in slots and request.query_slot < 0 and scheduler.slots.wanted_by(request):
                self.events["lent"] += slots[request.number] >= 0
                decodes = request.status is Status.RUNNING and len(request.token_ids) - request.num_computed == 1
                decodes = decodes and not request.has_all_tokens
                if got and decodes and scheduler.trigger.has_come_to_window(request):
                    assert request.number > max(got), "a slot went past an older request that needs it"

    def run(self, max_steps: int = 10_000, eos_share: float = 0.0) -> list[Batch]:
        plans = []
        while self.scheduler.has_unfinished:
            assert len(plans) < max_steps, "no end in sight"
            plans.append(self.step(eos_share)[0])
        self.check_all_returned()
        return plans

    def check_all_returned(self) -> None:
        self.settle()
        scheduler = self.scheduler
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
        assert not any(scheduler.pool.ref_counts)
        assert len(scheduler._rows) == scheduler.max_num_seqs
        assert scheduler.slots.num_used == 0
        assert not scheduler.compressions.in_flight
        self._drop(scheduler.take_dropped())
        assert (scheduler.swap_space.num_used > 0) == bool(self.host_copies)
