"""Many idle streams, and many requests whose clients go away at random: does the server stay as it was?

python -m tests.benchmarks.soak --out FILE                     # the shipped reasoner on a CPU, minutes
python -m tests.benchmarks.soak --out FILE MODEL --device cuda # and whatever flags `zipage serve` has

Twice, `--idle` streams are opened at once, most of which wait; /health is asked meanwhile; then all of them go away.
After that `--requests` requests come, `--streams` at a time: some are read to their end, others are left before the
first token, after it, or somewhere between. Memory is that of all the server's processes, once a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from experiments.records import provenance
from experiments.serving.prompts import Asked, bodies
from experiments.serving.scrape import BLOCKS, GAUGES, get, metrics, wait_until_idle
from experiments.serving.server import HOST, NAME, RunningServer, command, free_port
from experiments.serving.stream import Stream, clock

REASONER = str(Path(__file__).parents[2] / "models" / "zipage-reasoner")
ENGINE = {"device": "cpu", "block_size": 16, "num_blocks": 256, "max_num_seqs": 8, "max_model_len": 512}
LONG, SHORT, PROMPT = 400, 16, 24
"""Tokens of an idle stream's output, at most of another one's, and of all prompts."""
COMMAND = ("-m", "tests.benchmarks.soak", "--out", "FILE")
PATIENCE = 120.0
"""Seconds within which a request must end, or the server be idle."""
MOST_GROWTH = 0.05
"""Of memory, from the second fifth of the requests to the last."""
LEAVES = {"never": 0.45, "at once": 0.15, "after the first token": 0.2, "between": 0.2}


def memory(pid: int) -> int:
    """Resident bytes of a process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
    return own + sum(memory(int(child)) for child in children)


class Soak:
    """What is put on a server, and what is seen meanwhile.

    Attributes:
        checks: name -> whether it held, and the figures.
        samples: (seconds, resident bytes, requests that have ended).
    """

    def __init__(self, port: int, pid: int, vocab_size: int, seed: int = 0) -> None:
        self.port, self.pid, self.vocab_size, self.seed = port, pid, vocab_size, seed
        self.checks: dict[str, dict[str, Any]] = {}
        self.samples: list[tuple[float, int, int]] = []

    async def run(self, idle: int, requests: int, streams: int) -> None:
        self._start = clock()
        phases = {f"idle streams, {number}": partial(self._idle, f"idle streams, {number}", idle) for number in (1, 2)}
        for name, phase in (phases | {"requests": partial(self._churn, requests, streams)}).items():
            try:
                await phase()
            except (OSError, ValueError, TimeoutError) as error:  # it does not answer any more
                self.checks[name] = {"holds": False, "error": repr(error)}
                return

    def _bodies(self, label: str, outputs: Sequence[int]) -> list[bytes]:
        common = {"model": NAME, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        asked = [Asked(0.0, PROMPT, output) for output in outputs]
        return list(bodies(asked, seed=f"{self.seed} {label}", vocab_size=self.vocab_size, common=common))

    async def _idle(self, name: str, count: int) -> None:
        streams = [Stream(body, clock(), LONG) for body in self._bodies(name, [LONG] * count)]
        await asyncio.gather(*(stream.connect(HOST, self.port) for stream in streams))
        seen, answers, end = 0, [], clock() + PATIENCE
        while seen < count and clock() < end and not any(stream.outcome for stream in streams):
            begin = clock()
            await get(HOST, self.port, "/health")
            answers.append(clock() - begin)
            values = await metrics(HOST, self.port)
            seen = int(sum(values[metric] for metric in GAUGES.values()))
            await asyncio.sleep(0.1)
        failed = Counter(stream.error for stream in streams if stream.outcome == "failed")
        with_all = memory(self.pid)
        for stream in streams:
            stream.abort()
        begin = clock()
        left, blocks = await self._after()
        figures = {"open": seen, "health_seconds": max(answers, default=None), "seconds_to_let_go": clock() - begin}
        figures |= {"left": left, "blocks": blocks, "bytes_with_all": with_all, "bytes_after": memory(self.pid)}
        # those that finish while the last ones come in are not open any more
        self.checks[name] = {"holds": not failed and seen >= 0.99 * count and not left and not blocks} | figures
        self.checks[name] |= {"failed": dict(failed)}

    async def _churn(self, count: int, at_once: int) -> None:
        draw = random.Random(self.seed)
        outputs = [draw.randint(2, SHORT) for _ in range(count)]
        ways = draw.choices(list(LEAVES), list(LEAVES.values()), k=count)
        texts, ended, running = self._bodies("churn", outputs), [], asyncio.Semaphore(at_once)
        outcomes: Counter[str] = Counter()

        async def one(number: int) -> None:
            over, way, read = asyncio.Event(), ways[number], 0
            leave = {"after the first token": 1, "between": draw.randint(1, outputs[number])}.get(way)

            def heard(_: float, tokens: int) -> None:
                nonlocal read
                read += tokens
                if leave is not None and read >= leave:
                    stream.abort()

            stream = Stream(texts[number], clock(), outputs[number], heard, lambda _: over.set())
            await stream.connect(HOST, self.port)
            if way == "at once":
                stream.abort()
            try:
                await asyncio.wait_for(over.wait(), PATIENCE)
            except TimeoutError:
                outcomes["hung"] += 1
                stream.abort()
            else:
                short = stream.outcome == "finished" and stream.tokens != outputs[number]
                outcomes["short" if short else stream.error or stream.outcome] += 1
            ended.append(number)
            running.release()

        async def watch() -> None:
            while True:
                self.samples.append((clock() - self._start, memory(self.pid), len(ended)))
                await asyncio.sleep(1.0 if count > 1000 else 0.1)

        watching, tasks = asyncio.ensure_future(watch()), set()
        for number in range(count):
            await running.acquire()
            task = asyncio.ensure_future(one(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait(tasks)
        left, blocks = await self._after()
        watching.cancel()
        early = [size for _, size, done in self.samples if 0.2 * count <= done <= 0.4 * count]
        late = [size for _, size, done in self.samples if done >= 0.8 * count]
        growth = median(late) / median(early) - 1 if early and late else None
        good = not set(outcomes) - {"finished", "aborted"}
        self.checks["requests"] = {"holds": good and not left and not blocks, "outcomes": dict(outcomes)}
        self.checks["requests"] |= {"left": left, "blocks": blocks}
        self.checks["memory"] = {"holds": growth is not None and growth <= MOST_GROWTH, "growth": growth}

    async def _after(self) -> tuple[int, float]:
        """Requests and blocks that the server still holds."""
        left = await wait_until_idle(HOST, self.port, PATIENCE)
        return left, (await metrics(HOST, self.port)).get(BLOCKS, 0.0)


def soak(
    model: str,
    engine: dict[str, Any],
    idle: int,
    requests: int,
    streams: int,
    words: Sequence[str] = (),
    open_files: int | None = None,
) -> dict[str, Any]:
    """Start a server, soak it, and stop it.

    Args:
        words: further flags of the server.
        open_files: soft limit under which the server starts; None: as here.

    Returns:
        The checks and samples, as plain data.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2 * idle + 256)), hard))  # this client's
    port = free_port()
    line, environment = command("zipage", {"model": model} | engine, port, {"max_queue": max(1024, 2 * idle)})
    limit = ["/bin/sh", "-c", f'ulimit -Sn {open_files or soft}; exec "$@"', "sh"]  # the server's is as it was
    vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    with RunningServer([*limit, *line, *words], port, environment) as server:
        server.wait_until_ready(900)
        work = Soak(port, server.pid, vocab_size)
        begin = time.perf_counter()
        asyncio.run(work.run(idle, requests, streams))
        server.check()
    return {"seconds": time.perf_counter() - begin, "checks": work.checks, "samples": work.samples}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=64)
    given, words = parser.parse_known_args()
    own = words and not words[0].startswith("-")
    model, words = (words[0], words[1:]) if own else (REASONER, words)
    found = soak(model, {} if own else ENGINE, given.idle, given.requests, given.streams, words)
    for name, check in found["checks"].items():
        print(f"{'holds' if check['holds'] else 'FAILS'}  {name}: {check}", flush=True)
    load = {"model": Path(model).name, "idle": given.idle, "requests": given.requests, "streams": given.streams}
    if given.out:
        record = {"what": "a server under idle streams and clients that go away", "load": load}
        record |= (
            {"engine": {} if own else ENGINE, "flags": words}
            | found
            | {"provenance": provenance.collect([*COMMAND, *([model] if own else []), *words])}
        )
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(check["holds"] for check in found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
