import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from zipage.counters import uniform_rows as uniform
from zipage.sampling_params import SamplingParams
from zipage.scheduling.request import Request
from zipage.worker.sampler import Sampler

VOCAB = 50


def requests_of(*params: SamplingParams, prompt=(1, 2, 3), seed=7) -> list[Request]:
    requests = [Request(str(i), list(prompt), p, seed=seed + i, max_total_tokens=100) for i, p in enumerate(params)]
    for row, request in enumerate(requests):
        request.row = row
    return requests


def sample(logits, *params, **options):
    sampler = Sampler(len(params), logits.shape[1], logits.device)
    return sampler.sample(logits, requests_of(*params, **options))


def draws(logits: torch.Tensor, params: SamplingParams, count: int) -> np.ndarray:
    """Tokens of `count` requests with different seeds over the same logits [vocab]."""
    tokens, _ = sample(logits.expand(count, -1).clone(), *[params] * count)
    return tokens.numpy()


def test_uniform_is_uniform_and_a_function_of_its_counters():
    n = 20_000
    zeros = np.zeros(n, dtype=np.int64)
    steps = np.arange(n)
    for args in ((steps, zeros, zeros), (zeros, steps, zeros), (zeros, zeros, steps)):
        u = uniform(*args)
        assert 0 < u.min() < u.max() < 1
        assert kstest(u, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
    one = uniform(np.array([5]), np.array([1]), np.array([9]))
    assert one == uniform(np.array([4, 5]), np.array([1, 1]), np.array([9, 9]))[1]


def test_greedy_takes_the_best():
    logits = torch.randn(4, VOCAB)
    tokens, logprobs = sample(logits, *[SamplingParams(temperature=0)] * 4)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert logprobs is None


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(temperature=0.7), lambda p: p ** (1 / 0.7)),
        (SamplingParams(top_k=5), lambda p: np.where(p >= np.sort(p)[-5], p, 0)),
        (SamplingParams(min_p=0.3), lambda p: np.where(p >= 0.3 * p.max(), p, 0)),
    ],
    ids=["temperature", "top_k", "min_p"],
)
def test_draws_follow_the_distribution(params, expected):
    torch.manual_seed(0)
    logits = torch.randn(12)
    law = expected(logits.softmax(-1).double().numpy())
    law /= law.sum()
    count = 20_000
    seen = np.bincount(draws(logits, params, count), minlength=12)
    assert (seen[law == 0] == 0).all()
    assert chisquare(seen[law > 0], law[law > 0] * count).pvalue > 1e-4


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(logits, SamplingParams(top_p=0.79), 2000)) == {0, 1}
    assert set(draws(logits, SamplingParams(top_p=0.81), 2000)) == {0, 1, 2}
    assert set(draws(logits, SamplingParams(top_p=1e-6), 100)) == {0}


def test_top_k_is_applied_before_top_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draws(logits, SamplingParams(top_k=2, top_p=0.5), 2000)) == {0}


def test_a_large_vocabulary_is_drawn_to_its_tail():
    count, vocab = 200, 150_000
    tokens = draws(torch.zeros(vocab), SamplingParams(), count)
    assert kstest(tokens / vocab, "uniform").pvalue > 1e-4


def test_ties_at_top_k_keep_exactly_k():
    assert len(set(draws(torch.zeros(20), SamplingParams(top_k=3), 500))) == 3


def test_a_seed_gives_the_same_token_in_any_batch_and_row():
    logits = torch.randn(6, VOCAB)
    params = SamplingParams(temperature=1.0)
    batch, _ = sample(logits, *[params] * 6)
    for i in range(6):
        alone = requests_of(params, seed=7 + i)
        token, _ = Sampler(1, VOCAB, logits.device).sample(logits[i : i + 1], alone)
        assert token.item() == batch[i].item()


def test_a_batch_draws_the_same_tokens_beside_a_request_that_cuts_its_distribution():
    """Without one, the logits are drawn from as they are; with one, every row's probabilities are computed."""
    logits = torch.randn(20, 5000)
    plain, _ = sample(logits, *[SamplingParams(temperature=0.8)] * 20)
    beside, _ = sample(logits, *[SamplingParams(temperature=0.8)] * 19, SamplingParams(min_p=0.1))
    assert beside[:19].tolist() == plain[:19].tolist()


CUTS = [
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.5),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=0.0),
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(top_k=2**62, top_p=0.9),
    SamplingParams(presence_penalty=1.0, frequency_penalty=-0.5),
    SamplingParams(logit_bias={3: -50.0}, min_tokens=2),
]


@pytest.mark.parametrize("neighbour", CUTS, ids=str)
@pytest.mark.parametrize("params", [SamplingParams(), *CUTS], ids=str)
def test_a_row_is_drawn_by_its_own_options_alone(params, neighbour):
    logits = 3 * torch.randn(24, 5000)
    alone, _ = sample(logits[:23], *[params] * 23)
    beside, _ = sample(logits, *[params] * 23, neighbour)
    assert beside[:23].tolist() == alone.tolist()


@pytest.mark.parametrize("params", [SamplingParams(), *CUTS, SamplingParams(logprobs=True)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_gives_no_token_and_costs_no_other(params, value):
    logits = torch.randn(6, VOCAB)
    expected, _ = sample(logits, *[params] * 6)
    logits[[1, 4]] = value
    logits[2, 7:] = float("-inf")
    assert sample(logits, *[params] * 6)[0][[1, 4]].tolist() == [-1, -1]
    assert sample(logits, *[params] * 6)[0][[0, 3, 5]].tolist() == expected[[0, 3, 5]].tolist()
    assert 0 <= sample(logits, *[params] * 6)[0][2] < 7
    logits[1] = 0.0
    logits[1, 9] = value
    token = sample(logits, *[params] * 6)[0][1]
    assert (token >= 0) == (value == float("-inf"))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_of_any_float_type_are_read_as_their_float32_values(temperature):
    logits = (3 * torch.randn(8, VOCAB)).bfloat16()
    params = [SamplingParams(temperature=temperature, logprobs=True)] * 8
    tokens, logprobs = sample(logits, *params)
    expected, expected_logprobs = sample(logits.float(), *params)
    assert tokens.tolist() == expected.tolist()
    assert logprobs.chosen.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(logprobs, expected_logprobs, strict=True))


def test_samples_and_steps_draw_differently():
    logits = torch.zeros(1, 10_000)
    sampler = Sampler(1, 10_000, logits.device)
    request = requests_of(SamplingParams())[0]
    tokens = set()
    for index in range(5):
        request.index = index
        for _ in range(5):
            tokens.add(sampler.sample(logits, [request])[0].item())
            request.token_ids.append(0)
    assert len(tokens) == 25


def test_mixed_batch_keeps_rows_apart():
    logits = torch.randn(3, VOCAB)
    tokens, logprobs = sample(
        logits,
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.5, top_k=1),
        SamplingParams(temperature=0, logprobs=True),
    )
    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logprobs.chosen[2], logits.log_softmax(-1)[2].max())


def test_repetition_penalty_as_transformers_defines_it():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(2, VOCAB)
    prompt = [3, 4, 5, 6]
    params = [SamplingParams(temperature=0, repetition_penalty=1e6), SamplingParams(temperature=0)]
    sampler = Sampler(2, VOCAB, logits.device)
    requests = requests_of(*params, prompt=prompt)
    for _ in range(20):
        ids = torch.tensor([requests[0].token_ids])
        expected = RepetitionPenaltyLogitsProcessor(1e6)(ids, logits[:1].clone()).argmax(-1).item()
        tokens, _ = sampler.sample(logits, requests)
        assert tokens.tolist() == [expected, logits[1].argmax().item()]
        for request, token in zip(requests, tokens.tolist()):
            request.token_ids.append(token)
    assert len(set(requests[0].token_ids)) == len(prompt) + 20, "no token came twice"


def test_repetition_record_starts_anew_with_each_request_of_a_row():
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 4] = 2.0, 1.0
    sampler = Sampler(1, VOCAB, logits.device)
    params = SamplingParams(temperature=0, repetition_penalty=10.0)
    assert sampler.sample(logits, requests_of(params, prompt=[3]))[0].item() == 4
    assert sampler.sample(logits, requests_of(params, prompt=[4]))[0].item() == 3


def advance(requests, tokens) -> None:
    for request, token in zip(requests, tokens.tolist(), strict=True):
        request.token_ids.append(token)


def test_presence_and_frequency_penalty_count_the_output_alone():
    """As vLLM defines them: the prompt's tokens are not counted."""
    logits = torch.randn(3, VOCAB)
    raw = logits.clone()
    options = [(0.8, 0.3), (-0.5, 0.0), (0.0, 0.0)]
    params = [SamplingParams(temperature=0, presence_penalty=p, frequency_penalty=f) for p, f in options]
    sampler = Sampler(3, VOCAB, logits.device)
    requests = requests_of(*params, prompt=raw[0].topk(3).indices.tolist())
    for _ in range(30):
        expected = []
        for row, (presence, frequency) in enumerate(options):
            counts = torch.bincount(torch.tensor(requests[row].token_ids[3:], dtype=torch.long), minlength=VOCAB)
            expected.append((raw[row] - presence * (counts > 0) - frequency * counts).argmax().item())
        tokens, _ = sampler.sample(logits, requests)
        assert tokens.tolist() == expected
        advance(requests, tokens)
    assert torch.equal(logits, raw), "the caller's logits are left as they are"
    assert len(set(requests[0].token_ids[3:])) > 5 > len(set(requests[1].token_ids[3:]))


def test_min_tokens_and_biases_as_transformers_defines_them():
    from transformers import MinNewTokensLengthLogitsProcessor, SequenceBiasLogitsProcessor

    logits = torch.randn(1, VOCAB)
    best = logits[0].topk(4).indices.tolist()
    params = SamplingParams(temperature=0, min_tokens=5, logit_bias={best[2]: 1.5, best[3]: -3.0})
    (request,) = requests_of(params)
    request.stop_ids = frozenset(best[:2])
    sampler = Sampler(1, VOCAB, logits.device)
    min_new = MinNewTokensLengthLogitsProcessor(3, 5, best[:2], device="cpu")
    bias = SequenceBiasLogitsProcessor([[[token], value] for token, value in params.logit_bias.items()])
    for step in range(8):
        ids = torch.tensor([request.token_ids.tolist()])
        expected = bias(ids, min_new(ids, logits.clone())).argmax().item()
        tokens, _ = sampler.sample(logits, [request])
        assert tokens.item() == expected
        assert (expected in best[:2]) <= (step >= 5)
        advance([request], tokens)


def test_bad_words_as_transformers_defines_them():
    from transformers import NoBadWordsLogitsProcessor

    logits = torch.randn(1, VOCAB)
    best = logits[0].topk(3).indices.tolist()
    (request,) = requests_of(
        SamplingParams(temperature=0, bad_words=["told apart by their tokens"]), prompt=[49, best[0]]
    )
    request.bad_words = [[best[0], best[0]], [best[1]]]
    processor = NoBadWordsLogitsProcessor(request.bad_words)
    sampler = Sampler(1, VOCAB, logits.device)
    # The prompt's end is no beginning of a bad word here, as in vLLM; transformers would count it.
    assert sampler.sample(logits, [request])[0].item() == best[0]
    request.token_ids.append(best[0])
    for _ in range(6):
        ids = torch.tensor([request.token_ids.tolist()])
        tokens, _ = sampler.sample(logits, [request])
        assert tokens.item() == processor(ids, logits.clone()).argmax().item()
        advance([request], tokens)
    assert set(request.token_ids[3:]) == {best[0], best[2]}


def test_log_probabilities_are_of_the_raw_logits_whatever_is_edited():
    logits = torch.randn(2, VOCAB)
    params = [SamplingParams(temperature=0, logprobs=3, logit_bias={7: 100.0}), SamplingParams(temperature=0)]
    tokens, logprobs = sample(logits, *params)
    expected = logits.log_softmax(-1)
    assert tokens[0] == 7
    torch.testing.assert_close(logprobs.chosen, expected.gather(1, tokens[:, None]).squeeze(1))
    assert logprobs.ranks.tolist() == [1 + (logits[0] > logits[0, 7]).sum().item(), 1]
    top = expected.topk(3)
    torch.testing.assert_close(logprobs.top, top.values)
    assert torch.equal(logprobs.top_ids, top.indices)
