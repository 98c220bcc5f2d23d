"""How well `scenario=steady` tells the throughput of a steady state, by the scheduler alone.

python -m tests.benchmarks.steady TRACE --out FILE    # TRACE: lengths of requests; writes a JSON record

The scheduler is the engine's. A step is taken to last as long as one of Qwen3-8B's shape on an H100, as in
`tests/benchmarks/growth.py`; what compressions and larger batches cost beside is left out. So the times are modelled,
and what is compared is a short window with a long one.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from experiments.running.scenarios import TimedRequest
from experiments.running.steady import serve_steadily
from experiments.running.traces import read_trace
from tests.benchmarks.growth import ENTRY, PREFILL, STEP
from tests.scheduling.fabricated import make_rule, make_samples, make_scheduler
from zipage import EngineConfig, RequestMetrics, RequestOutput, SamplingParams, StepStats
from zipage.eviction.rule import EvictionRule
from zipage.scheduling.headroom import HEADROOM

Lengths = Sequence[tuple[int, int]]


class Clock:
    """Tells the seconds of a simulation."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Simulated:
    """The scheduler behind the face of an engine; each step puts the clock forward."""

    def __init__(self, clock: Clock, rule: EvictionRule | None = None, **options: int) -> None:
        self.scheduler = make_scheduler(caching=False, headroom=HEADROOM, max_num_batched_tokens=8192, **options)
        self.clock, self.rule = clock, rule
        self.steps: list[StepStats] = []
        self.step_listeners: list[Callable[[StepStats], None]] = [self.steps.append]

    def add_request(self, tokens: list[int], params: SamplingParams, name: str) -> None:
        for sample in make_samples(name, tokens, params.max_tokens, params.n, self.rule):
            self.scheduler.add(sample)

    def step(self) -> list[RequestOutput]:
        scheduler = self.scheduler
        batch = scheduler.schedule()
        scheduler.advance(batch)
        for order in scheduler.order_compressions():
            scheduler.complete(order.number, None)
        prefilled = sum(chunk.num_tokens for chunk in batch.prefills)
        self.clock.now += STEP + ENTRY * sum(r.cache_len for r in batch.decodes) + PREFILL * prefilled
        ended = scheduler.update(batch, [7] * len(batch.sampled))
        known = {
            "time": self.clock.now,
            "num_decode": len(batch.decodes),
            "num_prefill": len(batch.prefills),
            "prefill_tokens": prefilled,
            "num_running": len(scheduler.running),
            "num_waiting": len(scheduler.waiting),
        }
        step = StepStats(**{name: known.get(name, 0) for name in StepStats.__slots__})
        for listener in self.step_listeners:
            listener(step)
        return [RequestOutput(request.request_id, None, [], [], RequestMetrics()) for request in ended]


def full_kv(clock: Clock, blocks: int, size: int) -> tuple[Simulated, EngineConfig]:
    engine = Simulated(clock, num_blocks=blocks, block_size=size, max_num_seqs=1024, num_query_slots=0)
    return engine, EngineConfig(model="m", block_size=size)


def bounded(clock: Clock, blocks: int, size: int, budget: int) -> tuple[Simulated, EngineConfig]:
    most = budget // size + 1
    rule = make_rule(most, size, window=16)
    sizes = {"num_blocks": blocks, "block_size": size, "max_num_seqs": 1024, "num_query_slots": blocks // most}
    return Simulated(clock, rule, **sizes), EngineConfig(
        model="m", block_size=size, policy="zipage", budget_tokens=budget
    )


LOADS = {
    "58 GB, lengths of the trace": (
        lambda clock: full_kv(clock, 1536, 256),
        lambda clock: bounded(clock, 1492, 256, 2048),
    ),
    "13 GB, 128 in and 3,072 out": (
        lambda clock: full_kv(clock, 5625, 16),
        lambda clock: bounded(clock, 660, 128, 512),
    ),
}
"""Full KV and `zipage` in the pools of `paper_speed` at 8B and of `ranks` on one GPU."""


def measure(build: Callable[[Clock], tuple[Simulated, EngineConfig]], lengths: Lengths, seconds: float, seed: int):
    """Tokens a second and requests at work, in the window and in its parts of 100 seconds."""
    requests = [
        TimedRequest(f"{i}", [5] * prompt, SamplingParams(max_tokens=output, ignore_eos=True))
        for i, (prompt, output) in enumerate(lengths)
    ]
    engine, config = build(Clock())
    served = serve_steadily(engine, requests, config, seconds=seconds, seed=seed)
    begin, end = (served.start + edge for edge in served.window)
    decoded = [(step.time, step.num_decode) for step in engine.steps if begin < step.time <= end]
    parts = [
        sum(n for time, n in decoded if begin + at < time <= begin + at + 100) / 100
        for at in range(0, int(end - begin) - 99, 100)
    ]
    return sum(n for _, n in decoded) / (end - begin), mean(n for _, n in decoded), parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--long", type=float, default=2400.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    longest = 16_384
    traced = [
        tuple(min(longest, n) for n in (r.prompt_tokens, r.output_tokens)) for r in read_trace(args.trace).requests
    ]
    rows = []
    for load, builds in LOADS.items():
        for arm, build in zip(("full", "zipage"), builds, strict=True):
            of_trace = "trace" in load
            short = []
            for seed in range(args.draws):
                lengths = random.Random(seed).sample(traced, 2048) if of_trace else [(128, 3072)] * 2048
                short.append(measure(build, lengths, args.seconds, seed)[:2])
            shuffled = random.Random(0)
            many = (
                [pair for _ in range(40) for pair in shuffled.sample(traced, len(traced))]
                if of_trace
                else [(128, 3072)] * 40_000
            )
            rate, at_work, parts = measure(build, many, args.long, 0)
            rates, works = zip(*short, strict=True)
            rows.append(
                {
                    "load": load,
                    "arm": arm,
                    "long": {
                        "tokens_per_second": rate,
                        "at_work": at_work,
                        "standard_error": stdev(parts) / len(parts) ** 0.5,
                    },
                    "short": {"tokens_per_second": mean(rates), "at_work": mean(works), "deviation": stdev(rates)},
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "what": "simulated throughput of a steady state: a window of scenario=steady with other seeds, and a long one",
        "command": f"python -m tests.benchmarks.steady {args.trace.name} --draws {args.draws} --long {args.long:.0f}",
        "commit": args.commit,
        "python": platform.python_version(),
        "seconds": {
            "step": STEP,
            "entry": ENTRY,
            "prefilled_token": PREFILL,
            "window": args.seconds,
            "long": args.long,
        },
        "draws": args.draws,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
