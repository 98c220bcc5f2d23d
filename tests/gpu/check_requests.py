"""What one request must not do to another, nor to the device: rows of `check_engine`, on any device, float32.

* finite: logits of one request become NaN (on CUDA a careless sampler then reads past a tensor's end, which ends every
  request of the process): that request ends with an error, its neighbours with the tokens they had without it.
* draws: a seeded request draws the same tokens alone and beside requests with other options.
* compression: a policy raises while it ranks one request: that one ends with an error, and all blocks come back.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import torch

from tests.engine.compressed import greedy, make_llm, random_prompts, tokens_of
from tests.eviction.cases import Case
from tests.tiny_models import VOCAB
from zipage import LLM, RequestOutput, SamplingParams
from zipage.eviction.policies.knorm import KNorm

LOOPS = {"one by one": False, "overlapped": True}
DRAWS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.3},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.02},
    "all, penalised": {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "logprobs": True},
}
BAD_SEED = 666


@dataclass(frozen=True, kw_only=True)
class RaisesForOne(KNorm):
    """Ranks as `knorm`, and raises where one of the requests has the seed `BAD_SEED`."""

    name: ClassVar[str] = "raises_for_one"

    def rank(self, event):
        if BAD_SEED in event.seeds:
            raise ArithmeticError("this request can't be ranked")
        return super().rank(event)


def check_requests(folder: Path, device: str) -> list[dict]:
    """One row a case: `wrong` says what differs from what must be, or the last line of what was raised."""
    cases = {
        f"finite, {loop}, {draw}": partial(not_finite, ahead=ahead, draw=draw)
        for (loop, ahead), draw in product(LOOPS.items(), DRAWS)
    }
    cases |= {f"draws, {loop}": partial(draws, ahead=ahead) for loop, ahead in LOOPS.items()}
    cases |= {
        f"compression {where}, {loop}": partial(failed_compression, ahead=ahead, beside=beside)
        for (loop, ahead), (where, beside) in product(LOOPS.items(), {"in the step": False, "beside": True}.items())
    }
    rows = []
    for name, run in cases.items():
        try:
            wrong = run(folder, device)
        except Exception as error:
            traceback.print_exc()
            wrong = [f"{type(error).__name__}: {error}".partition("\n")[0]]
        rows.append({"case": name, "wrong": wrong, "ok": not wrong})
    return rows


def poison(llm: LLM, request_id: str, after: int) -> None:
    """From its output token number `after` on, the logits of a request are NaN."""
    scheduler, decoder = llm._core.scheduler, llm._core.runner.decoder
    schedule, logits_of = scheduler.schedule, decoder.logits
    sampled = []

    def scheduled(now):
        batch = schedule(now)
        sampled[:] = batch.sampled
        return batch

    def poisoned(hidden):
        logits = logits_of(hidden)
        rows = [i for i, r in enumerate(sampled) if r.request_id == request_id and r.num_output_tokens >= after]
        if rows:
            logits[rows] = float("nan")
        return logits

    scheduler.schedule = scheduled
    decoder.logits = poisoned


def serve(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
    """The outputs of prompts that are named by their places."""
    for place, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        llm.add_request(prompt, one, str(place))
    outputs = {}
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.step()}
    return [outputs[str(place)] for place in range(len(prompts))]


def compare(llm: LLM, outputs: list[RequestOutput], expected: list[list[int]], bad: int) -> list[str]:
    """What is wrong with a run in which the request of place `bad` had to fail and no other."""
    wrong = []
    for place, (output, tokens) in enumerate(zip(outputs, expected, strict=True)):
        (sample,) = output.outputs
        failed = sample.finish_reason == "error" or output.error is not None
        if failed != (place == bad):
            wrong.append(f"request {place} {'failed' if failed else 'did not fail'}: {output.error}")
        elif failed and sample.token_ids != tokens[: len(sample.token_ids)]:
            wrong.append(f"request {place} had other tokens before it failed")
        elif not failed and sample.token_ids != tokens:
            wrong.append(f"request {place} has other tokens beside the one that failed")
    stats = llm.stats
    if stats.blocks_used or stats.query_slots_used or stats.num_compressing or stats.num_running:
        wrong.append(f"{stats.blocks_used} blocks, {stats.query_slots_used} query slots are not free again")
    if torch.device(llm.config.device).type == "cuda":
        torch.cuda.synchronize()
    return wrong


def not_finite(folder: Path, device: str, ahead: bool, draw: str) -> list[str]:
    prompts = random_prompts((5, 33, 17, 40, 9), VOCAB)
    params = [SamplingParams(max_tokens=30, ignore_eos=True, seed=i, **DRAWS[draw]) for i in range(len(prompts))]
    options = {"device": device, "dtype": "float32", "async_scheduling": ahead}
    expected = tokens_of(serve(make_llm(folder, None, **options), prompts, params))
    llm = make_llm(folder, None, **options)
    poison(llm, "2", after=7)
    wrong = compare(llm, serve(llm, prompts, params), expected, bad=2)
    # The same engine goes on.
    again = llm.generate([prompts[0]], params[0], use_tqdm=False)
    return wrong if tokens_of(again)[0] == expected[0] else [*wrong, "the next request has other tokens"]


def draws(folder: Path, device: str, ahead: bool) -> list[str]:
    prompts = random_prompts((5, 33, 17, 40, 9, 21, 12), VOCAB)
    params = [
        SamplingParams(max_tokens=60, ignore_eos=True, seed=i, **options) for i, options in enumerate(DRAWS.values())
    ]
    options = {"device": device, "dtype": "float32", "async_scheduling": ahead}
    together = tokens_of(serve(make_llm(folder, None, **options), prompts, params))
    wrong = []
    for name, prompt, one, tokens in zip(DRAWS, prompts, params, together, strict=True):
        alone = tokens_of(make_llm(folder, None, **options).generate([prompt], one, use_tqdm=False))[0]
        if alone != tokens:
            wrong.append(f"{name}: other tokens alone than beside the others")
    return wrong


def failed_compression(folder: Path, device: str, ahead: bool, beside: bool) -> list[str]:
    # The longest prompt is compressed first, and so in a batch of its own.
    prompts, bad = random_prompts((5, 33, 17, 78, 9), VOCAB), 3
    params = [greedy(100, seed=i) for i in range(len(prompts))]
    case = Case(f"{__name__}:RaisesForOne")
    options = {"device": device, "dtype": "float32", "async_scheduling": ahead, "async_compression": beside}
    llm = make_llm(folder, case, **options)
    expected = tokens_of(serve(llm, prompts, params))
    if llm.stats.compressions_applied < len(prompts):
        return ["nobody was compressed"]
    params[bad] = replace(params[bad], seed=BAD_SEED)
    llm = make_llm(folder, case, **options)
    wrong = compare(llm, serve(llm, prompts, params), expected, bad)
    again = llm.generate([prompts[0]], params[0], use_tqdm=False)
    return wrong if tokens_of(again)[0] == expected[0] else [*wrong, "the next request has other tokens"]
