from array import array
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from zipage.counters import uniform_rows as uniform
from zipage.sampling_params import SamplingParams
from zipage.scheduling.plan import RowStart
from zipage.worker.sampler import Sampler

VOCAB = 50


@dataclass
class Row:
    """A request in a row of the batch, and its text."""

    start: RowStart
    token_ids: array


def rows_of(*params: SamplingParams, prompt=(1, 2, 3), seed=7, **options) -> list[Row]:
    """Requests of one prompt in the rows from 0 on."""
    text = array("i", prompt)
    starts = [
        RowStart(row, p, len(prompt), seed=seed + row, token_ids=text if p.needs_history else None, **options)
        for row, p in enumerate(params)
    ]
    return [Row(start, text[:]) for start in starts]


def begun(sampler: Sampler, *params: SamplingParams, **options) -> list[Row]:
    rows = rows_of(*params, **options)
    for row in rows:
        sampler.begin(row.start)
    return rows


def next_tokens(sampler: Sampler, logits: torch.Tensor, rows: list[Row]):
    numbers = [(row.start.row, len(row.token_ids), row.token_ids[-1]) for row in rows]
    return sampler.sample(logits, *np.array(numbers, dtype=np.int64).T)


def sample(logits, *params, **options):
    sampler = Sampler(len(params), logits.shape[1], logits.device)
    return next_tokens(sampler, logits, begun(sampler, *params, **options))


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
        token, _ = sample(logits[i : i + 1], params, seed=7 + i)
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
    tokens = set()
    for index in range(5):
        (row,) = begun(sampler, SamplingParams(), index=index)
        for _ in range(5):
            tokens.add(next_tokens(sampler, logits, [row])[0].item())
            row.token_ids.append(0)
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

    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    assert (logits[0, 7:] > 0).sum() >= 20, "which no penalty brings below others"
    prompt = [3, 4, 5, 6]
    params = [SamplingParams(temperature=0, repetition_penalty=1e6), SamplingParams(temperature=0)]
    sampler = Sampler(2, VOCAB, logits.device)
    rows = begun(sampler, *params, prompt=prompt)
    for _ in range(20):
        ids = torch.tensor([rows[0].token_ids])
        expected = RepetitionPenaltyLogitsProcessor(1e6)(ids, logits[:1].clone()).argmax(-1).item()
        tokens, _ = next_tokens(sampler, logits, rows)
        assert tokens.tolist() == [expected, logits[1].argmax().item()]
        advance(rows, tokens)
    assert len(set(rows[0].token_ids)) == len(prompt) + 20, "no token came twice"


def test_repetition_record_starts_anew_with_each_request_of_a_row():
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 4] = 2.0, 1.0
    sampler = Sampler(1, VOCAB, logits.device)
    params = SamplingParams(temperature=0, repetition_penalty=10.0)
    assert next_tokens(sampler, logits, begun(sampler, params, prompt=[3]))[0].item() == 4
    assert next_tokens(sampler, logits, begun(sampler, params, prompt=[4]))[0].item() == 3


def advance(rows, tokens) -> None:
    for row, token in zip(rows, tokens.tolist(), strict=True):
        row.token_ids.append(token)


def test_presence_and_frequency_penalty_count_the_output_alone():
    """As vLLM defines them: the prompt's tokens are not counted."""
    logits = torch.randn(3, VOCAB)
    raw = logits.clone()
    options = [(0.8, 0.3), (-0.5, 0.0), (0.0, 0.0)]
    params = [SamplingParams(temperature=0, presence_penalty=p, frequency_penalty=f) for p, f in options]
    sampler = Sampler(3, VOCAB, logits.device)
    rows = begun(sampler, *params, prompt=raw[0].topk(3).indices.tolist())
    for _ in range(30):
        expected = []
        for row, (presence, frequency) in enumerate(options):
            counts = torch.bincount(torch.tensor(rows[row].token_ids[3:], dtype=torch.long), minlength=VOCAB)
            expected.append((raw[row] - presence * (counts > 0) - frequency * counts).argmax().item())
        tokens, _ = next_tokens(sampler, logits, rows)
        assert tokens.tolist() == expected
        advance(rows, tokens)
    assert torch.equal(logits, raw), "the caller's logits are left as they are"
    assert len(set(rows[0].token_ids[3:])) > 5 > len(set(rows[1].token_ids[3:]))


def test_min_tokens_and_biases_as_transformers_defines_them():
    from transformers import MinNewTokensLengthLogitsProcessor, SequenceBiasLogitsProcessor

    logits = torch.randn(1, VOCAB)
    best = logits[0].topk(4).indices.tolist()
    params = SamplingParams(temperature=0, min_tokens=5, logit_bias={best[2]: 1.5, best[3]: -3.0})
    sampler = Sampler(1, VOCAB, logits.device)
    (row,) = begun(sampler, params, stop_ids=frozenset(best[:2]))
    min_new = MinNewTokensLengthLogitsProcessor(3, 5, best[:2], device="cpu")
    bias = SequenceBiasLogitsProcessor([[[token], value] for token, value in params.logit_bias.items()])
    for step in range(8):
        ids = torch.tensor([row.token_ids.tolist()])
        expected = bias(ids, min_new(ids, logits.clone())).argmax().item()
        tokens, _ = next_tokens(sampler, logits, [row])
        assert tokens.item() == expected
        assert (expected in best[:2]) <= (step >= 5)
        advance([row], tokens)


def test_bad_words_as_transformers_defines_them():
    from transformers import NoBadWordsLogitsProcessor

    logits = torch.randn(1, VOCAB)
    best = logits[0].topk(3).indices.tolist()
    bad_words = [[best[0], best[0]], [best[1]]]
    processor = NoBadWordsLogitsProcessor(bad_words)
    sampler = Sampler(1, VOCAB, logits.device)
    params = SamplingParams(temperature=0, bad_words=["told apart by their tokens"])
    (row,) = begun(sampler, params, prompt=[49, best[0]], bad_words=bad_words)
    # The prompt's end is no beginning of a bad word here, as in vLLM; transformers would count it.
    assert next_tokens(sampler, logits, [row])[0].item() == best[0]
    row.token_ids.append(best[0])
    for _ in range(6):
        ids = torch.tensor([row.token_ids.tolist()])
        tokens, _ = next_tokens(sampler, logits, [row])
        assert tokens.item() == processor(ids, logits.clone()).argmax().item()
        advance([row], tokens)
    assert set(row.token_ids[3:]) == {best[0], best[2]}


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


def test_a_text_of_which_tokens_are_missing_is_an_error():
    logits = torch.zeros(1, VOCAB)
    sampler = Sampler(1, VOCAB, logits.device)
    (row,) = begun(sampler, SamplingParams(presence_penalty=1.0))
    row.token_ids.extend([4, 5])
    with pytest.raises(RuntimeError, match="4 tokens are known of a text of 5"):
        next_tokens(sampler, logits, [row])
