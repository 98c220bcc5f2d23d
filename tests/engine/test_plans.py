"""What the worker is told is plain data: it can be pickled, and another worker that is told the same does the same."""

from __future__ import annotations

import pickle

import pytest

from tests.engine.compressed import make_llm, pause_now_and_then, random_prompts
from tests.eviction.cases import Case
from tests.tiny_models import VOCAB, save_tiny_model, save_tiny_tokenizer
from zipage import LLM, SamplingParams
from zipage.scheduling.request import Status

CASES = {
    "full, overlapped": (None, True),
    "zipage, one by one": (Case("zipage", {"chunk": 32}, protection="prompt"), False),
    "zipage, overlapped": (Case("zipage", {"chunk": 32}, protection="prompt"), True),
    "page_random, one by one": (Case("page_random", {"page_size": 16}), False),
}
OPTIONS = [
    {"temperature": 0.0, "policy": "full"},
    {"temperature": 0.8, "n": 2},
    {"top_p": 0.9, "min_p": 0.01, "logprobs": 3},
    {"top_k": 5, "repetition_penalty": 1.2},
    {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logprobs": 0},
    {"logit_bias": {7: 2.0}, "min_tokens": 20, "stop_token_ids": [3, 4, 5]},
    {"bad_words": ["a", "bc"], "stop": ["z!"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    save_tiny_tokenizer(folder)
    return folder


def make_engine(folder, case: Case | None, overlaps: bool) -> LLM:
    """A small pool and small steps: prompts come in chunks, and some requests have to leave."""
    options = {"num_blocks": 15, "max_num_seqs": 6, "max_num_batched_tokens": 40, "headroom": 0, "max_model_len": 300}
    if case is not None:
        options["async_compression"] = overlaps
    return make_llm(folder, case, async_scheduling=overlaps, skip_tokenizer_init=False, debug=False, **options)


def serve(llm: LLM) -> None:
    """A load with every option, prompts that begin alike, and a request that is withdrawn while it is paused."""
    pause_now_and_then(llm, share=0.1)
    common = random_prompts([48], VOCAB)[0]
    tails = random_prompts((5, 33, 17, 40, 1, 26, 9, 20, 12, 31), VOCAB, seed=1)
    for number, tail in enumerate(tails):
        params = SamplingParams(max_tokens=40 + 5 * number, ignore_eos=True, **OPTIONS[number % len(OPTIONS)])
        llm.add_request(common[: 16 * (number % 4)] + tail, params, str(number))
    outputs, withdrawn = {}, None
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.step()}
        paused = [r.request_id for r in llm._core.scheduler.waiting if r.status is Status.PAUSED and len(outputs) > 2]
        if paused and withdrawn is None:
            withdrawn = paused[0]
            llm.abort(withdrawn)
    for output in outputs.values():
        assert all(sample.error is None and sample.token_ids for sample in output.outputs)


def record(llm: LLM) -> tuple[list[tuple[str, bytes]], list[list[int]]]:
    """From here on: what the worker is told, as bytes, and the tokens of each step."""
    runner, compressor = llm._core.runner, llm._core.compressor
    move, launch, submit = runner.move, runner.launch, compressor.submit
    told: list[tuple[str, bytes]] = []
    sampled: list[list[int]] = []

    def moved(plan):
        told.append(("move", pickle.dumps(plan)))
        return move(plan)

    def launched(plan):
        told.append(("launch", pickle.dumps(plan)))
        under_way = launch(plan)
        sampled.append([] if under_way.tokens is None else under_way.tokens.tolist())
        return under_way

    def submitted(orders):
        told.append(("submit", pickle.dumps(orders)))
        submit(orders)

    runner.move, runner.launch, compressor.submit = moved, launched, submitted
    return told, sampled


def repeat(llm: LLM, told: list[tuple[str, bytes]]) -> list[list[int]]:
    """The worker of an engine is told the same, with nobody above it. Returns the tokens of each step."""
    runner, compressor = llm._core.runner, llm._core.compressor
    sampled = []
    for name, message in told:
        plan = pickle.loads(message)
        if name == "move":
            runner.move(plan)
        elif name == "launch":
            sampled.append(runner.launch(plan).wait().token_ids)
        else:
            compressor.submit(plan)
            assert all(result.error is None for result in compressor.poll(wait=True))
    return sampled


@pytest.mark.parametrize(("case", "overlaps"), CASES.values(), ids=CASES)
def test_a_worker_that_is_told_the_same_in_bytes_draws_the_same_tokens(folder, case, overlaps):
    llm, other = (make_engine(folder, case, overlaps) for _ in range(2))
    told, sampled = record(llm)
    serve(llm)
    assert repeat(other, told) == sampled
    stats = llm.stats
    assert stats.cached_tokens > 0
    assert (stats.compressions_applied > 10) == (case is not None)
    assert stats.pauses > stats.resumes > 0
    assert stats.preemptions > 0
    assert not llm._core.runner.swapper.copies
    assert not other._core.runner.swapper.copies
