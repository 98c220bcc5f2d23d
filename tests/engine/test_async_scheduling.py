"""Steps launched before the tokens of the one before are known: the same outputs, and a launch always ahead."""

import pytest

from tests.engine.compressed import (
    ended_while_paused,
    greedy,
    make_llm,
    pause_now_and_then,
    random_prompts,
    record_events,
    tokens_of,
)
from tests.eviction.cases import Case
from tests.tiny_models import VOCAB, save_tiny_model, save_tiny_tokenizer
from zipage import SamplingParams
from zipage.worker.model_runner import Launch

PROMPTS = random_prompts((5, 33, 17, 9, 70, 40), VOCAB)
ZIPAGE = Case("zipage", {"chunk": 32})
SETTINGS = {
    "full": (None, {}),
    "preempted": (None, {"num_blocks": 13}),
    "chunked": (None, {"max_num_batched_tokens": 24}),
    "no prefix cache": (None, {"enable_prefix_caching": False}),
    "compressed": (ZIPAGE, {"async_compression": False}),
    "compressed beside": (ZIPAGE, {"async_compression": True}),
    "constrained": (ZIPAGE, {"scheduling": "constrained", "num_blocks": 25}),
    "pages": (Case("page_random", {"page_size": 16}), {}),
    "pressure": (Case("random"), {"trigger": "pressure", "num_blocks": 400}),
    "shared prompts": (Case("random", protection="prompt"), {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    save_tiny_tokenizer(folder)
    return folder


def pair(folder, case=None, **options):
    """The same engine, step by step and overlapped."""
    return [make_llm(folder, case, async_scheduling=overlaps, **options) for overlaps in (False, True)]


def calls_of(llm, monkeypatch) -> list[str]:
    """ "launch" and "wait" of the engine's steps, as they happen."""
    calls, launch = [], llm._core.runner.launch

    class Recorded(Launch):
        def wait(self):
            calls.append("wait")
            return super().wait()

    def recorded(plan):
        calls.append("launch")
        under_way = launch(plan)
        return Recorded(under_way.tokens, under_way.logprobs, under_way.hidden, under_way.device_time)

    monkeypatch.setattr(llm._core.runner, "launch", recorded)
    return calls


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("paused", [False, True])
def test_outputs_are_those_of_steps_one_by_one(folder, setting, paused):
    case, options = SETTINGS[setting]
    stop = {"stop_token_ids": list(range(6)), "ignore_eos": True}
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=44, n=1 + i % 2, **stop) for i in range(len(PROMPTS))]
    outputs = []
    for llm in pair(folder, case, **options):
        if paused:
            pause_now_and_then(llm)
        outputs.append(tokens_of(llm.generate(PROMPTS, params, use_tqdm=False)))
        assert llm.stats.blocks_used == llm.stats.query_slots_used == llm.stats.num_running == 0
        assert llm.stats.output_tokens == sum(map(len, outputs[-1]))
    assert outputs[0] == outputs[1]
    lengths = [len(tokens) for tokens in outputs[0]]
    assert min(lengths) < 44 == max(lengths), "some end early, and others by length"


def test_a_step_is_launched_before_the_tokens_of_the_last_are_read(folder, monkeypatch):
    for llm, expected in zip(pair(folder), (["launch", "wait"] * 5, ["launch", *["launch", "wait"] * 4, "wait"])):
        calls = calls_of(llm, monkeypatch)
        llm.generate([1, 2, 3], greedy(5), use_tqdm=False)
        assert calls == expected


def test_an_end_token_costs_one_step_more_and_leaves_nothing(folder, monkeypatch):
    plain, overlapped = pair(folder)
    free = tokens_of(plain.generate([1, 2, 3], greedy(20), use_tqdm=False))[0]
    stop = next(token for token in free[3:] if free.index(token) == free[3:].index(token) + 3)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[stop], logprobs=True)
    counts = []
    for llm in (plain, overlapped):
        calls = calls_of(llm, monkeypatch)
        (sample,) = llm.generate([1, 2, 3], params, use_tqdm=False)[0].outputs
        assert sample.token_ids == free[: free.index(stop) + 1]
        assert sample.finish_reason == "stop"
        assert sample.stop_reason == stop
        assert len(sample.logprobs) == sample.metrics.output_tokens == len(sample.token_ids)
        assert llm.stats.blocks_used == 0
        counts.append(calls.count("launch"))
    assert counts[1] == counts[0] + 1


def test_steps_wait_for_tokens_that_a_repetition_penalty_needs(folder, monkeypatch):
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, repetition_penalty=1.3)
    plain, overlapped = pair(folder)
    expected = tokens_of(plain.generate(PROMPTS, params, use_tqdm=False))
    calls = calls_of(overlapped, monkeypatch)
    assert tokens_of(overlapped.generate(PROMPTS, params, use_tqdm=False)) == expected
    assert calls == ["launch", "wait"] * (len(calls) // 2)


def test_stop_strings_and_streams(folder):
    plain, overlapped = pair(folder, skip_tokenizer_init=False)
    params = greedy(30)
    text = plain.generate("hello", params, use_tqdm=False)[0].outputs[0].text
    stop = text[8:11]
    stopped = [
        llm.generate("hello", greedy(30, stop=[stop]), use_tqdm=False)[0].outputs[0] for llm in (plain, overlapped)
    ]
    assert stopped[0].text == stopped[1].text == text[: text.index(stop)]
    assert stopped[0].token_ids == stopped[1].token_ids
    streams = [list(llm.stream("hello", params)) for llm in (plain, overlapped)]
    told = [[(event.token_id, event.text, event.finish_reason) for event in events] for events in streams]
    assert told[0] == told[1]
    assert "".join(event.text for event in streams[1]) == text


def test_leaving_a_stream_early_aborts_its_request(folder):
    llm = make_llm(folder, None, async_scheduling=True)
    for number, _ in enumerate(llm.stream([1, 2, 3], greedy(30))):
        if number == 4:
            break
    assert not llm.has_unfinished_requests()
    assert llm.stats.blocks_used == 0


def test_an_abort_drops_the_token_under_way(folder):
    llm = make_llm(folder, None, async_scheduling=True)
    expected = tokens_of(llm.generate([[1, 2, 3]], greedy(30), use_tqdm=False))[0]
    first = llm.add_request([1, 2, 3], greedy(30))
    llm.add_request([4, 5, 6], greedy(30), request_id="mine")
    for _ in range(11):
        assert llm.step() == []
    assert llm.abort("mine")
    done = {}
    while llm.has_unfinished_requests():
        done |= {output.request_id: output.outputs[0] for output in llm.step()}
    assert done[first].token_ids == expected
    assert len(done["mine"].token_ids) == 10
    assert llm.stats.blocks_used == 0


def test_a_request_may_end_while_it_is_paused(folder):
    """Its last token was under way when it left: it ends with it, is never resumed, and nothing of it is left."""
    params = [greedy(40, seed=i) for i in range(len(PROMPTS))]
    tokens = []
    for llm in pair(folder, Case("random")):
        events = record_events(llm)
        pause_now_and_then(llm, share=0.9)
        tokens.append(tokens_of(llm.generate(PROMPTS, params, use_tqdm=False)))
        stats, ended = llm.stats, ended_while_paused(events)
        assert stats.pauses == stats.resumes + ended > 10
        assert stats.blocks_used == stats.query_slots_used == 0
    assert ended > 0
    assert tokens[0] == tokens[1]


def test_a_finished_text_is_found_by_the_next_prompt(folder):
    """Blocks that fill while their last token is on the device alone enter the prefix index all the same."""
    cached = []
    for llm in pair(folder):
        (output,) = llm.generate([PROMPTS[0]], greedy(60), use_tqdm=False)
        follow_up = PROMPTS[0] + output.outputs[0].token_ids + [7, 8, 9]
        (output,) = llm.generate([follow_up], greedy(5), use_tqdm=False)
        cached.append(output.metrics.cached_tokens)
    assert cached[0] == cached[1] >= 48
