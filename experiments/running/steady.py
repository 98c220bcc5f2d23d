"""A steady state without the hours that lead to it: a full pool of requests of every age, and others that wait.

In a steady state a request is as likely to be at work as its output is long, and to be at any place of that output (the
inspection paradox of renewal theory). So the pool is filled with such requests, whose prompts stand for the output that
is there too. From then on fresh requests wait, and a window of seconds is timed.

The window is shorter than most requests, so what it measures is decided by which requests it begins with. These are
drawn evenly, not independently: requests of one length begin at ages that are spread over all of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from random import Random

from experiments.backends import Backend
from experiments.errors import RunError
from experiments.running.scenarios import Served, TimedRequest, clock_of, hand_over
from zipage import EngineConfig, RequestOutput, StepStats

QUIET_STEPS = 16
"""Steps without prefill, while requests wait, that show that the pool is full."""
BACKLOG = 8
"""Samples that wait for each replica, beside as many as ended in the step before."""
BACKLOG_OF_FILLING = 1
"""The same while the pool is filled. Those that still wait when it is full hold more than fresh ones would, and keep
these out."""
MOST_REFUSED = 100
"""Requests in a row that the engine refuses before the run is given up."""
PLASTIC = 1.324717957244746
"""The real root of x**3 = x + 1, by whose powers R2 steps."""
WARM_UP = 0.2
"""Part of the window that runs before it, in which graphs are captured that no step before has asked for."""


def held_entries(config: EngineConfig, prompt: int, done: int) -> int:
    """Entries that a request holds per layer and KV head with `done` tokens of its output.

    Past its budget, in whole blocks, a bounded request holds the budget and, from compression to compression, up to an
    interval more; under pressure alone it may hold everything.
    """
    held, size = prompt + done, config.block_size
    if config.policy == "full" or config.budget_tokens is None or config.trigger == "pressure":
        return held
    budget = -(-config.budget_tokens // size) * size
    interval = -(-(config.interval or size) // size) * size
    return held if held <= budget else budget + 1 + done % interval


def begun(requests: Sequence[TimedRequest], config: EngineConfig, seed: int) -> Iterator[TimedRequest]:
    """Requests under way, without end: one of `requests`, drawn by its output, some time after it began.

    The draws fill the plane of request and age evenly (the sequence R2 of Roberts 2018 from a random start), with the
    requests in order of what they hold on average.

    The samples of a prompt began together and are requests of their own here, with a prompt in common. No prompt of
    theirs is protected, since it stands for output too. One that is drawn again has other tokens: in a steady state
    each is there once, and shares no more with the others than `requests` do.
    """
    protection = None if config.protection == "none" else "none"
    random = Random(f"{seed} begun")
    ordered = sorted(requests, key=lambda request: 2 * len(request.token_ids) + request.params.max_tokens)
    ends = list(accumulate(request.params.max_tokens for request in ordered))
    place, age, number, seen = random.random(), random.random(), 0, set()
    while True:
        place, age = (place + 1 / PLASTIC) % 1, (age + 1 / PLASTIC**2) % 1
        drawn = ordered[bisect_right(ends, place * ends[-1])]
        done, prompt = int(age * drawn.params.max_tokens), drawn.token_ids
        left, held = drawn.params.max_tokens - done, held_entries(config, len(prompt), done)
        if drawn.id in seen:
            prompt = random.choices(prompt, k=len(prompt))
        seen.add(drawn.id)
        for _ in range(drawn.params.n):
            tokens = [*prompt, *random.choices(drawn.token_ids, k=max(0, held - len(prompt)))]
            params = replace(drawn.params, n=1, max_tokens=left, seed=number, protection=protection)
            yield TimedRequest(f"begun-{number}", tokens[:held], params)
            number += 1


class _Watched:
    """An engine whose steps tell how many samples wait and run, and whether the pool is full, of each replica."""

    def __init__(self, backend: Backend, replicas: int) -> None:
        self._backend = backend
        self._waiting, self._quiet, self._running = ([0] * replicas for _ in range(3))
        self._ended, self._ended_last = 0, 0
        backend.step_listeners.append(self._note)

    def _note(self, step: StepStats) -> None:
        number = step.replica
        self._waiting[number] = step.num_waiting
        self._quiet[number] += bool(step.num_waiting and step.num_decode and not step.num_prefill)
        self._running[number] = max(self._running[number], step.num_running)

    @property
    def is_full(self) -> bool:
        """Whether every replica is, or never will be: requests end as fast as they come."""
        return min(self._quiet) >= QUIET_STEPS or self._ended >= max(QUIET_STEPS, 2 * sum(self._running))

    def step(self, source: Iterator[TimedRequest], backlog: int) -> list[RequestOutput]:
        """Hand over requests until enough wait, and make a step.

        A replica may have got any that were handed over since its last step, until it tells how many wait. The engine
        gives the next ones to the one that has the least to do.

        Returns:
            The outputs of requests that ended, and of those that the engine refused.

        Raises:
            RunError: the requests ran out, or the engine refuses one after another.
        """
        refused = []
        while min(self._waiting) < backlog + self._ended_last:
            request = next(source, None)
            if request is None:
                raise RunError("the requests ran out: raise workload.options.count, or take fewer scenario.seconds")
            output = hand_over(self._backend, request)
            if output is None:
                self._waiting = [waiting + request.params.n for waiting in self._waiting]
                continue
            refused.append(output)
            if len(refused) == MOST_REFUSED:
                raise RunError(f"the engine refuses one request after another: {output.error}")
        ended = self._backend.step()
        self._ended_last = sum(max(1, len(output.outputs)) for output in ended)
        self._ended += self._ended_last
        return refused + ended

    def close(self) -> None:
        self._backend.step_listeners.remove(self._note)


def serve_steadily(
    backend: Backend, requests: Sequence[TimedRequest], config: EngineConfig, *, seconds: float, seed: int
) -> Served:
    """Fill the pool with requests under way, keep `requests` waiting, and time a window.

    Args:
        requests: in the order in which they are handed over; as many as it takes.
        config: of the engine, which says how many entries a request under way holds.
        seconds: of the window.
        seed: of the requests under way.

    Returns:
        The outputs that ended, those of requests under way left out, and the window. The engine is left with the rest.

    Raises:
        RunError: the requests ran out, the engine refuses one after another, or no output is longer than a token.
    """
    if all(request.params.max_tokens == 1 for request in requests):
        raise RunError("no output is longer than the token that its prefill gives: nothing is decoded")
    outputs: dict[str, RequestOutput] = {}
    watched = _Watched(backend, config.data_parallel_size)
    clock = clock_of(backend)
    start = clock()

    def serve_until(end: float) -> float:
        while (now := clock()) < end:
            outputs.update((output.request_id, output) for output in watched.step(fresh, BACKLOG))
        return now

    try:
        filling, fresh = begun(requests, config, seed), iter(requests)
        while not watched.is_full:
            watched.step(filling, BACKLOG_OF_FILLING)
        begin = serve_until(clock() + WARM_UP * seconds)
        end = serve_until(begin + seconds)
    finally:
        watched.close()
    own = {request.id for request in requests}
    finished = {name: output for name, output in outputs.items() if name in own}
    return Served(finished, start, end - start, window=(begin - start, end - start))
