"""The engine's public face: what it answers to good and bad requests."""

import json
import time
from collections.abc import Sequence

import numpy as np
import pytest

from tests.engine.test_detokenizer import byte_fallback
from tests.tiny_models import VOCAB, save_tiny_model, save_tiny_tokenizer
from zipage import LLM, SamplingParams
from zipage.engine.detokenizer import decode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))
    save_tiny_tokenizer(folder)
    return folder


def make_llm(folder, **options) -> LLM:
    defaults = {"device": "cpu", "block_size": 16, "num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return LLM(str(folder), **defaults | {"debug": True} | options)


@pytest.fixture(scope="module")
def shared_llm(folder):
    return make_llm(folder)


@pytest.fixture
def llm(shared_llm):
    yield shared_llm
    assert not shared_llm.has_unfinished_requests()
    assert shared_llm.stats.blocks_used == 0


GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


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


class Unreadable(Sequence):
    """Token ids that can't be had."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise OSError("the disk is gone")


BAD_PROMPTS = {
    "empty": ([], "empty"),
    "too long for the model": ([1] * 1024, "max_model_len=1024"),
    "outside the vocabulary": ([1, VOCAB], f"token id {VOCAB} is outside the vocabulary"),
    "negative": ([-1], "outside the vocabulary"),
    "no prompt at all": (None, "a prompt is text or a list of token ids"),
    "nested": (["a", 1], "a prompt is text or a list of token ids"),
    "no dimension": (np.array(3), "the prompt cannot be read (TypeError: iteration over a 0-d array)"),
    "unreadable": (Unreadable(), "the prompt cannot be read (OSError: the disk is gone)"),
}


@pytest.mark.parametrize("bad", BAD_PROMPTS)
def test_a_bad_prompt_costs_itself_only(llm, bad):
    prompt, message = BAD_PROMPTS[bad]
    good = llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    outputs = llm.generate([[1, 2, 3], prompt, [1, 2, 3]], GREEDY, use_tqdm=False)
    assert message in outputs[1].error
    assert "\n" not in outputs[1].error
    assert outputs[1].outputs[0].finish_reason == "error"
    assert [o.outputs[0].token_ids for o in (outputs[0], outputs[2])] == [good, good]
    with pytest.raises(ValueError, match=r"prompt|vocabulary"):
        llm.add_request(prompt)


def test_a_prompt_larger_than_the_pool_is_refused(folder):
    llm = make_llm(folder, num_blocks=4)
    outputs = llm.generate([[1] * 64, [1] * 63], GREEDY, use_tqdm=False)
    assert "the KV pool holds 64 (4 blocks of 16)" in outputs[0].error
    assert outputs[1].error is None


def test_a_request_that_outgrows_the_pool_ends_there_and_others_go_on(folder):
    llm = make_llm(folder, num_blocks=4)
    params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    short = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    outputs = llm.generate([[1, 2, 3], [4, 5]], [params, short], use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "capacity"
    assert len(outputs[0].outputs[0].token_ids) == 61
    assert len(outputs[1].outputs[0].token_ids) == 30


def test_the_context_ends_a_request(folder):
    llm = make_llm(folder, max_model_len=32)
    output = llm.generate([[1] * 20], SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)[0]
    assert (output.outputs[0].finish_reason, len(output.outputs[0].token_ids)) == ("length", 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blok_size": 16}, "unknown option 'blok_size'; did you mean block_size"),
        ({"block_size": 24}, "block_size=24: must be a power of two"),
        ({"num_blocks": 0}, "num_blocks=0: must be at least 1"),
        ({"max_model_len": 9999}, "max_model_len=9999: the model's positions end at 1024"),
        ({"max_num_batched_tokens": 4}, "max_num_batched_tokens=4: must be at least max_num_seqs=8"),
        ({"enable_chunked_prefill": False}, "max_num_batched_tokens=64 must hold max_model_len=1024"),
        ({"num_blocks": None, "kv_cache_memory_bytes": 100}, "no room for a KV block"),
        ({"kv_cache_memory_bytes": 10**6}, "give one of them"),
        ({"policy": "lru"}, "unknown policy 'lru'; known: full, zipage"),
        ({"policy": "zipagee", "budget_tokens": 64}, "did you mean 'zipage'"),
        ({"policy": "zipage"}, "budget_tokens=None: must be given with policy 'zipage'"),
        ({"policy": "zipage", "budget_tokens": 64, "policy_options": {"alfa": 1}}, "did you mean alpha"),
        ({"policy": "zipage", "budget_tokens": 64, "recent_tokens": 64}, "recent_tokens=64 leaves nothing"),
        ({"policy": "random", "budget_tokens": 64, "protection": "sink:60"}, "exceed a budget of 64"),
        ({"policy": "page_random", "budget_tokens": 64}, "page_size=256 is not the block_size=16"),
        ({"trigger": "never"}, "trigger='never': must be one of block_full, pressure"),
        ({"scheduling": "fifo"}, "scheduling='fifo': must be one of hybrid, constrained"),
        ({"layer_stride": 0}, "layer_stride=0: must be at least 1"),
        ({"recent_tokens": -1}, "recent_tokens=-1: must be at least 0"),
        ({"policy_options": {"a": 1}}, "policy 'full' has no options"),
        ({"protection": "sink"}, "protection='sink': must be none, prompt or sink:N"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"dtype": "int8"}, "dtype='int8': must be one of auto"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_llm(folder, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"n": 0}, "n=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -2}, "top_k=-2"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"stop": ("",)}, "stop="),
        ({"seed": "x"}, "seed='x'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_sampling_params_are_named(options, message):
    with pytest.raises(ValueError, match=f"SamplingParams.{message}"):
        SamplingParams(**options)


def test_options_of_eviction_are_said_to_have_no_effect(folder, caplog):
    make_llm(folder)
    assert "without effect" not in caplog.text
    llm = make_llm(folder, budget_tokens=64, protection="sink:4", async_compression=False)
    assert "budget_tokens, protection, async_compression without effect" in caplog.text
    caplog.clear()
    llm.generate([[1, 2]] * 3, SamplingParams(max_tokens=2, budget_tokens=32), use_tqdm=False)
    assert caplog.text.count("SamplingParams.budget_tokens has no effect") == 1
    output = llm.generate([[1]], SamplingParams(policy="random"), use_tqdm=False)[0]
    assert "an engine of policy 'full' reserves no memory" in output.error


def test_text_options_need_a_tokenizer(folder):
    llm = make_llm(folder, skip_tokenizer_init=True)
    assert llm.get_tokenizer() is None
    assert llm.generate([[1, 2]], GREEDY, use_tqdm=False)[0].outputs[0].text == ""
    assert "give token ids" in llm.generate(["hi"], GREEDY, use_tqdm=False)[0].error
    assert "use stop_token_ids" in llm.generate([[1]], SamplingParams(stop="x"), use_tqdm=False)[0].error


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make_llm(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ValueError, match="unknown architecture 'mamba'"):
        make_llm(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        make_llm(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        make_llm(tmp_path, load_format="dummy")
    make_llm(tmp_path, load_format="dummy", skip_tokenizer_init=True)


def text_of(llm, **options) -> tuple[str, list[int]]:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 60, "ignore_eos": True} | options)
    sample = llm.generate(["Once upon a time"], params, use_tqdm=False)[0].outputs[0]
    return sample.text, sample.token_ids


def test_stop_string_ends_the_text_before_it(llm):
    text, tokens = text_of(llm)
    stop = text[10:13]
    output = llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=60, stop=stop), use_tqdm=False)
    sample = output[0].outputs[0]
    assert sample.text == text[: text.index(stop)]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert sample.token_ids == tokens[: len(sample.token_ids)]
    assert len(sample.token_ids) < len(tokens)


def test_stop_string_on_the_last_token_is_a_stop(llm):
    text, _ = text_of(llm)
    end = len(llm.get_tokenizer().encode(text[:13]))
    text, _ = text_of(llm, max_tokens=end)
    params = SamplingParams(temperature=0, max_tokens=end, stop=text[-2:], ignore_eos=True)
    sample = llm.generate(["Once upon a time"], params, use_tqdm=False)[0].outputs[0]
    assert sample.finish_reason == "stop"


def test_stop_token_ends_the_text_with_it(llm):
    _, tokens = text_of(llm)
    stop = tokens[7]
    _, stopped = text_of(llm, stop_token_ids=[stop])
    assert stopped == tokens[: tokens.index(stop) + 1]


def test_the_models_end_token_ends_a_sample_unless_ignored(llm):
    eos = llm.get_tokenizer().eos_token_id
    for ignore_eos in (False, True):
        params = SamplingParams(n=40, temperature=50.0, max_tokens=60, seed=3, ignore_eos=ignore_eos)
        samples = llm.generate(["x"], params, use_tqdm=False)[0].outputs
        assert any(eos in sample.token_ids for sample in samples)
        for sample in samples:
            if eos in sample.token_ids and not ignore_eos:
                assert (sample.finish_reason, sample.stop_reason) == ("stop", eos)
                assert sample.token_ids.index(eos) == len(sample.token_ids) - 1
            else:
                assert (sample.finish_reason, len(sample.token_ids)) == ("length", 60)


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


@pytest.mark.parametrize("request_id", [[], ["mine"], None, 5, b"mine"])
def test_an_abort_takes_one_id(llm, request_id):
    with pytest.raises(ValueError, match=r"request_id=.*: must be a text"):
        llm.abort(request_id)


@pytest.mark.parametrize("request_id", ["", 5, ["mine"]])
def test_a_request_id_is_a_text(llm, request_id):
    with pytest.raises(ValueError, match=r"request_id=.*: must be a text"):
        llm.add_request([1, 2, 3], GREEDY, request_id=request_id)
    assert not llm.has_unfinished_requests()


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


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_the_token_that_ends_a_request_is_no_part_of_its_text(llm, skip_special_tokens):
    free = llm.generate("hello", GREEDY, use_tqdm=False)[0].outputs[0]
    spelled = {token for token in free.token_ids if llm.get_tokenizer().decode([token])}
    at = max(free.token_ids.index(token) for token in spelled)
    ends = free.token_ids[at]
    params = SamplingParams(
        temperature=0.0, max_tokens=20, stop_token_ids=[ends], skip_special_tokens=skip_special_tokens
    )
    whole = llm.generate("hello", params, use_tqdm=False)[0].outputs[0]
    streamed = "".join(event.text for event in llm.stream("hello", params))
    expected = decode(llm.get_tokenizer(), free.token_ids[:at], skip_special_tokens)
    assert whole.text == streamed == expected
    assert whole.token_ids == free.token_ids[: at + 1]
    assert whole.stop_reason == ends


def test_an_end_token_is_no_text_even_where_special_tokens_are(llm):
    tokenizer = llm.get_tokenizer()
    params = SamplingParams(n=40, temperature=50.0, max_tokens=60, seed=3, skip_special_tokens=False)
    samples = llm.generate(["x"], params, use_tqdm=False)[0].outputs
    ended = [sample for sample in samples if sample.finish_reason == "stop"]
    assert ended
    for sample in ended:
        assert sample.token_ids[-1] == tokenizer.eos_token_id
        assert sample.text == decode(tokenizer, sample.token_ids[:-1], skip_special_tokens=False)


def test_a_prompt_that_is_no_text_costs_itself(llm):
    outputs = llm.generate(["good", "a\ud800b", "fine"], GREEDY, use_tqdm=False)
    assert [output.error is None for output in outputs] == [True, False, True]
    assert "character 1 is '\\ud800', a lone surrogate" in outputs[1].error


def test_ids_of_a_tokenizer_beyond_the_embedding_cost_their_prompt(folder, monkeypatch):
    llm = make_llm(folder)
    llm._inputs.tokenizer.add_tokens([f"<{i}>" for i in range(VOCAB)])
    good, bad = llm.generate(["hello", f"hello<{VOCAB - 1}>"], GREEDY, use_tqdm=False)
    assert good.error is None
    assert f"('<{VOCAB - 1}>'), which is outside the vocabulary of {VOCAB}" in bad.error


def test_bytes_that_form_no_text_cost_nobody(tmp_path):
    """A tiny model of random weights draws many; ids from 274 on have no text at all."""
    folder = save_tiny_model("qwen3", tmp_path)
    byte_fallback().save_pretrained(folder)
    llm = make_llm(folder)
    params = [
        SamplingParams(max_tokens=100, seed=seed, ignore_eos=True, stop=stop)
        for seed in range(4)
        for stop in (None, "never seen", ["\n\n", "x" * 50])
    ]
    for output in llm.generate([[1, 2, 3]] * len(params), params, use_tqdm=False):
        (sample,) = output.outputs
        assert output.error is None
        if sample.finish_reason == "length":
            assert sample.text == decode(llm.get_tokenizer(), sample.token_ids)
    events = list(llm.stream([1, 2, 3], params[0]))
    assert "".join(event.text for event in events) == decode(llm.get_tokenizer(), [event.token_id for event in events])


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
