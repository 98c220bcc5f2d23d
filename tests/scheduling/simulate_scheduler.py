"""Random loads over random configurations of the scheduler, with a fabricated model that notices every wrong entry.

python -m tests.scheduling.simulate_scheduler --steps 100000 --out FILE    # writes a JSON record
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.scheduling.fabricated import StubPolicy, make_samples
from tests.scheduling.fabricated_model import FabricatedModel
from zipage.eviction.budget import Budget
from zipage.eviction.protection import Protection
from zipage.eviction.rule import EvictionRule
from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.request import Request, Status
from zipage.scheduling.scheduler import Scheduler
from zipage.scheduling.sliding_blocks import SlidingBlocks
from zipage.scheduling.swap_space import SwapCosts, SwapSpace
from zipage.sliding_table import most_blocks

MUST_OCCUR = (
    "aborts",
    "aborts_while_compressing",
    "aborts_while_paused",
    "compressions",
    "copied_instead_of_computed",
    "deferrals",
    "lent",
    "ended_while_compressing",
    "forced_pauses",
    "moved_off_shared",
    "pauses",
    "pinned_shared",
    "preemptions",
    "prefix_hits",
    "recomputed_then_compressed",
    "resumes",
    "resumes_with_shared_blocks",
    "sliding_copies",
    "sliding_prefix_cut",
    "sliding_prefix_shared",
    "stalls",
    "swap_space_full",
    "tokens_dropped",
)
"""Events without which a run of some thousand steps has tested nothing."""

LONGEST_WAIT = 400
"""Steps without one new token, at most; the texts have at most 140 tokens."""


def random_rules(rng: random.Random, size: int) -> list[Budget | None]:
    """One policy with its budgets, or several, as (policy, budget, protection, recent) or None for full KV."""
    window = rng.choice([w for w in (0, 1, 4) if w <= size])
    pages = [p for p in range(2, size + 1) if size % p == 0]
    drops = bool(pages) and rng.random() < 0.2
    page = size if drops else rng.choice(pages) if pages and rng.random() < 0.2 else 1
    policy = StubPolicy(window, page, drops)
    rules = []
    while not rules:
        for _ in range(rng.choice([1, 2])):
            interval_blocks = rng.choice([1, 1, 2, 3])
            budget = Budget(rng.randrange(1, 5) + interval_blocks, size, interval_blocks)
            kind = rng.choice(["none", "sink", "prompt", "prompt"])
            protection = Protection(kind, rng.randrange(1, budget.keep + 1) if kind == "sink" else 0)
            recent = rng.choice([0, 0, 1, size // 2])
            try:
                protection.check(budget.keep, recent, page)
            except ValueError:
                continue
            if drops and -(-protection.sinks // size) + max(1, -(-recent // size)) > budget.kept_blocks:
                continue
            rules.append((policy, budget, protection, recent))
    if rng.random() < 0.25:
        rules.append(None)
    if page == 1 and rng.random() < 0.3:
        others = [StubPolicy(rng.choice([w for w in (0, 1, 2, 4, size) if w <= size])) for _ in rules]
        rules = [kind and (other, *kind[1:]) for kind, other in zip(rules, others, strict=True)]
    return rules


def _sliding_blocks(
    rng: random.Random, size: int, caching: bool, seqs: int, batched: int, longest: int
) -> SlidingBlocks | None:
    """As the memory plan has them, or a few blocks less for chunks, in half of the configurations. Half of these know
    how long the longest request is.
    """
    if rng.random() < 0.5:
        return None
    window = rng.choice([1, 2, size, size + 1, rng.randint(1, 4 * size), 40 * size])
    for_chunks = -(-batched // size) + 1
    if rng.random() < 0.3:
        for_chunks = rng.randint(0, for_chunks)
    longest = longest if rng.random() < 0.5 else None
    pool = BlockPool(seqs * most_blocks(window, size, longest) + for_chunks, size, caching)
    return SlidingBlocks(pool, window, seqs, longest)


class Simulation:
    """One random configuration with one random load, run to its end."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        size = rng.choice([1, 2, 3, 4, 4, 5, 8, 16])
        kinds = random_rules(rng, size)
        longest = rng.choice([size, size, 2 * size, 3 * size, 7 * size])
        families = [[rng.randrange(10, 12) for _ in range(longest)] for _ in range(2)]
        loads = []
        for _ in range(rng.randrange(8, 25)):
            prompt = rng.choice(families)[: rng.randint(1, longest)]
            prompt += [rng.randrange(10, 12) for _ in range(rng.randrange(3))]
            kind = rng.choice(kinds)
            rule = kind and EvictionRule(
                kind[0], kind[1], kind[2].length(len(prompt), kind[1].keep, kind[3], kind[0].page), kind[3]
            )
            loads.append((prompt, rng.randint(1, min(120, 30 * size)), rng.choice([1, 1, 1, 2, 3]), rule))
        blocks = [max(-(-len(p) // size), r.max_blocks if r else -(-(len(p) + m) // size)) for p, m, _, r in loads]
        need = max(blocks)
        typical = max(r.max_blocks if r else need for _, _, _, r in loads)
        num_blocks = max(need, int(typical * rng.choice([1, 2, 2.5, 3, 3.5, 4, 6]))) + rng.randrange(3)
        seqs = rng.choice([1, 2, 3, *[4, 6, 8, 8] * 4])
        batched = rng.randint(seqs, seqs + 12 * size)
        chunked = rng.random() < 0.8
        longest_text = max(len(p) + m for p, m, _, _ in loads)
        options = {
            "max_num_seqs": seqs,
            "max_num_batched_tokens": batched if chunked else max(batched, longest_text) + seqs,
            "enable_chunked_prefill": chunked,
            "headroom": rng.choice([0, 0, 1, size, 128]),
            "num_query_slots": rng.choice([1, 1, 2, 2, 3, 4, 8, 8]),
            "trigger": rng.choice(["block_full", "block_full", "pressure"]),
            "scheduling": rng.choice(["hybrid", "hybrid", "constrained"]),
        }
        caching = rng.random() < 0.7
        slabs = random.Random(-seed).choice([0, 1, 2, 3, 1000])  # of its own, so that all else stays what it was
        space = SwapSpace(slabs, max(1, 4 // size), SwapCosts(block_bytes=0, token_operations=1, pair_operations=0))
        sliding = _sliding_blocks(
            random.Random(-1 - seed), size, caching, seqs, options["max_num_batched_tokens"], longest_text
        )
        self.scheduler = Scheduler(BlockPool(num_blocks, size, caching), **options, swap_space=space, sliding=sliding)
        self.model = FabricatedModel(self.scheduler, seed, max_delay=rng.choice([0, 0, 1, 4]), overlaps=bool(seed % 2))
        self.requests: list[Request] = []
        self.max_eos = rng.choice([0.0, 0.02])
        self.rates = {
            "add": rng.choice([0.2, 1.0, 1.0]),
            "abort": rng.choice([0.0, 0.01, 0.03]),
            "pause": rng.choice([0.0, 0.01, 0.03]),
        }
        pending = []
        for i, (prompt, max_tokens, n, rule) in enumerate(loads):
            samples = make_samples(
                f"r{i}",
                prompt,
                min(max_tokens, num_blocks * size - len(prompt)) if rule is None else max_tokens,
                n,
                rule,
            )
            pending += samples
        self.pending = [request for request in pending if request.max_total_tokens > request.num_prompt_tokens]
        policy = next(kind for kind in kinds if kind)[0]
        windows = {kind[0].num_queries for kind in kinds if kind}
        self.labels = [
            f"block_size={size}",
            f"trigger={options['trigger']}",
            f"scheduling={options['scheduling']}",
            f"compression={'async' if self.model.max_delay else 'sync'}",
            f"steps={'overlapped' if self.model.overlaps else 'one by one'}",
            f"prefix_caching={caching}",
            f"swap_space={'none' if not slabs else 'little' if slabs < 4 else 'ample'}",
            f"chunked_prefill={chunked}",
            "window=" + (str(min(windows)) if len(windows) == 1 else "several"),
            f"query_slots={options['num_query_slots']}",
            "policy=" + ("drops_blocks" if policy.drops_blocks else "pages" if policy.page > 1 else "tokens"),
            f"mixed_unbounded={None in kinds}",
            f"rules={len(kinds)}",
            "sliding=" + ("none" if sliding is None else "caching" if caching else "alone"),
            "pool=" + ("tight" if num_blocks < 1.5 * need else "ample"),
            *{f"protection={kind[2].kind}" for kind in kinds if kind},
            *{f"interval={kind[1].interval_blocks} blocks" for kind in kinds if kind},
        ]

    def run(self) -> int:
        """Returns the number of steps."""
        scheduler, model, rng = self.scheduler, self.model, self.rng
        events = model.events
        steps = since_token = tokens = 0
        while self.pending or scheduler.has_unfinished:
            while self.pending and (rng.random() < self.rates["add"] or not scheduler.has_unfinished):
                request = self.pending.pop(0)
                scheduler.add(request)
                self.requests.append(request)
            self._disturb()
            if not scheduler.has_unfinished:
                continue
            model.poll()
            plan = model.schedule()
            self._pause_one_that_stalls(plan)
            model.execute(plan, self.max_eos)
            steps += 1
            since_token = 0 if plan.sampled else since_token + 1
            tokens += len(plan.sampled)
            assert since_token < LONGEST_WAIT, "no new token for a long time"
        assert all(request.status is Status.FINISHED for request in self.requests)
        model.check_all_returned()
        assert not model.host_copies, "what was saved of an ended request is kept"
        forced = events["forced_pauses"] + events["aborts"]
        prompts = sum(request.num_prompt_tokens for request in self.requests)
        bound = 100 + 2 * (tokens + prompts) * (1 + model.max_delay) + 150 * forced
        assert steps <= bound, f"{steps} steps for {tokens} tokens and prompts of {prompts}"
        events["steps"] += steps
        events["tokens"] += tokens
        events["requests"] += len(self.requests)
        return steps

    def _disturb(self) -> None:
        model, rng, events = self.model, self.rng, self.model.events
        if rng.random() < self.rates["abort"]:
            live = [request for request in self.requests if request.finish_reason is None]
            if live:
                rare = [request for request in live if request.status in (Status.COMPRESSING, Status.PAUSED)]
                request = rng.choice(rare if rare and rng.random() < 0.5 else live)
                events["aborts"] += 1
                events["aborts_while_compressing"] += request.status is Status.COMPRESSING
                events["aborts_while_paused"] += request.status is Status.PAUSED
                model.abort(request)
        if rng.random() < self.rates["pause"]:
            running = [request for request in self.scheduler.running if request.status is Status.RUNNING]
            if running:
                model.pause(rng.choice(running))
                events["forced_pauses"] += 1

    def _pause_one_that_stalls(self, plan) -> None:
        if not plan.num_stalled or self.rng.random() >= self.rates["pause"]:
            return
        busy = {*plan.decodes, *(chunk.request for chunk in plan.prefills), *(swap.request for swap in plan.resumed)}
        for request in self.scheduler.running:
            if request.status is Status.RUNNING and request not in busy:
                self.model.pause(request, plan)
                self.model.events["forced_pauses"] += 1
                return


def simulate(num_steps: int, first_seed: int = 0) -> tuple[Counter, Counter, int]:
    """Run seeds from `first_seed` on until `num_steps` steps are done.

    Returns:
        Events, configurations by their labels, and how many seeds were run.
    """
    events, labels, seed = Counter(), Counter(), first_seed
    while events["steps"] < num_steps:
        simulation = Simulation(seed)
        try:
            simulation.run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}; {simulation.labels}") from error
        events += simulation.model.events
        labels.update(simulation.labels)
        seed += 1
    return events, labels, seed - first_seed


def missing(events: Counter, names: Iterable[str] = MUST_OCCUR) -> list[str]:
    return [name for name in names if not events[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    begin, cpu = time.perf_counter(), time.process_time()
    events, labels, num_seeds = simulate(args.steps, args.first_seed)
    record = {
        "what": "random scheduler steps with a fabricated model: no leak, deadlock, starvation or wrong entry",
        "command": f"python -m tests.scheduling.simulate_scheduler --steps {args.steps} --first-seed {args.first_seed}",
        "commit": args.commit,
        "python": platform.python_version(),
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seeds": [args.first_seed, args.first_seed + num_seeds - 1],
        "events": dict(sorted(events.items())),
        "missing_events": missing(events),
        "configurations": dict(sorted(labels.items())),
    }
    text = json.dumps(record, indent=2) + "\n"
    if args.out:
        args.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
