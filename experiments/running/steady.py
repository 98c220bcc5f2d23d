"""A steady state without the hours that lead to it: a full pool of requests of every age, and others that wait.

In a steady state a request is as likely to be at work as its output is long, and to be at any place of that output (the
inspection paradox of renewal theory). So the pool is filled with such requests, whose prompts stand for the output that
is there too. From then on fresh requests wait, and a window of seconds is timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from experiments.backends import Backend
from experiments.errors import RunError
from experiments.running.scenarios import Served, TimedRequest, clock_of, hand_over
from zipage import EngineConfig, RequestOutput, StepStats

QUIET_STEPS = 16
"""Steps without prefill, while requests wait, that show that the pool is full."""
BACKLOG = 8
"""Requests that wait at least."""
MOST_REFUSED = 100
"""Requests in a row that the engine refuses before the run is given up."""
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

    The samples of a prompt began together and are requests of their own here, with a prompt in common. No prompt of
    theirs is protected, since it stands for output too.
    """
    protection = None if config.protection == "none" else "none"
    random = Random(f"{seed} begun")
    lengths, number = [request.params.max_tokens for request in requests], 0
    while True:
        (drawn,) = random.choices(requests, lengths)
        done = random.randrange(drawn.params.max_tokens)
        left, held = drawn.params.max_tokens - done, held_entries(config, len(drawn.token_ids), done)
        for _ in range(drawn.params.n):
            tokens = [*drawn.token_ids, *random.choices(drawn.token_ids, k=max(0, held - len(drawn.token_ids)))]
            params = replace(drawn.params, n=1, max_tokens=left, seed=number, protection=protection)
            yield TimedRequest(f"begun-{number}", tokens[:held], params)
            number += 1


class _Watched:
    """An engine whose steps tell how many requests wait and whether the pool is full."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._waiting: dict[int, int] = {}
        self.ended = self.quiet = self.running = 0
        backend.step_listeners.append(self._note)

    def _note(self, step: StepStats) -> None:
        self._waiting[step.replica] = step.num_waiting
        self.quiet += bool(step.num_waiting and step.num_decode and not step.num_prefill)
        self.running = max(self.running, step.num_running)

    def keep_waiting(self, source: Iterator[TimedRequest]) -> list[RequestOutput]:
        """Hand over requests until `BACKLOG` samples wait. Returns the outputs of those that the engine refuses."""
        waiting, refused = sum(self._waiting.values()), []
        while waiting < BACKLOG:
            request = next(source, None)
            if request is None:
                raise RunError("the requests ran out: raise workload.options.count, or take fewer scenario.seconds")
            output = hand_over(self._backend, request)
            if output is None:
                waiting += request.params.n
                continue
            refused.append(output)
            if len(refused) == MOST_REFUSED:
                raise RunError(f"the engine refuses one request after another: {output.error}")
        return refused

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
        RunError: the requests ran out, or the engine refuses one after another.
    """
    outputs = {}
    watched = _Watched(backend)
    clock = clock_of(backend)
    start = clock()

    def run(source: Iterator[TimedRequest]) -> None:
        for output in watched.keep_waiting(source):
            outputs[output.request_id] = output
        for output in backend.step():
            outputs[output.request_id] = output
            watched.ended += 1

    try:
        filling = begun(requests, config, seed)
        while watched.quiet < QUIET_STEPS and (not watched.running or watched.ended < 2 * watched.running):
            run(filling)
        fresh = iter(requests)
        warm = clock() + WARM_UP * seconds
        while clock() < warm:
            run(fresh)
        begin = clock()
        while (end := clock()) < begin + seconds:
            run(fresh)
    finally:
        watched.close()
    own = {request.id for request in requests}
    finished = {name: output for name, output in outputs.items() if name in own}
    return Served(finished, start, end - start, window=(begin - start, end - start))
