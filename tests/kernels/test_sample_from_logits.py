"""Tokens drawn from logits equal the reference's for the same uniform numbers."""

import pytest
import torch

from kernels.sample_from_logits import sample_from_logits_reference, sample_from_logits_torch
from kernels.sample_from_logits_triton import CHUNK, sample_from_logits_triton
from tests.kernels.paged import device_of

SAMPLE = {
    "triton": sample_from_logits_triton,
    "torch": sample_from_logits_torch,
    "reference": sample_from_logits_reference,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF = float("inf")


def sample(backend, logits, temperature, u):
    device = device_of(backend)
    temperature = torch.tensor(temperature, dtype=torch.float32, device=device)
    u = torch.tensor(u, dtype=torch.float64, device=device)
    return SAMPLE[backend](logits.to(device), temperature, u).tolist()


def away_from_borders(logits, temperature, count):
    """Uniform numbers in the middle of `count` random tokens' shares of a row: no rounding changes the token."""
    probs = (logits.double() / temperature).softmax(dim=-1)
    tokens = probs.multinomial(count, replacement=True)
    return ((probs.cumsum(dim=-1) - probs / 2)[tokens]).tolist(), tokens.tolist()


@pytest.mark.parametrize("backend", SAMPLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 50, CHUNK, 2 * CHUNK + 37])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 3.0])
def test_the_middle_of_a_share_draws_its_token(backend, dtype, vocab, temperature):
    logits = (4 * torch.randn(vocab)).to(dtype)
    u, tokens = away_from_borders(logits, temperature, 6)
    padded = torch.full((6, vocab + 3), float("nan"), dtype=dtype)
    padded[:, :vocab] = logits
    assert sample(backend, padded[:, :vocab], [temperature] * 6, u) == tokens


@pytest.mark.parametrize("backend", SAMPLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_drawn_apart_and_greedy_ones_are_greedy(backend, dtype):
    logits = torch.randn(4, 2 * CHUNK).to(dtype)
    temperatures, shares, tokens = [0.0, 1.0, 0.0, 0.5], [0.3], [logits[0].argmax().item()]
    for row in (1, 2, 3):
        share, token = away_from_borders(logits[row], temperatures[row] or 1.0, 1)
        shares += share
        tokens += token if temperatures[row] else [logits[row].argmax().item()]
    assert sample(backend, logits, temperatures, shares) == tokens


@pytest.mark.parametrize("backend", SAMPLE)
def test_greedy_takes_the_first_of_equals(backend):
    logits = torch.zeros(3, 3 * CHUNK)
    logits[0, [CHUNK + 5, CHUNK + 9, 2 * CHUNK]] = 1.0
    logits[1, [4, 8]] = -0.5
    logits[2, :-2] = -INF
    assert sample(backend, logits, [0.0] * 3, [0.5] * 3) == [CHUNK + 5, 0, 3 * CHUNK - 2]


@pytest.mark.parametrize("backend", SAMPLE)
@pytest.mark.parametrize("scale", [1.0, 1e30], ids=["ordinary", "huge"])
def test_all_mass_in_one_token(backend, scale):
    """Whatever u is: the others are -inf, or so far below that their probability is 0."""
    logits = torch.full((4, 2 * CHUNK + 1), -INF)
    logits[1::2] = -200.0 * scale
    where = [0, 2 * CHUNK, CHUNK - 1, CHUNK]
    logits[torch.arange(4), where] = 3.0 * scale
    for u in (2.0**-53, 0.5, 1 - 2.0**-53):
        assert sample(backend, logits, [1.0] * 4, [u] * 4) == where


@pytest.mark.parametrize("backend", SAMPLE)
def test_the_ends_of_u_are_the_first_and_last_token_of_positive_probability(backend):
    logits = torch.zeros(2, 3 * CHUNK + 9)
    logits[:, :3] = -INF
    logits[:, CHUNK - 2 : CHUNK + 2] = -INF
    logits[:, -4:] = -INF
    assert sample(backend, logits, [1.0, 1.0], [2.0**-53, 1 - 2.0**-53]) == [3, 3 * CHUNK + 4]


@pytest.mark.parametrize("backend", SAMPLE)
def test_a_tiny_temperature_is_greedy(backend):
    logits = torch.randn(1, CHUNK + 1)
    assert sample(backend, logits, [1e-30], [0.999]) == [logits.argmax().item()]


@pytest.mark.parametrize("backend", SAMPLE)
def test_equal_logits_share_the_range_of_u_equally(backend):
    """To the last token: float32 sums would stop short of the tail."""
    vocab = 5 * CHUNK
    tokens = torch.tensor([0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 7, vocab - 2, vocab - 1])
    logits = torch.full((len(tokens), vocab), -7.0)
    assert sample(backend, logits, [0.8] * len(tokens), ((tokens + 0.5) / vocab).tolist()) == tokens.tolist()


@pytest.mark.parametrize("backend", SAMPLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_gives_no_token(backend, dtype):
    logits = torch.randn(5, 2 * CHUNK + 7).to(dtype)
    logits[0, CHUNK + 3] = float("nan")
    logits[1, 2 * CHUNK + 6] = INF
    logits[2] = -INF
    logits[3, 1:] = -INF
    for temperature in (0.0, 0.7):
        tokens = sample(backend, logits, [temperature] * 5, [0.5] * 5)
        assert tokens[:4] == [-1, -1, -1, 0]
        assert tokens[4] >= 0


@pytest.mark.parametrize("backend", SAMPLE)
def test_no_rows(backend):
    assert sample(backend, torch.empty(0, 50), [], []) == []
