"""Forced tokens, follow-ups, and the hidden states that tokens are drawn from."""

import pytest
import torch

from tests.engine.compressed import greedy, make_llm, pause_now_and_then, random_prompts, tokens_of
from tests.eviction.cases import Case
from tests.tiny_models import VOCAB, save_tiny_model
from zipage import LLM, SamplingParams

PROMPTS = random_prompts((5, 33, 17, 9, 70, 40), VOCAB)
FOLLOW_UPS = random_prompts((3, 1, 20), VOCAB, seed=5)
ZIPAGE = Case("zipage", {"chunk": 32})
NUM_TOKENS = 64
CASES = {
    "full": (None, {}),
    "preempted": (None, {"num_blocks": 16}),
    "zipage": (ZIPAGE, {"async_compression": False}),
    "zipage beside": (ZIPAGE, {"async_compression": True}),
    "random": (Case("random", protection="prompt"), {}),
    "pages": (Case("page_random", {"page_size": 16}), {}),
}
LOOPS = pytest.mark.parametrize("async_scheduling", [False, True], ids=["step by step", "overlapped"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=2)


def with_ends(llm: LLM, **options) -> list[SamplingParams]:
    """For each prompt, options under which tokens that it draws anyway are end tokens."""
    drawn = tokens_of(llm.generate(PROMPTS, greedy(12), use_tqdm=False))
    return [greedy(NUM_TOKENS, seed=3, stop_token_ids=[tokens[4], tokens[11]], **options) for tokens in drawn]


def read_back(tokens: list[int], params: SamplingParams) -> list[bool]:
    """Of each output token, whether it was drawn, as the options alone tell."""
    drawn, follow_ups, given, answer = [], list(params.follow_ups), [*params.forced_token_ids], 0
    for token in tokens:
        if given:
            assert token == given.pop(0)
            drawn.append(False)
            continue
        drawn.append(True)
        answer += 1
        is_cut = answer == params.max_turn_tokens and token not in params.stop_token_ids
        if (is_cut or token in params.stop_token_ids) and follow_ups:
            given = [*([params.stop_token_ids[0]] if is_cut else []), *follow_ups.pop(0)]
            answer = 0
    return drawn


@LOOPS
@pytest.mark.parametrize("case", CASES)
def test_follow_ups_come_after_end_tokens_and_the_rest_is_drawn_from_what_stands_there(folder, case, async_scheduling):
    case, options = CASES[case]
    llm = make_llm(folder, case, budget=32, async_scheduling=async_scheduling, headroom=0, **options)
    pause_now_and_then(llm)
    params = with_ends(llm, follow_ups=FOLLOW_UPS, max_turn_tokens=15, return_hidden_states=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert (llm.stats.compressions_applied > 0) == (case is not None)
    assert (llm.stats.preemptions > 0) == ("num_blocks" in options)
    num_given = 0
    for output, asked in zip(outputs, params, strict=True):
        sample = output.outputs[0]
        drawn = torch.tensor(read_back(sample.token_ids, asked))
        num_given += int((~drawn).sum())
        assert sample.finish_reason in ("stop", "length")
        assert len(sample.hidden_states) == len(sample.token_ids)
        best = llm.compute_logits(sample.hidden_states).argmax(dim=-1)
        assert (best == torch.tensor(sample.token_ids))[drawn].all()
    assert num_given > len(PROMPTS) * len(FOLLOW_UPS)
    # The same tokens, all of them forced from the start, are drawn from the same states: what was fed is what stands.
    texts = tokens_of(outputs)
    again = [greedy(len(t), seed=3, forced_token_ids=t, return_hidden_states=True) for t in texts]
    for output, forced in zip(outputs, llm.generate(PROMPTS, again, use_tqdm=False), strict=True):
        first, second = output.outputs[0], forced.outputs[0]
        assert second.token_ids == first.token_ids
        assert second.finish_reason == "length"
        torch.testing.assert_close(second.hidden_states, first.hidden_states, rtol=1e-4, atol=1e-4)


@LOOPS
def test_a_conversation_under_full_kv_is_what_its_turns_are_one_by_one(folder, async_scheduling):
    llm = make_llm(folder, None, async_scheduling=async_scheduling)
    params = with_ends(llm, follow_ups=FOLLOW_UPS)
    outputs = tokens_of(llm.generate(PROMPTS, params, use_tqdm=False))
    for prompt, asked, output in zip(PROMPTS, params, outputs, strict=True):
        text = [*prompt]
        for follow_up in [*FOLLOW_UPS, []]:
            left = len(prompt) + NUM_TOKENS - len(text)
            single = greedy(left, stop_token_ids=asked.stop_token_ids)
            text += tokens_of(llm.generate([text], single, use_tqdm=False))[0]
            if text[-1] not in asked.stop_token_ids:
                break
            text += follow_up
        assert output == text[len(prompt) :][:NUM_TOKENS]


@LOOPS
def test_forced_tokens_that_a_free_run_drew_change_nothing_after_them(folder, async_scheduling):
    llm = make_llm(folder, ZIPAGE, budget=32, async_scheduling=async_scheduling)
    free = tokens_of(llm.generate(PROMPTS, greedy(60), use_tqdm=False))
    params = [greedy(60, forced_token_ids=tokens[:n]) for tokens, n in zip(free, (1, 40, 59, 60, 50, 7), strict=True)]
    assert tokens_of(llm.generate(PROMPTS, params, use_tqdm=False)) == free
    assert llm.stats.compressions_applied > 2 * len(PROMPTS)


def test_forced_tokens_stand_though_others_are_likelier_and_do_not_end_the_request(folder):
    llm = make_llm(folder, None)
    drawn = tokens_of(llm.generate(PROMPTS[:1], greedy(3), use_tqdm=False))[0]
    forced = [(drawn[0] + 1) % VOCAB, drawn[0], (drawn[0] + 2) % VOCAB]
    params = SamplingParams(temperature=0, max_tokens=8, forced_token_ids=forced, stop_token_ids=forced)
    sample = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0]
    assert sample.token_ids[:3] == forced
    assert len(sample.token_ids) > 3


def test_an_answer_that_is_cut_short_without_a_follow_up_ends_the_request(folder):
    llm = make_llm(folder, None)
    sample = llm.generate(PROMPTS[0], greedy(50, max_turn_tokens=7), use_tqdm=False)[0].outputs[0]
    assert (len(sample.token_ids), sample.finish_reason) == (7, "length")


def test_a_penalty_counts_forced_tokens(folder):
    llm = make_llm(folder, None)
    free = tokens_of(llm.generate(PROMPTS, greedy(30, frequency_penalty=2.0), use_tqdm=False))
    params = [greedy(30, frequency_penalty=2.0, forced_token_ids=tokens[:20]) for tokens in free]
    assert tokens_of(llm.generate(PROMPTS, params, use_tqdm=False)) == free


def test_hidden_states_are_those_of_transformers(folder):
    from transformers import AutoModelForCausalLM

    llm = make_llm(folder, None)
    params = greedy(20, return_hidden_states=True)
    sample = llm.generate(PROMPTS[4], params, use_tqdm=False)[0].outputs[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = torch.tensor([PROMPTS[4] + sample.token_ids[:-1]])
    with torch.no_grad():
        states = model.model(text).last_hidden_state[0, len(PROMPTS[4]) - 1 :]
        logits = model(text).logits[0, len(PROMPTS[4]) - 1 :]
    torch.testing.assert_close(sample.hidden_states, states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(llm.compute_logits(sample.hidden_states), logits, rtol=1e-4, atol=1e-4)
    assert llm.generate(PROMPTS[4], greedy(2), use_tqdm=False)[0].outputs[0].hidden_states is None
    with pytest.raises(ValueError, match="must be"):
        llm.compute_logits(sample.hidden_states[:, :-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forced_token_ids": [1] * 5, "max_tokens": 4}, "raise max_tokens"),
        ({"follow_ups": [[1], []]}, "no tokens"),
        ({"follow_ups": [[1]], "max_turn_tokens": 5}, "stop_token_ids"),
        ({"follow_ups": [[1]], "stop": "x"}, "use stop_token_ids"),
        ({"return_hidden_states": True, "stop": "x"}, "use stop_token_ids"),
        ({"forced_token_ids": [1], "logprobs": 1}, "return_hidden_states"),
        ({"follow_ups": [[-1]]}, "at least 0"),
        ({"forced_token_ids": 5}, "must be a list"),
        ({"follow_ups": [[1.5]]}, "each item: each item must be an integer"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_a_stream_has_no_hidden_states_to_return(folder):
    llm = make_llm(folder, None)
    with pytest.raises(ValueError, match="use generate"):
        llm.stream(PROMPTS[0], greedy(4, return_hidden_states=True))
    assert not llm.has_unfinished_requests()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forced_token_ids": [VOCAB]}, "forced_token_ids"),
        ({"follow_ups": [[VOCAB]], "stop_token_ids": [3]}, "follow_ups"),
        ({"follow_ups": [[1]], "ignore_eos": True}, "no"),
    ],
)
def test_what_the_engine_cannot_feed_costs_one_request(folder, options, message):
    llm = make_llm(folder, None)
    good, bad = llm.generate(PROMPTS[:2], [greedy(4), SamplingParams(**options)], use_tqdm=False)
    assert good.error is None
    assert message in bad.error
