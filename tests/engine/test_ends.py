"""What ends a request's text, and what of it is text."""

import pytest

from tests.engine.small_llm import GREEDY, make_llm, small_folder, small_llm, small_shared_llm, text_of  # noqa: F401
from tests.engine.test_detokenizer import byte_fallback
from tests.tiny_models import save_tiny_model
from zipage import SamplingParams
from zipage.engine.detokenizer import decode


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
