"""What fails costs the request it belongs to, or the engine, which says so; it never costs a neighbour in silence."""

import logging
import os
import signal
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from tests.engine.compressed import greedy, make_llm, random_prompts, record_events, tokens_of
from tests.eviction.cases import Case
from tests.kernels.grid import half
from tests.tiny_models import VOCAB, save_tiny_model, save_tiny_tokenizer
from zipage import SamplingParams
from zipage.engine.detokenizer import Detokenizer
from zipage.eviction.policy import Policy
from zipage.worker.swap import Swapper

PROMPTS = random_prompts((5, 33, 17, 40), VOCAB)


@dataclass(frozen=True, kw_only=True)
class FailsForLongPrompts(Policy):
    """Ranks by the length of the keys; raises for a request whose prompt has 33 tokens, in its second compression."""

    name: ClassVar[str] = "fails_for_long_prompts"
    variant: ClassVar[str] = "fails"
    paper: ClassVar[str] = ""

    def rank(self, event):
        if any(length == 33 and rounds == 1 for length, rounds in zip(event.prompt_lens, event.rounds)):
            raise torch.OutOfMemoryError("no memory left")
        return event.keys().norm(dim=-1)


FAILS = Case(f"{__name__}:FailsForLongPrompts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    save_tiny_tokenizer(folder)
    return folder


every_loop = pytest.mark.parametrize("overlaps", [False, True], ids=["stepwise", "overlapped"])
LOOPS = "overlaps", [pytest.param(False, id="stepwise"), pytest.param(True, id="overlapped")]
SIDES = "asynchronous", [pytest.param(False, id="in the step"), pytest.param(True, id="beside")]


@every_loop
@pytest.mark.parametrize("asynchronous", [False, True], ids=["in the step", "beside"])
def test_a_compression_that_raises_ends_its_request_alone(folder, asynchronous, overlaps):
    options = {"async_compression": asynchronous, "async_scheduling": overlaps}
    llm = make_llm(folder, FAILS, **options)
    outputs = llm.generate(PROMPTS, greedy(80), use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length", "length"]
    (failed,) = outputs[1].outputs
    message = "a compression under policy 'fails_for_long_prompts' failed: OutOfMemoryError: no memory left"
    message += f" (tests/engine/test_failures.py, line {FailsForLongPrompts.rank.__code__.co_firstlineno + 2})"
    assert failed.error == outputs[1].error == message
    assert 0 < len(failed.token_ids) < 80
    others = [output for output in outputs if output.error is None]
    alone = make_llm(folder, FAILS, **options).generate([PROMPTS[i] for i in (0, 2, 3)], greedy(80), use_tqdm=False)
    assert tokens_of(others) == tokens_of(alone)
    stats = llm.stats
    assert stats.blocks_used == stats.query_slots_used == stats.num_compressing == 0
    assert (stats.compressions_failed, stats.requests_failed, stats.requests_finished) == (1, 1, 3)
    assert stats.compressions_ordered == stats.compressions_applied + stats.compressions_failed
    again = llm.generate(PROMPTS[:1], greedy(80), use_tqdm=False)
    assert tokens_of(again) == tokens_of(others[:1])


ALIGNED = random_prompts((40, 40, 40, 40), VOCAB)
"""Compressed in one batch, after 40 and 56 tokens; the second one's seed is 7."""
ALIGNED_PARAMS = [greedy(66, seed=7 if i == 1 else i + 100) for i in range(4)]


@dataclass(frozen=True, kw_only=True)
class Faulty(Policy):
    """Ranks by the length of the keys and a state; at fault where `fault` says so, in the layers from `layer` on."""

    name: ClassVar[str] = "faulty"
    variant: ClassVar[str] = "fails"
    paper: ClassVar[str] = ""
    fault: str = "none"
    layer: int = 0

    @property
    def state(self):
        return True

    def rank(self, event):
        scores = event.key_norms() + event.stored
        event.store(scores.clamp(min=0))
        at_fault = [seed == 7 and rounds == 1 for seed, rounds in zip(event.seeds, event.rounds)]
        if event.layer_offset >= self.layer:
            if (self.fault == "raises" and any(at_fault)) or (self.fault == "batch" and event.num_requests > 1):
                raise torch.OutOfMemoryError("no memory left")
            if self.fault == "NaN":
                scores[:, at_fault, 1, 20] = float("nan")
        return scores


@pytest.fixture(scope="module")
def tokens_alone(folder):
    """Of `ALIGNED`, each alone in an engine without a fault."""
    llm = make_llm(folder, Case(f"{__name__}:Faulty"))
    return [tokens_of(llm.generate([prompt], greedy(66), use_tqdm=False))[0] for prompt in ALIGNED]


@half(("fault", ["raises", "NaN", "batch"]), ("debug", [False, True]), SIDES, LOOPS)
def test_what_fails_in_the_last_layer_of_a_batch_costs_no_neighbour(
    folder, tokens_alone, fault, debug, asynchronous, overlaps
):
    case = Case(f"{__name__}:Faulty", {"fault": fault, "layer": 1})
    options = {"async_compression": asynchronous, "async_scheduling": overlaps, "debug": debug, "layer_stride": 1}
    llm = make_llm(folder, case, **options)
    outputs = llm.generate(ALIGNED, ALIGNED_PARAMS, use_tqdm=False)
    at_fault = outputs.pop(1)
    assert tokens_of(outputs) == [tokens_alone[i] for i in (0, 2, 3)]
    stats = llm.stats
    if fault == "raises" or (fault == "NaN" and debug):
        assert ("no memory left" if fault == "raises" else "ranked entries NaN") in at_fault.error
        assert at_fault.outputs[0].token_ids == tokens_alone[1][: len(at_fault.outputs[0].token_ids)]
        assert (stats.compressions_failed, stats.compressions_misranked) == (1, 0)
    else:
        assert at_fault.error is None
        assert at_fault.outputs[0].token_ids[:56] == tokens_alone[1][:56], "chance decides only what follows a NaN"
        assert (stats.compressions_failed, stats.compressions_misranked) == (0, fault == "NaN")
    assert stats.compressions_ordered == stats.compressions_applied + stats.compressions_failed
    assert stats.blocks_used == stats.query_slots_used == stats.num_compressing == 0


class Mute(ValueError):
    """Can't say what it is."""

    def __str__(self):
        raise SystemExit("mute")


def circular() -> Exception:
    error = RuntimeError("round and round")
    error.__cause__ = error
    return error


EXITS = {
    "exit": (lambda: SystemExit(3), "SystemExit: 3"),
    "mute": (Mute, "Mute"),
    "circular": (circular, "RuntimeError: round and round"),
}


@half(("kind", list(EXITS)), SIDES, LOOPS)
def test_whatever_a_policy_raises_ends_its_request_alone(
    folder, tokens_alone, monkeypatch, kind, asynchronous, overlaps
):
    """In the last layer of a batch, after the others were moved."""
    make, text = EXITS[kind]
    rank = Faulty.rank

    def raises(policy, event):
        try:
            return rank(policy, event)
        except torch.OutOfMemoryError:
            raise make()  # noqa: B904

    monkeypatch.setattr(Faulty, "rank", raises)
    case = Case(f"{__name__}:Faulty", {"fault": "raises", "layer": 1})
    llm = make_llm(folder, case, async_compression=asynchronous, async_scheduling=overlaps, layer_stride=1)
    outputs = llm.generate(ALIGNED, ALIGNED_PARAMS, use_tqdm=False)
    at_fault = outputs.pop(1)
    assert at_fault.error.partition(" (")[0] == f"a compression under policy 'faulty' failed: {text}"
    assert tokens_of(outputs) == [tokens_alone[i] for i in (0, 2, 3)]
    assert llm.stats.blocks_used == llm.stats.query_slots_used == llm.stats.num_compressing == 0


def test_a_prompt_fails_once_however_many_samples_fail(folder):
    llm = make_llm(folder, FAILS, max_num_seqs=2)
    output = llm.generate([PROMPTS[1]], SamplingParams(n=2, max_tokens=100, ignore_eos=True, seed=1), use_tqdm=False)[0]
    assert [sample.finish_reason for sample in output.outputs] == ["error", "error"]
    assert llm.stats.requests_failed == 1
    assert not llm.has_unfinished_requests()


def test_a_stream_ends_with_the_error(folder):
    llm = make_llm(folder, FAILS)
    events = list(llm.stream(PROMPTS[1], greedy(100)))
    assert events[-1].finish_reason == "error"
    assert events[-1].error.partition(" (")[0].endswith("no memory left")
    assert events[-1].token_id is None
    assert all(event.error is None for event in events[:-1])


def spoil_logits(llm, monkeypatch, prompt_len: int, after: int, value: float) -> None:
    """From its output token `after` on, the logits of the request of this prompt length hold `value`."""
    sampler = llm._core.runner.sampler
    sample = sampler.sample

    def spoilt(logits, rows, lens, token_ids):
        num_prompt = sampler.rows.of(rows)["num_prompt_tokens"]
        for place in np.flatnonzero((num_prompt == prompt_len) & (lens - num_prompt >= after)):
            logits[place, 7] = value
        return sample(logits, rows, lens, token_ids)

    monkeypatch.setattr(sampler, "sample", spoilt)


SAMPLED = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 3},
    {"top_k": 5, "seed": 3},
    {"top_p": 0.9, "min_p": 0.01, "seed": 3, "logprobs": True},
    {"repetition_penalty": 1.2, "seed": 3, "stop": ["zz"]},
]


@half(("options", SAMPLED), ("value", [float("nan"), float("inf")]), LOOPS)
def test_logits_that_are_not_finite_end_their_request_alone(folder, monkeypatch, options, value, overlaps):
    params = SamplingParams(max_tokens=30, ignore_eos=True, **options)
    llm = make_llm(folder, None, async_scheduling=overlaps, skip_tokenizer_init=False)
    expected = llm.generate(PROMPTS, params, use_tqdm=False)
    spoil_logits(llm, monkeypatch, prompt_len=17, after=10, value=value)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    (failed,) = outputs[2].outputs
    assert failed.finish_reason == "error"
    assert failed.error == outputs[2].error == "the model's logits for output token 10 are not finite (NaN or infinity)"
    assert failed.token_ids == expected[2].outputs[0].token_ids[:10]
    assert failed.logprobs is None or len(failed.logprobs) == 10
    for i in (0, 1, 3):
        assert outputs[i].error is None
        assert outputs[i].outputs[0].token_ids == expected[i].outputs[0].token_ids
    assert llm.stats.blocks_used == 0
    assert not llm.has_unfinished_requests()


def test_a_prompt_whose_first_logits_are_not_finite_has_no_token(folder, monkeypatch):
    llm = make_llm(folder, None)
    spoil_logits(llm, monkeypatch, prompt_len=17, after=0, value=float("nan"))
    (output,) = llm.generate([PROMPTS[2]], greedy(5), use_tqdm=False)
    assert output.outputs[0].token_ids == []
    assert output.metrics.ttft is None
    assert "output token 0" in output.error


@every_loop
@pytest.mark.parametrize("way", ["save", "restore"])
def test_a_pause_that_fails_ends_its_request_alone(folder, monkeypatch, way, overlaps):
    """No host memory for the entries, or none to be had back."""
    options = {"num_blocks": 24, "headroom": 0, "async_scheduling": overlaps}
    prompts = random_prompts((5, 33, 17, 40, 21, 60), VOCAB)
    params = [greedy(70, seed=i) for i in range(len(prompts))]
    expected = make_llm(folder, Case("random"), **options).generate(prompts, params, use_tqdm=False)
    llm = make_llm(folder, Case("random"), **options)
    events = record_events(llm)
    function, calls = getattr(Swapper, way), []

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory left")
        return function(*args)

    monkeypatch.setattr(Swapper, way, fails_once)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    first = next(e.request_id for e in events if e.kind == ("pause" if way == "save" else "resume"))
    (failed,) = (output for output in outputs if output.error is not None)
    assert failed.request_id == first
    direction = "to" if way == "save" else "from"
    assert failed.error == f"its entries could not be copied {direction} host memory: OutOfMemoryError: no memory left"
    for output, whole in zip(outputs, expected, strict=True):
        tokens = output.outputs[0].token_ids
        assert tokens == whole.outputs[0].token_ids[: len(tokens) if output is failed else None]
    assert llm.stats.blocks_used == llm.stats.query_slots_used == 0
    assert not llm.has_unfinished_requests()
    monkeypatch.undo()
    assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == tokens_of(expected)


class PanicException(BaseException):
    """As pyo3 has it, where the Rust of tokenizers panics."""


@half(
    ("options", [{}, {"stop": ["no such text"]}, {"logprobs": 1}]),
    ("error", [ValueError("Invalid prefix"), PanicException("Invalid prefix")]),
    LOOPS,
)
def test_tokens_that_cannot_be_spelled_end_their_request_alone(folder, monkeypatch, options, error, overlaps):
    params = [greedy(30, **(options if i == 2 else {})) for i in range(4)]
    llm = make_llm(folder, None, async_scheduling=overlaps, skip_tokenizer_init=False)
    expected = llm.generate(PROMPTS, params, use_tqdm=False)
    others = {token for i in (0, 1, 3) for token in expected[i].outputs[0].token_ids}
    bad = next(token for token in expected[2].outputs[0].token_ids[5:-5] if token not in others)

    def decode(token_ids, **options):
        if bad in token_ids:
            raise error
        return spell(token_ids, **options)

    def add(detokenizer, token_id):
        if token_id == bad:
            raise error
        return look_at(detokenizer, token_id)

    tokenizer = llm.get_tokenizer()
    spell, look_at = tokenizer.decode, Detokenizer.add
    monkeypatch.setattr(tokenizer, "decode", decode)
    monkeypatch.setattr(Detokenizer, "add", add)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    (failed,) = outputs[2].outputs
    assert failed.finish_reason == "error"
    assert failed.error == outputs[2].error == f"its tokens cannot be spelled: {type(error).__name__}: Invalid prefix"
    assert failed.token_ids == expected[2].outputs[0].token_ids[: len(failed.token_ids)]
    assert failed.metrics is not None
    for i in (0, 1, 3):
        assert outputs[i].error is None
        assert outputs[i].outputs[0].text == expected[i].outputs[0].text
    assert (llm.stats.requests_failed, llm.stats.requests_finished) == (1, 7)
    assert llm.stats.blocks_used == 0
    assert not llm.has_unfinished_requests()


@every_loop
def test_a_listener_that_raises_is_logged_and_costs_nothing(folder, caplog, overlaps):
    zipage = Case("zipage", {"chunk": 32})
    expected = make_llm(folder, zipage).generate(PROMPTS, greedy(100), use_tqdm=False)
    llm = make_llm(folder, zipage, debug=False, async_scheduling=overlaps)
    calls = []

    def fails(record):
        calls.append(record)
        raise OSError("disk full")

    llm.step_listeners.append(fails)
    llm.event_listeners.append(fails)
    events = record_events(llm)
    with caplog.at_level(logging.ERROR):
        outputs = llm.generate(PROMPTS, greedy(100), use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(expected)
    assert len(calls) == 2, "one step, one event"
    assert caplog.text.count("OSError: disk full") == 2
    assert len(events) == llm.stats.compressions_applied > 0
    assert llm.stats.blocks_used == 0


@every_loop
@pytest.mark.parametrize("part", ["move", "launch"])
def test_a_step_that_breaks_is_not_taken_up_again(folder, monkeypatch, part, overlaps):
    """What it had planned, such as blocks to copy, is lost: the tokens after it would be wrong."""
    llm = make_llm(folder, None, async_scheduling=overlaps)
    stream = llm.stream(PROMPTS[0], greedy(50))
    next(stream)

    def breaks(plan):
        raise OSError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(llm._core.runner, part, breaks)
        with pytest.raises(OSError, match="is gone"):
            llm.generate(PROMPTS, greedy(5), use_tqdm=False)
    for call in (
        llm.step,
        lambda: next(stream),
        lambda: llm.add_request([1, 2]),
        lambda: llm.generate([[1, 2]], greedy(5), use_tqdm=False),
    ):
        with pytest.raises(RuntimeError, match=r"has failed .*OSError: the device is gone.*make a new LLM"):
            call()
    assert not llm.abort("0")
    llm.shutdown()


def test_an_error_that_cannot_say_what_it_is_hides_no_failure(folder, monkeypatch):
    llm = make_llm(folder, None)

    class Silent(RuntimeError):
        __str__ = Mute.__str__

    def breaks(plan):
        raise Silent

    class Unreadable(list):
        def __iter__(self):
            raise Silent

    (output,) = llm.generate([Unreadable([1, 2])], greedy(5), use_tqdm=False)
    assert output.error == "the prompt cannot be read (Silent)"
    monkeypatch.setattr(llm._core.runner, "launch", breaks)
    with pytest.raises(Silent):
        llm.generate(PROMPTS, greedy(5), use_tqdm=False)
    with pytest.raises(RuntimeError, match=r"has failed and serves nothing more \(Silent\)"):
        llm.step()


@every_loop
def test_ctrl_c_comes_between_two_steps(folder, monkeypatch, overlaps):
    llm = make_llm(folder, Case("zipage", {"chunk": 32}), async_scheduling=overlaps)
    expected = llm.generate(PROMPTS, greedy(100), use_tqdm=False)
    stream = llm.stream(PROMPTS[1], greedy(100))
    streamed = [next(stream) for _ in range(3)]
    advance, steps = llm._core.scheduler.advance, []

    def interrupted(plan):
        advance(plan)
        steps.append(plan)
        if len(steps) == 40:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(llm._core.scheduler, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, greedy(100), use_tqdm=False)
    assert len(steps) == 40
    streamed += stream
    assert [event.token_id for event in streamed] == expected[1].outputs[0].token_ids
    assert not llm.has_unfinished_requests()
    assert llm.stats.blocks_used == 0
    assert tokens_of(llm.generate(PROMPTS, greedy(100), use_tqdm=False)) == tokens_of(expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
