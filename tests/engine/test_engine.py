"""The engine's public face: what it answers to good requests, streams and aborts."""

import time

import pytest

from tests.engine.small_llm import GREEDY, make_llm, small_folder, small_llm, small_shared_llm, text_of  # noqa: F401
from zipage import SamplingParams


def test_outputs_come_in_order_with_their_records(llm):
    seen = []
    llm.step_listeners.append(seen.append)
    before = llm.stats
    outputs = llm.generate(["hello", [1, 2, 3], "a longer prompt"], GREEDY, use_tqdm=False)
    llm.step_listeners.clear()
    assert [o.prompt for o in outputs] == ["hello", None, "a longer prompt"]
    assert outputs[1].prompt_token_ids == [1, 2, 3]
    for output in outputs:
        (sample,) = output.outputs
        assert sample.finish_reason in ("stop", "length")
        assert sample.metrics.output_tokens == len(sample.token_ids) <= 20
        assert 0 <= sample.metrics.queued <= sample.metrics.ttft <= sample.metrics.e2e
    assert llm.stats.steps - before.steps == len(seen)
    assert sum(s.num_decode + s.num_prefill for s in seen) >= sum(len(o.outputs[0].token_ids) for o in outputs)
    assert sum(s.prefill_tokens for s in seen) == 5 + 3 + 15
    assert all(s.step_time >= s.device_time > 0 and s.blocks_used <= s.blocks_total for s in seen)


def test_one_prompt_may_stand_alone(llm):
    assert len(llm.generate("hello", GREEDY, use_tqdm=False)) == 1
    assert len(llm.generate([5, 6], GREEDY, use_tqdm=False)) == 1
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_params_may_differ_per_prompt(llm):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5, 9)]
    outputs = llm.generate([[1, 2]] * 3, params, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 5, 9]
    with pytest.raises(ValueError, match="2 sampling params for 3 prompts"):
        llm.generate([[1, 2]] * 3, params[:2], use_tqdm=False)


def test_seed_decides_the_samples_whatever_the_batch(llm):
    params = SamplingParams(temperature=1.0, max_tokens=30, seed=11, n=3, ignore_eos=True)
    alone = [s.token_ids for s in llm.generate([[1, 2, 3]], params, use_tqdm=False)[0].outputs]
    assert len({tuple(tokens) for tokens in alone}) == 3
    noise = SamplingParams(temperature=1.0, max_tokens=40)
    crowd = llm.generate([[9], [1, 2, 3], [8, 7]], [noise, params, noise], use_tqdm=False)
    assert [s.token_ids for s in crowd[1].outputs] == alone
    other = SamplingParams(temperature=1.0, max_tokens=30, seed=12, n=3, ignore_eos=True)
    assert [s.token_ids for s in llm.generate([[1, 2, 3]], other, use_tqdm=False)[0].outputs] != alone


def test_requests_without_a_seed_follow_the_engines(folder):
    params = SamplingParams(temperature=1.0, max_tokens=20)

    def run(seed):
        llm = make_llm(folder, seed=seed)
        return [o.outputs[0].token_ids for o in llm.generate([[1, 2]] * 2, params, use_tqdm=False)]

    first = run(0)
    assert first == run(0)
    assert first[0] != first[1]
    assert first != run(1)


def test_sampling_survives_preemption(folder):
    params = SamplingParams(temperature=1.0, max_tokens=60, seed=5, repetition_penalty=1.3, ignore_eos=True)
    prompts = [[i, i + 1, i + 2] * 5 for i in range(6)]
    roomy = make_llm(folder).generate(prompts, params, use_tqdm=False)
    tight = make_llm(folder, num_blocks=12)
    outputs = tight.generate(prompts, params, use_tqdm=False)
    assert tight.stats.preemptions > 0
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in roomy]


def test_stream_gives_the_same_text_piece_by_piece(llm):
    text, tokens = text_of(llm)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=True)
    events = list(llm.stream("Once upon a time", params))
    assert [e.token_id for e in events] == tokens
    assert "".join(e.text for e in events) == text
    assert all(e.logprob <= 0 for e in events)
    assert [e.finish_reason for e in events] == [None] * 59 + ["length"]
    both = list(llm.stream("Once upon a time", SamplingParams(temperature=0, n=2, max_tokens=9, ignore_eos=True)))
    for index in (0, 1):
        assert [e.token_id for e in both if e.index == index] == tokens[:9]


def test_many_are_streamed_beside_each_other(llm):
    params = [SamplingParams(seed=i, n=2, max_tokens=9 + i, ignore_eos=True, logprobs=2) for i in range(3)]
    prompts = ["Once", [1, 2, 3], "upon a time"]
    expected = llm.generate(prompts, params, use_tqdm=False)
    ids = [llm.add_request(prompt, p, stream=True) for prompt, p in zip(prompts, params)]
    whole = llm.add_request("beside", GREEDY)
    events, outputs, most = [], [], 0
    while llm.has_unfinished_requests():
        outputs += llm.step()
        new = llm.take_events()
        most = max(most, len(new))
        events += new
    assert most == 6
    assert [output.request_id for output in outputs] == [whole]
    assert llm.take_events() == []
    for request_id, output in zip(ids, expected, strict=True):
        for sample in output.outputs:
            mine = [e for e in events if (e.request_id, e.index) == (request_id, sample.index)]
            assert [e.token_id for e in mine] == sample.token_ids
            assert "".join(e.text for e in mine) == sample.text
            assert [e.logprobs.keys() for e in mine] == [of.keys() for of in sample.logprobs]
            last = mine[-1]
            assert (last.finish_reason, last.metrics.output_tokens) == ("length", len(sample.token_ids))
            assert all(e.metrics is None for e in mine[:-1])
    stopped = llm.add_request([1, 2, 3], SamplingParams(max_tokens=500, ignore_eos=True), stream=True)
    llm.step()
    assert llm.abort(stopped)
    assert [e.finish_reason for e in llm.take_events()] == [None, "abort"]
    with pytest.raises(ValueError, match="a stream returns none"):
        llm.add_request([1], SamplingParams(return_hidden_states=True), stream=True)
    assert not llm.has_unfinished_requests()


def test_prompts_are_tokenized_as_they_are_served(llm):
    assert llm.tokenize("hello").token_ids == llm.generate("hello", GREEDY, use_tqdm=False)[0].prompt_token_ids
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert llm.tokenize_chat(messages) == (output.prompt, output.prompt_token_ids)
    for call in (lambda: llm.tokenize(5), lambda: llm.tokenize_chat([]), lambda: llm.tokenize_chat(messages, **BOTH)):
        with pytest.raises(ValueError, match=r"prompt|messages"):
            call()


BOTH = {"add_generation_prompt": True, "continue_final_message": True}


def test_leaving_a_stream_aborts_it(llm):
    aborted = llm.stats.requests_aborted
    stream = llm.stream("Once upon a time", SamplingParams(max_tokens=500, ignore_eos=True))
    for _ in range(3):
        next(stream)
    stream.close()
    assert llm.stats.requests_aborted == aborted + 1
    with pytest.raises(ValueError, match="empty"):
        llm.stream([])


def test_abort_leaves_the_others_alone(llm):
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = llm.generate([[1, 2, 3]], params, use_tqdm=False)[0].outputs[0].token_ids
    first = llm.add_request([1, 2, 3], params)
    second = llm.add_request([4, 5, 6], params, request_id="mine")
    with pytest.raises(ValueError, match="already in use"):
        llm.add_request([4, 5, 6], params, request_id="mine")
    done = {}
    for step in range(100):
        done |= {o.request_id: o for o in llm.step()}
        if step == 10:
            assert llm.abort("mine")
            assert not llm.abort("mine")
            assert not llm.abort("nobody")
        if not llm.has_unfinished_requests():
            break
    assert done[first].outputs[0].token_ids == expected
    assert done[second].outputs[0].finish_reason == "abort"
    assert len(done[second].outputs[0].token_ids) == 11


def test_generate_does_not_swallow_what_others_queued(llm):
    other = llm.add_request([4, 5, 6], GREEDY)
    outputs = llm.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [40]
    assert [o.request_id for o in llm.step()] == [other]


def test_an_interrupted_generate_leaves_no_request_behind(llm):
    def interrupt(_):
        raise KeyboardInterrupt

    llm.step_listeners.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2]] * 3, GREEDY, use_tqdm=False)
    llm.step_listeners.clear()
    assert not llm.has_unfinished_requests()


def test_prefix_hits_are_counted_and_off_is_off(folder):
    prompt = list(range(40))
    for caching, cached in ((True, 32), (False, 0)):
        llm = make_llm(folder, enable_prefix_caching=caching)
        llm.generate([prompt], GREEDY, use_tqdm=False)
        assert llm.generate([prompt], GREEDY, use_tqdm=False)[0].metrics.cached_tokens == cached


def test_ttft_runs_from_the_arrival(llm):
    llm.add_request([1, 2, 3], GREEDY)
    time.sleep(0.05)
    while not (done := llm.step()):
        assert llm.has_unfinished_requests()
    assert done[0].metrics.ttft >= done[0].metrics.queued >= 0.05


def test_ids_that_are_made_up_are_apart_from_the_callers(folder):
    llm = make_llm(folder)
    for taken in ("3", "auto-3"):  # what the second of three prompts would be called
        llm.add_request([4, 5, 6], GREEDY, request_id=taken)
    outputs = llm.generate([[1, 2], [3], [4]], GREEDY, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * 3
    assert len({output.request_id for output in outputs} | {"3", "auto-3"}) == 5


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_stream_that_is_dropped_is_aborted(folder, taken):
    llm = make_llm(folder)
    events = llm.stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    for _ in range(taken):
        next(events)
    del events
    assert not llm.has_unfinished_requests()
    assert (llm.stats.requests_aborted, llm.stats.blocks_used) == (1, 0)


def test_after_shutdown_nothing_is_served(folder):
    llm = make_llm(folder)
    first = llm.add_request([1, 2, 3], GREEDY)
    llm.shutdown()
    assert [(output.request_id, output.outputs[0].finish_reason) for output in llm.step()] == [(first, "abort")]
    for call in (llm.step, lambda: llm.add_request([1]), lambda: llm.generate([[1]]), lambda: llm.stream([1])):
        with pytest.raises(RuntimeError, match="was shut down"):
            call()
    llm.shutdown()


def test_a_stream_that_the_garbage_collector_drops_in_mid_step_waits_for_its_end(folder):
    llm = make_llm(folder)
    expected = llm.generate([[7, 8]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    dropped = [llm.stream([1, 2, 3], SamplingParams(max_tokens=400, ignore_eos=True))]
    other = llm.add_request([7, 8], GREEDY)
    launch = llm._core.runner.launch
    llm._core.runner.launch = lambda plan: (dropped.clear(), launch(plan))[1]
    done = llm.step()
    assert llm.stats.requests_aborted == 1
    while llm.has_unfinished_requests():
        done += llm.step()
    assert [(output.request_id, output.outputs[0].token_ids) for output in done] == [(other, expected)]
